"""What we use of other libraries although they do not document it.

There is one module for each library. Each function says what it relies on and with which versions it was
tested. tests/compat checks every reliance against the installed version, so that an upgrade fails there and
names what changed. Nothing here imports the rest of the package.
"""

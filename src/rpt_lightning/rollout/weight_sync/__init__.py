"""How weights reach an engine, and how they are compared."""

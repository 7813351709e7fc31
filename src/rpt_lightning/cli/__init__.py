"""The ``rpt`` command."""

from rpt_lightning.cli.command import main

__all__ = ["main"]

"""The command line. Importing it is cheap: torch and transformers are imported inside the commands."""

from collm.cli.app import main

__all__ = ["main"]

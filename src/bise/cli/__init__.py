"""The command line: one file per verb. The only package that prints."""

from bise.cli.app import main

__all__ = ["main"]

"""Command line: one file per group; imports inside the commands so that --help is quick."""

from mlpd.cli.main import main

__all__ = ["main"]

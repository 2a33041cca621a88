"""`python -m mlpd`: the same as the command `mlpd`."""

from mlpd.cli import main

main(prog_name="mlpd")

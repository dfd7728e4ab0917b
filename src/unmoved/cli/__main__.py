"""`python -m unmoved.cli`, for where the command is not on the path."""

from unmoved.cli import main

main()

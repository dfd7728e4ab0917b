"""Run the command as `python -m unmoved.cli`, for where `unmoved` is not on the path."""

from unmoved.cli import main

main()

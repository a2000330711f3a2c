"""`python -m fastff.cli`."""

from fastff.cli.commands import main

main()

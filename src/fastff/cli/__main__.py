"""`python -m fastff.cli`."""

from fastff.cli.app import main

main()

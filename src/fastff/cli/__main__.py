"""`python -m fastff.cli`."""

from fastff.cli.main import main

main()

"""`python -m potluck` is `potluck`."""

from potluck.cli.main import main

main()

"""`python -m variator`."""

from variator.cli import main

main()

"""`python -m bise` is `bise`."""

from bise.cli import main

main()

"""`python -m tunery.cli`, for where scripts are not on the path."""

from tunery.cli import main

main()

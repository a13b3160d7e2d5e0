"""`python -m thrave` is the `thrave` command."""

from thrave.cli.main import main

main()

"""`python -m engram_interp`: the command line without an installed script, as torchrun starts it."""

from engram_interp.cli import main

main()

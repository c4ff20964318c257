"""`python -m compressft`: the command line, also for torchrun."""

from compressft.cli import main

main()

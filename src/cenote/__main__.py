"""`python -m cenote` is `cenote`."""

from cenote.cli.__main__ import main

main()

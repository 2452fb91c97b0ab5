"""`python -m ublk_ubi`: the command `ublk-ubi`."""

from ublk_ubi.cli import main

main()

"""`ublk-ubi serve`, as SPDK's own client has it; the daemons are fakes, all else is real."""

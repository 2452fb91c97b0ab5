"""`ublk-ubi serve`: SPDK's JSON-RPC, so that ublk-ubi takes bdev_ubi's place.

It owns no data path. Disks are daemons, started and ended by the same code as `add` and `del`; what
a client of SPDK's needs beyond that (which name stands for which path, what a disk was created
with) is kept in `book`, in a file that outlives this process and not this boot.

    process   the loop: sockets, signals, readiness, the end
    methods   the calls and their parameters
    bdevs     bdevs and configuration in SPDK's words
    disks     creating, deleting and the like: blocking, on the threads of `jobs`
    book      what was told to it
    loading   --json
    keeper    SPDK's side again, after SPDK restarted (--spdk)
"""

"""The parts of tools/bench: what ublk-ubi and its peers cost, in instructions, in one boot.

On the host
- main: reads the command line, decides
- cases: what is compared with what, and what is to be reached
- loads: what is done to a disk, and how often
- boot: boots the guest with all that it needs, and reads what it measures
- payload: the programs that the guest runs, as one archive
- kublk: the kernel selftests' server, built in the user's cache
- rows: figures into rows: ratio, goal, met
- table: rows as people read them
- gate: figures against those in the repository (figures.json)

In the guest
- guest: measures what it is told to, a line of JSON a figure
- disks: ram disks, and what is on them
- servers: the disks that are compared: ours, and each peer
- special: what is measured otherwise than by one run of fio
- shell: runs commands, and reads the clocks
"""

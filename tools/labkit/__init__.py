"""The parts of tools/lab: COMMAND under a real kernel with ublk, on a machine that has none.

- cli: reads the command line, decides
- kernel: finds or builds the user-mode kernel and the guest's init in the user's cache
- debian: gets the kernel's source, and what it takes to build it, from the system's own archive
- plan: decides what the guest shows and what COMMAND is given
- cage: the host's side of safety: namespaces in which the guest's process cannot write
- guest: boots one guest, waits for it, clears up behind it
- relay: carries output, terminal, signals and the time limit between caller and guest
- native: COMMAND on this machine's own kernel instead
- init.c: the guest's side: its first process
- kernel.config: what the kernel can do
"""

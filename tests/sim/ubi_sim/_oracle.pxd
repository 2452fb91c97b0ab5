"""What a guest may see. Knows nothing of stripes, states, rounds: requests and crashes alone.

- Without a crash a read returns the last completed write, or one that was in flight meanwhile.
- After a process crash: the same; a write that was in flight is there or not, cell by cell.
- After a power loss: what completed before a completed flush (or FUA write) began, or anything
  later. What the first read shows then holds until the cell is written again.
- After a failed fdatasync a cell may show what is on the medium, until the operator is told and
  accepts what is lost: the kernel has dropped what was above it.
- A failed write is there or not, cell by cell, as after a crash.
- A cell that no write ever touched holds what it held at first: the image's content, what bdev_ubi
  had put there, or zeros behind the image.
- WRITE_ZEROES is a write of zeros; after a DISCARD a cell holds what it held, or zeros. Both may be
  refused as unsupported, and then change nothing.
- A DISCARD that succeeds was passed down for every cell that the base had when it was sent.
- A request fails only if an error was injected after it was sent, or, if it asks for durability,
  once an fdatasync has failed. One that is sent after that never succeeds; one that was in flight
  may, if it is true.
- Nobody ever sees what the image holds once it has changed. A request that needs it then may fail
  with EIO: a read, or a write to a part, of a stripe that the base had not when it was sent.
- Of writes to one cell that overlap in time any may turn out to be the last.
"""

from libc.stdint cimport int32_t, uint32_t

from ubi_sim._model cimport GuestRequest, World

cdef void oracle_init(World* world) noexcept nogil
# What a cell holds before anybody writes it.
cdef uint32_t oracle_first_value(World* world, uint32_t cell) noexcept nogil
cdef bint oracle_may_write(World* world, uint32_t first, uint32_t count) noexcept nogil
# A request is sent: `guest` is filled in but for serial and legal values. Writes get a serial.
cdef void oracle_sent(World* world, GuestRequest* guest) noexcept nogil
cdef void oracle_completed(World* world, GuestRequest* guest, int32_t result,
                           const uint32_t* data) noexcept nogil
# The daemon is gone, and what it was asked is failed by the kernel.
cdef void oracle_process_crash(World* world) noexcept nogil
cdef void oracle_power_loss(World* world) noexcept nogil
# An error was injected.
cdef void oracle_fault(World* world) noexcept nogil
# An fdatasync failed: what is not durable may vanish under the guest.
cdef void oracle_sync_failed(World* world) noexcept nogil
# The base was closed cleanly: a flush of everything.
cdef void oracle_clean_stop(World* world) noexcept nogil
cdef uint32_t written_value(uint32_t serial, uint32_t cell) noexcept nogil

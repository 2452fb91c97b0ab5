"""The threads of a device: each owns a ring and one engine, and runs nogil from start to end.

One turn of a loop: submit what the last turn asked for and wait (one system call), give the
engine every completion, drain the mailboxes, ring the doorbell of whoever got a message and sleeps.

Invariants
- A thread arms its doorbell before it sleeps and looks into its mailboxes once more after that.
- Mailboxes are drained on every turn, so that a lost doorbell costs at most TICK_NS.
- No system call but io_uring_enter and the clock (vdso); no allocation; no Python object. Two
  exceptions, neither of which waits for I/O: where zero copy falls back, a request's data is copied
  with pread or pwrite on ublkc (through the ring they would go to a worker); and once, the image's
  descriptor is dropped.
- A round that is due begins at the end of a turn, when all that has joined is known. While requests
  wait for their stripes, which would need a round of their own, it is held back: for as long as
  HOLD_ROUNDS take on the average, and MAX_HOLD_NS, at the most. A lone writer is never held back.
- A request's buffer is the kernel's until its CQE and after its COMMIT, ours in between.
- A queue that ends while its disk goes on leaves its ring open, for another to close once this
  thread has ended: only then are its tags taken back.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ublk_ubi._abi cimport ubi_ublk_io_desc
from ublk_ubi._core cimport Action, Actions, Shared
from ublk_ubi._histogram cimport Histogram
from ublk_ubi._hydrator cimport Hydrator
from ublk_ubi._mailbox cimport Doorbell, Mailbox
from ublk_ubi._queue cimport KINDS, Queue
from ublk_ubi._ring cimport Op, Ring

cdef enum:
    TICK_NS = 1000000000
    HOLD_ROUNDS = 4
    MAX_HOLD_NS = 5000000

# How far a thread is; the control thread reads it, told of changes by `notify_fd`.
cdef enum ThreadState:
    THREAD_NEW = 0
    THREAD_RUNNING = 1             # a queue: every tag is fetched; the hydrator: its ring is there
    THREAD_LIVE = 2                # the hydrator: what was found is committed, it may go live
    THREAD_STOPPED = 3             # all work is done
    THREAD_FAILED = 4              # `status` says why

cdef struct Device:
    Shared shared
    const uint8_t* zeros           # [stripe_bytes], never written
    uint32_t block                 # bytes: of image and base, for direct I/O
    bint base_is_block
    Mailbox* to_hydrator           # [queues]
    Mailbox* to_queue              # [queues]
    Doorbell* bells                # [queues + 1]; the hydrator's is the last
    int notify_fd                  # eventfd

cdef struct ThreadBase:
    Device* device
    Ring ring
    Op* ops
    uint32_t op_count
    Actions actions
    int files[4]                   # as _ring.RingFile
    char name[16]                  # as ps -L shows it
    int wake_fd                    # eventfd: the control thread wants this thread's attention
    uint32_t quit                  # leave at once (nothing is served any more)
    uint32_t leave                 # a queue: end what is under way, begin nothing, then leave
    uint32_t stop                  # the hydrator: finish, commit, then stop
    uint32_t drop_image            # nobody needs the image: let go of it
    uint32_t image_dropped         # done
    uint32_t state                 # ThreadState
    int32_t status                 # -errno of what failed
    uint64_t turns
    uint64_t doorbells
    uint64_t doorbells_failed

cdef struct QueueThread:
    ThreadBase base
    Queue queue
    const ubi_ublk_io_desc* descriptors   # [depth], mapped from ublkc
    uint8_t* buffers               # [depth × buffer_stride]
    uint64_t buffer_stride
    uint8_t* registered            # [depth] 1: its pages are in the slot; NULL: plain copy
    uint64_t fallbacks             # requests whose pages the kernel did not register
    uint64_t* started              # [depth] ns
    uint32_t tags_gone             # tags that the kernel has taken back
    bint ring_is_left              # its ring is open still, see run_queue
    uint64_t now
    Histogram latency[KINDS]       # by request_kind, ns

cdef struct HydratorThread:
    ThreadBase base
    Hydrator hydrator
    uint8_t* stripes               # [buffers × stripe_bytes]
    uint8_t* pages                 # shadow of the header pages
    uint64_t next_tick             # ns
    uint64_t round_began           # ns, 0: none runs
    uint64_t round_ns              # what rounds take, on the average
    uint64_t due_since             # ns, when the round that is held back became due, or 0
    # Background hydration, as the control thread wants it …
    uint32_t hydrate
    uint32_t kicks                 # counts up: what failed is to be tried now
    uint64_t rate                  # bytes a second, 0: as fast as can be
    # … and how far that has come.
    uint32_t hydrate_seen
    uint32_t kicks_seen
    uint64_t paced_at              # ns, when the budget was last topped up
    uint32_t hydrated              # every stripe is DURABLE

cdef void run_queue(QueueThread* thread) noexcept nogil
cdef void run_hydrator(HydratorThread* thread) noexcept nogil

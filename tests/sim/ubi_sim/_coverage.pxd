"""Which state met which event: pairs, counted before each step of an engine.

A pair is `table base + row × columns + column`; tests/sim/pairs.py names them in the same order and
says which are legal.
"""

from libc.stdint cimport uint16_t

from ublk_ubi._core cimport Event
from ubi_sim._model cimport World

cdef enum:
    PAIRS = 544

    # A request arrives: what (rows) at a stripe in which state (columns).
    AT_STRIPE = 0                  # 8 × 5
    READ_ROW = 0
    PART_ROW = 1                   # a write of part of a stripe
    WHOLE_ROW = 2
    DURABLE_PART_ROW = 3           # … that is to be durable
    DURABLE_WHOLE_ROW = 4
    ZERO_PART_ROW = 5
    ZERO_WHOLE_ROW = 6
    DISCARD_ROW = 7                # at its first stripe

    # A flush arrives: all durable, all durable but a sync runs, not all durable, latched, unsafe,
    # all durable and nothing written since a sync began.
    AT_FLUSH = 40                  # 1 × 6
    # What the queue refuses: a write to be durable once latched.
    AT_REFUSED = 46                # 1 × 1

    # A request's state (rows: RequestState) and what ends its wait (columns).
    AT_WAIT = 48                   # 11 × 9
    DONE_OK = 0
    DONE_FAILED = 1
    DONE_FAILED_PRESENT = 2        # the image failed, but the base has the stripe by now
    GRANT_PRESENT = 3
    GRANT_CLAIMED = 4
    GRANT_FAILED = 5
    ANSWER_OK = 6
    ANSWER_FAILED = 7
    DONE_LATCHED = 8               # it succeeded, after another fdatasync has failed

    # A stripe's state at the hydrator (rows) and an event for it (columns).
    AT_HYDRATOR = 152              # 8 × 9
    ROW_ABSENT = 0
    ROW_WANTED = 1
    ROW_QUEUED = 2
    ROW_FETCHING = 3
    ROW_OVERWRITING = 4
    ROW_PRESENT = 5
    ROW_IN_ROUND = 6
    ROW_DURABLE = 7
    ON_WANT = 0
    ON_HYDRATE = 1
    ON_CLAIM = 2
    ON_WRITTEN = 3
    ON_WRITTEN_FAILED = 4
    ON_READ = 5
    ON_READ_FAILED = 6
    ON_WRITE = 7
    ON_WRITE_FAILED = 8

    # A round's phase (rows: RoundPhase) and an event (columns).
    AT_ROUND = 232                 # 4 × 12
    ON_JOIN = 0
    ON_JOIN_LATCHED = 1
    ON_TICK = 2
    ON_TICK_LATCHED = 3
    ON_STOP = 4
    ON_SYNC = 5
    ON_SYNC_FAILED = 6
    ON_PAGE = 7
    ON_PAGE_FAILED = 8
    ON_SYNC_LATCHED = 9
    ON_ROUND = 10                  # one is due, and may begin
    ON_ROUND_LATCHED = 11

    # A lifecycle's phase (rows: Phase) and how its action ended (columns: well, or not).
    AT_PHASE = 320                 # 40 × 2

    # Opening a disk of ours: closed, open here, open elsewhere (rows), the table found (columns).
    AT_TABLE = 400                 # 3 × 7
    FOUND_NONE = 0
    FOUND_VALID = 1
    FOUND_LATCHED = 2
    FOUND_OTHER = 3                # of this base, but not of this opening
    FOUND_COPY = 4                 # of another base
    FOUND_DAMAGED = 5
    FOUND_LIVE = 6
    # … and the temporary one (columns: none, of this generation, another, live).
    AT_TEMPORARY = 424             # 3 × 4

    # Refusals (columns: Refusal).
    AT_REFUSAL = 440               # 1 × 20

    # A request arrives once the image is lost: READ, write of a part, of all (rows), the stripe's
    # state (columns).
    AT_LOST = 460                  # 3 × 5

    # The hydrator's life (rows: Life) and an event's kind (columns: EventKind).
    AT_LIFE = 480                  # 5 × 11

cdef void cover_queue(World* world, uint16_t queue, const Event* event) noexcept nogil
cdef void cover_hydrator(World* world, const Event* event) noexcept nogil
# Before each step of the lifecycle, and once it has ended.
cdef void cover_lifecycle(World* world, const Event* event) noexcept nogil

"""Planted bugs: what the simulator must find, and changes that it must not mind.

A mutant is a change of an engine's text, or a bug of the world around the engines. Seeds are the
same for all of them: there is no scenario made for one. `python -m sim.mutants` lists them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sim.builder import Change, Variant
from sim.plans import Bug

QUEUE = "_queue.pyx"
HYDRATOR = "_hydrator.pyx"
LIFECYCLE = "_lifecycle.pyx"
FORMAT = "_format.pyx"


@dataclass(frozen=True)
class Mutant:
    """A planted bug; `survives`: a change of behaviour that breaks no promise."""

    name: str
    why: str
    changes: tuple[Change, ...] = ()
    bug: Bug = Bug.NONE
    survives: bool = False

    @property
    def variant(self) -> Variant:
        """What to build for it."""
        return Variant(self.changes)


SET_BITS = """            if flagged(hydrator, stripe, IN_ROUND):
                hydrator.pages[header_offset(stripe)] = 1
"""
START_ROUND = """    hydrator.joined = hydrator.joining
    hydrator.joining.first = NONE32
    take_round(hydrator)
"""
SYNC_DATA = "    start_sync(hydrator, ROUND_SYNC_DATA, actions)\n"
WHOLE_STRIPE = "    elif request.length == queue.shared.stripe_bytes:\n"
IF_FAILED = """    if result < 0:
        complete(queue, tag, result, actions)
    """
DISCARD_MORE = """        discard_more(queue, tag, actions)


cdef void on_sync_done("""
DISCARD_NO_MORE = DISCARD_MORE.replace("discard_more(queue, tag,", "complete(queue, tag, 0,")
EVENT_STOP = "        write_slot(lifecycle, PHASE_CLOSE_SLOT, actions)\n"

# -- commit rounds -----------------------------------------------------------------------------

ROUNDS = (
    Mutant("metadata from the live table",
           "the table knows stripes whose data is not durable",
           (Change(HYDRATOR, SET_BITS, """            if hydrator.shared.table[stripe]:
                hydrator.pages[header_offset(stripe)] = 1
"""),)),
    Mutant("shadow page rebuilt from PRESENT",
           "a stripe that became PRESENT after D was taken has no durable data",
           (Change(HYDRATOR, SET_BITS, """            if state_of(hydrator, stripe) >= PRESENT:
                hydrator.pages[header_offset(stripe)] = 1
"""),)),
    Mutant("bit before data is durable",
           "after a power loss the bit shows what was on the base before",
           (Change(HYDRATOR, SYNC_DATA, """    set_bits(hydrator)
    hydrator.round = ROUND_WRITE_PAGES
    hydrator.next_page = 0
    advance_pages(hydrator, actions)
"""),)),
    Mutant("flush joins a round that has begun",
           "what became PRESENT since is not in that round's D",
           (Change(HYDRATOR, "    list_append(hydrator, &hydrator.joining, node)\n",
                   """    if hydrator.round == ROUND_IDLE:
        list_append(hydrator, &hydrator.joining, node)
    else:
        list_append(hydrator, &hydrator.joined, node)
"""),)),
    Mutant("D taken before the joiners are closed",
           "who joins between the two is promised stripes that are not in D",
           (Change(HYDRATOR, START_ROUND, "    take_round(hydrator)\n"),
            Change(HYDRATOR, "    if result < 0:\n        set_once_u32(",
                   """    if hydrator.round == ROUND_SYNC_DATA:
        hydrator.joined = hydrator.joining
        hydrator.joining.first = NONE32
    if result < 0:
        set_once_u32("""))),
    Mutant("fast path ignores the running round",
           "an fdatasync alone does not make the running round's bits durable",
           (Change(HYDRATOR, "    hydrator.round_count = hydrator.present_count\n",
                   """    hydrator.round_count = hydrator.present_count
    add_i64(&hydrator.shared.undurable, -<int32_t>hydrator.present_count)
"""),
            Change(HYDRATOR,
                   "        add_i64(&hydrator.shared.undurable, -<int32_t>hydrator.round_count)\n",
                   ""),
            Change(HYDRATOR, "        hydrator.present_count += hydrator.round_count\n",
                   """        hydrator.present_count += hydrator.round_count
        add_i64(&hydrator.shared.undurable, hydrator.round_count)
"""))),
    Mutant("two rounds on one page",
           "the older write of a page lands last and takes the newer one's bits away",
           (Change(HYDRATOR, """    start_pages(hydrator, actions)
    if hydrator.pages_in_flight > 0:
        return
""", "    start_pages(hydrator, actions)\n"),
            Change(HYDRATOR, """    ensure(hydrator.round == ROUND_WRITE_PAGES and hydrator.pages_in_flight > 0,
           b"pages are written in their phase of a round only")
""", ""),  # noqa: E501
            Change(HYDRATOR, """    hydrator.free_page_tokens |= <uint32_t>1 << token
    hydrator.pages_in_flight -= 1
""", """    hydrator.free_page_tokens |= <uint32_t>1 << token
    hydrator.pages_in_flight -= 1
    if hydrator.round != ROUND_WRITE_PAGES:
        return
"""))),
    Mutant("failed fdatasync followed by a clean round",
           "the kernel reports a lost write once: the next fdatasync proves nothing",
           (Change(HYDRATOR,
                   "        set_once_u32(hydrator.shared.latch, <uint32_t>-result)\n",
                   "        hydrator.stats.round_errors += 1\n"),)),
    Mutant("the hydrator never looks at the latch",
           "a round of its own succeeds after a queue's fdatasync has failed",
           (Change(HYDRATOR, "    return load_u32(hydrator.shared.latch) != 0\n",
                   "    return False\n"),)),
    Mutant("joiners wait for no round",
           "who has joined, with no stripe to commit, is answered by nobody",
           (Change(HYDRATOR, """hydrator.present_count > 0 or hydrator.joining.first != NONE32:
""", "hydrator.present_count > 0:\n"),)),
)

# -- stripes -----------------------------------------------------------------------------------

STRIPES = (
    Mutant("failed stripe write marked PRESENT",
           "the base has some of it, or nothing",
           (Change(HYDRATOR, "        end_fetch(hydrator, index, event.result, actions)\n",
                   "        end_fetch(hydrator, index, 0 if phase == FETCH_WRITE else event.result,"
                   " actions)\n"),)),
    Mutant("failed OVERWRITING stuck",
           "who comes for that stripe later waits for ever",
           (Change(HYDRATOR, """    set_state(hydrator, stripe, ABSENT)
    answer(hydrator, node, MSG_DONE, result, actions)
""", "    answer(hydrator, node, MSG_DONE, result, actions)\n"),)),
    Mutant("failed OVERWRITING PRESENT",
           "the base has some of it, or nothing",
           (Change(HYDRATOR, """    set_state(hydrator, stripe, ABSENT)
    answer(hydrator, node, MSG_DONE, result, actions)
""", """    make_present(hydrator, stripe)
    answer(hydrator, node, MSG_DONE, result, actions)
"""),)),
    Mutant("waiter's write before the stripe write's completion",
           "the stripe write lands on top of the guest's",
           (Change(HYDRATOR, "    fetch.phase = FETCH_WRITE\n", """    fetch.phase = FETCH_WRITE
    make_present(hydrator, fetch.stripe)
    wake(hydrator, fetch.stripe, 0, actions)
"""),
            Change(HYDRATOR, "        make_present(hydrator, stripe)\n        result = 0\n",
                   """        if state_of(hydrator, stripe) == FETCHING:
            make_present(hydrator, stripe)
        result = 0
"""))),
    Mutant("stale buffer tail",
           "behind the image's end a buffer holds what it held before",
           (Change(HYDRATOR, "    action.length = length\n    action.minimum",
                   "    action.length = length if left >= length else <uint32_t>left\n"
                   "    action.minimum"),)),
    Mutant("waiters lost on error",
           "who waits for a fetch that fails waits for ever",
           (Change(HYDRATOR, """    wake(hydrator, stripe, result, actions)
    start_fetches(hydrator, actions)
""", """    if result >= 0:
        wake(hydrator, stripe, result, actions)
    start_fetches(hydrator, actions)
"""),)),
    Mutant("hole PRESENT without zeroing",
           "a stripe that is not written shows what was on the base before",
           (Change(HYDRATOR, "        store_fetched(hydrator, index, event.zeros, actions)\n",
                   """        if event.zeros:
            end_fetch(hydrator, index, 0, actions)
        else:
            store_fetched(hydrator, index, event.zeros, actions)
"""),)),
    Mutant("image let go of before the last bit is durable",
           "after a power loss the base needs it again",
           (Change(HYDRATOR, "    if (hydrator.stats.durable == hydrator.shared.image_stripes",
                   "    if (hydrator.stats.present == hydrator.shared.image_stripes"),)),
    Mutant("the image's last stripe is left to the first reader",
           "a read goes behind the end of the image",
           (Change(HYDRATOR, "    if (hydrator.shared.image_bytes & (hydrator.shared.stripe_bytes - 1)\n",  # noqa: E501
                   "    if (False\n"),)),
)

# -- requests ----------------------------------------------------------------------------------

REQUESTS = (
    Mutant("flush acknowledged early",
           "no bit is durable yet",
           (Change(QUEUE, """        ask(queue, tag, AWAITING_ROUND, MSG_JOIN, 0, actions)
    elif load_u32(""", """        complete(queue, tag, 0, actions)
    elif load_u32("""),)),
    Mutant("flush answered by an fdatasync that has not ended",
           "it may fail, or the power be lost before",
           (Change(QUEUE, "    elif load_u32(&queue.shared.base) == BASE_SYNCED:\n",
                   "    elif load_u32(&queue.shared.base) != BASE_CHANGED:\n"),)),
    Mutant("flush answered by an fdatasync that began before a write had ended",
           "that write is in no fdatasync",
           (Change(HYDRATOR, "        set_once_u32(&hydrator.shared.base, BASE_SYNCED)\n",
                   "        exchange_u32(&hydrator.shared.base, BASE_SYNCED)\n"),)),
    Mutant("a write does not say that it has changed the base",
           "the flush after it finds nothing to do",
           (Change(QUEUE, f"    base_changed(queue)\n{IF_FAILED}elif", f"{IF_FAILED}elif"),)),
    Mutant("a discard does not say that it has changed the base",
           "what it gave back comes again after a flush and a power loss",
           (Change(QUEUE, f"    base_changed(queue)\n{IF_FAILED}else", f"{IF_FAILED}else"),)),
    Mutant("flush joins an fdatasync that has begun",
           "it began before the writes that the flush is for were complete",
           (Change(QUEUE, """    queue.requests[tag].next = queue.sync_next
    queue.sync_next = tag
    if not queue.syncing:
""", """    if queue.syncing:
        queue.requests[tag].next = queue.sync_running
        queue.sync_running = tag
    else:
        queue.requests[tag].next = queue.sync_next
        queue.sync_next = tag
"""),)),
    Mutant("FUA acknowledged because its stripe became DURABLE meanwhile",
           "the round that made it so began before this write's data was complete",
           (Change(QUEUE, "    elif request.follows == FOLLOWS_ROUND:\n",
                   """    elif request.follows == FOLLOWS_ROUND and stripe_state(
            queue.shared, request.stripe) != DURABLE:
"""),)),
    Mutant("FUA as plain",
           "nothing makes the write durable",
           (Change(QUEUE, "    request.durable = is_durable(queue.shared, event)\n",
                   "    request.durable = 0\n"),)),
    Mutant("writethrough as writeback", "who never flushes loses what was acknowledged",
           (Change(QUEUE, "(event.fua or shared.cache == CACHE_WRITETHROUGH)", "event.fua"),)),
    Mutant("WRITE_ZEROES unsynced in writethrough", "zeroing has no DSYNC of its own",
           (Change(QUEUE, "            request.follows = FOLLOWS_SYNC\n",
                   "            request.follows = FOLLOWS_NOTHING\n"),)),
    Mutant("image closed under a read", "the base has had the stripe by then",
           (Change(QUEUE, "    if result < 0 and stripe_state(",
                   "    if result < -99 and stripe_state("),)),
    Mutant("complete before PRESENT",
           "killed now, the daemon's successor takes the stripe from the image",
           (Change(QUEUE, """        request.result = event.result
        ask(queue, tag, AWAITING_PRESENT, MSG_WRITTEN, event.result, actions)
""", """        send(queue, tag, MSG_WRITTEN, event.result, actions)
        complete(queue, tag, event.result, actions)
"""),
            Change(HYDRATOR, "        answer(hydrator, node, MSG_DONE, 0, actions)\n        wake(",
                   "        wake("),
            Change(HYDRATOR, "    answer(hydrator, node, MSG_DONE, result, actions)\n    # The",
                   "    # The"))),
    Mutant("whole stripe misjudged at the image's end",
           "a write that ends where the image ends does not cover its stripe",
           (Change(QUEUE, WHOLE_STRIPE, """    elif (request.length == queue.shared.stripe_bytes
            or request.offset + request.length == queue.shared.image_bytes):
"""),)),
    Mutant("whole stripe misjudged at the device's end",
           "a write that ends where the device ends does not cover its stripe",
           (Change(QUEUE, WHOLE_STRIPE, """    elif (request.length == queue.shared.stripe_bytes
            or request.offset + request.length == queue.shared.device_bytes):
"""),)),
    Mutant("discard PRESENT without zeroing",
           "the stripe shows what was on the base before",
           (Change(QUEUE, "    elif event.op == OP_DISCARD:\n",
                   """    elif (event.op == OP_DISCARD and event.length == queue.shared.stripe_bytes
            and stripe_state(queue.shared, request.stripe) < PRESENT):
        ask(queue, tag, AWAITING_CLAIM, MSG_CLAIM, 0, actions)
    elif event.op == OP_DISCARD:
"""),
            Change(QUEUE, "        start_io(queue, tag, OVERWRITE, write_kind(request), False, actions)\n",  # noqa: E501
                   """        if request.op == OP_DISCARD:
            ask(queue, tag, AWAITING_PRESENT, MSG_WRITTEN, 0, actions)
        else:
            start_io(queue, tag, OVERWRITE, write_kind(request), False, actions)
"""))),
    Mutant("multi-stripe discard touches the first stripe only",
           "the base keeps the space of the others",
           (Change(QUEUE, "    request.position = end if stop > end else stop\n",
                   "    request.position = min(next_stripe(shared, start), end)\n"),
            Change(QUEUE, DISCARD_MORE, DISCARD_NO_MORE))),
    Mutant("a discard ends at the first cold stripe",
           "the base keeps the space of the stripes behind it",
           (Change(QUEUE, DISCARD_MORE, DISCARD_NO_MORE),)),
    Mutant("a queue's failed fdatasync sets no latch",
           "the flush after it succeeds, for data that the kernel has dropped",
           (Change(QUEUE, "        set_once_u32(queue.shared.latch, <uint32_t>-result)\n",
                   "        queue.stats.syncs += 1\n"),)),
    Mutant("the queue never looks at the latch",
           "a flush succeeds after the hydrator's fdatasync has failed",
           (Change(QUEUE, "    return load_u32(queue.shared.latch) != 0\n", "    return False\n"),)),  # noqa: E501
)

# -- an image that changes under the daemon ----------------------------------------------------

IMAGES = (
    Mutant("a read of a changed image is served",
           "read before the change or after: nobody can tell",
           (Change(QUEUE, "    if image_lost(queue.shared):\n        # Read before",
                   "    if False:\n        # Read before"),)),
    Mutant("what was read of a changed image is stored",
           "the base holds for good what the image never was",
           (Change(HYDRATOR, "    elif image_lost(hydrator.shared):\n", "    elif False:\n"),)),
    Mutant("what was not copied of a changed image is PRESENT",
           "the base has nothing of it",
           (Change(HYDRATOR, "        end_fetch(hydrator, index, -EIO, actions)\n",
                   "        end_fetch(hydrator, index, 0, actions)\n"),)),
    Mutant("who waits for a changed image waits for ever",
           "a write to a part of a cold stripe is never answered",
           (Change(HYDRATOR, "        wake(hydrator, stripe, -EIO, actions)\n", ""),)),
    Mutant("a changed image fails whole-stripe writes",
           "they need nothing of it",
           (Change(QUEUE, WHOLE_STRIPE, """    elif image_lost(queue.shared):
        complete(queue, tag, -EIO, actions)
""" + WHOLE_STRIPE),)),
    Mutant("a changed image fails reads of the base",
           "they need nothing of it",
           (Change(QUEUE, "    if stripe_state(queue.shared, request.stripe) >= PRESENT:\n"
                   "        start_io(queue, tag, READING_BASE",
                   "    if (stripe_state(queue.shared, request.stripe) >= PRESENT\n"
                   "            and not image_lost(queue.shared)):\n"
                   "        start_io(queue, tag, READING_BASE"),)),
)

# -- opening and closing -----------------------------------------------------------------------

BASES = (
    Mutant("open without fdatasync",
           "a bit that was read may be in the cache alone: a DSYNC write then hangs on nothing",
           (Change(LIFECYCLE, "        sync(lifecycle, PHASE_FIRST_SYNC, actions)\n",
                   "        transfer(lifecycle, PHASE_READ_HEAD, ACT_READ_BASE, MEM_PAGE, 0, 0, PAGE,"  # noqa: E501
                   " actions)\n"),)),
    Mutant("first fdatasync fails, and the table is gone on with",
           "stripes that the table calls PRESENT were dropped by the kernel",
           (Change(LIFECYCLE,
                   "            host(lifecycle, PHASE_LATCH_TABLE, HOST_LATCH_TABLE, actions)\n",
                   "            refuse(lifecycle, REFUSE_IO)\n"),)),
    Mutant("latch not looked at when a table is found",
           "a killed daemon's failed fdatasync is forgotten",
           (Change(LIFECYCLE,
                   "            refusal = REFUSE_LATCHED if lifecycle.found.latch != 0 else"
                   " REFUSE_NOTHING\n",
                   "            refusal = REFUSE_NOTHING\n"),)),
    Mutant("copied table accepted",
           "it knows stripes that this copy of the disk does not have",
           (Change(LIFECYCLE, """
            and a.device == b.device
            and a.inode == b.inode)""", ")"),)),
    Mutant("older table accepted",
           "it does not know what was written since",
           (Change(LIFECYCLE, "            and a.generation == b.generation\n", ""),)),
    Mutant("valid table ignored",
           "acknowledged writes are known to it alone",
           (Change(LIFECYCLE, "            lifecycle.going_on = refusal == REFUSE_NOTHING\n",
                   "            lifecycle.going_on = False\n"),)),
    Mutant("table's rows taken for durable",
           "the next power loss takes stripes that a flush was told of",
           (Change(LIFECYCLE, "            shared.state[stripe] = PRESENT\n"
                   "            shared.undurable += 1\n",
                   "            shared.state[stripe] = DURABLE\n"),)),
    Mutant("magic before zeroing",
           "stale header bits under a valid magic show what was on the base before",
           (Change(LIFECYCLE, "        sync(lifecycle, PHASE_ZERO_SYNC, actions)\n",
                   "        write_slot(lifecycle, PHASE_FIRST_SLOT, actions)\n"),
            Change(LIFECYCLE, "        sync(lifecycle, PHASE_FIRST_SLOT_SYNC, actions)\n",
                   "        write_head(lifecycle, PHASE_FIRST_HEAD, VERSION_CLOSED, actions)\n"))),
    Mutant("torn extension: one slot for all writes",
           "torn by a power loss, it leaves nothing to open by",
           (Change(LIFECYCLE, "    lifecycle.slot_index ^= 1\n    lifecycle.slot.sequence += 1\n",
                   "    lifecycle.slot_index = 0\n    lifecycle.slot.sequence += 1\n"),)),
    Mutant("torn extension: checksum not looked at",
           "half of an old slot and half of a new one are believed",
           (Change(FORMAT, " or slot.crc32c != slot_crc(slot)", ""),)),
    Mutant("table published before the base names its generation",
           "killed now, the base says closed and the table is nobody's",
           (Change(LIFECYCLE, "        fill_table(lifecycle)\n"
                   "        write_head(lifecycle, PHASE_OPEN_HEAD, VERSION_OPEN, actions)\n",
                   "        fill_table(lifecycle)\n"
                   "        host(lifecycle, PHASE_PUBLISH, HOST_PUBLISH_TABLE, actions)\n"),
            Change(LIFECYCLE, "        host(lifecycle, PHASE_PUBLISH, HOST_PUBLISH_TABLE, actions)\n"  # noqa: E501
                   "    elif phase == PHASE_PUBLISH:\n"
                   "        lifecycle.phase = PHASE_OPEN\n",
                   "        lifecycle.phase = PHASE_OPEN\n"
                   "    elif phase == PHASE_PUBLISH:\n"
                   "        write_head(lifecycle, PHASE_OPEN_HEAD, VERSION_OPEN, actions)\n"))),
    Mutant("table unlinked before the base is closed",
           "killed now, the base says open and there is no table",
           (Change(LIFECYCLE, EVENT_STOP,
                   "        host(lifecycle, PHASE_UNLINK, HOST_UNLINK_TABLE, actions)\n"),
            Change(LIFECYCLE, """        host(lifecycle, PHASE_UNLINK, HOST_UNLINK_TABLE, actions)
    else:
        ensure(phase == PHASE_UNLINK, b"a phase of closing")
        lifecycle.phase = PHASE_CLOSED
""", """        lifecycle.phase = PHASE_CLOSED
    else:
        ensure(phase == PHASE_UNLINK, b"a phase of closing")
        write_slot(lifecycle, PHASE_CLOSE_SLOT, actions)
"""))),
    Mutant("another boot's base taken for ours",
           "a table of this host is believed though another host has had the base since",
           (Change(LIFECYCLE,
                   "    cdef bint here = memcmp(lifecycle.slot.boot_id, lifecycle.options.boot_id, 16)"  # noqa: E501
                   " == 0\n", "    cdef bint here = True\n"),)),
    Mutant("a disk has grown before its size is durable",
           "a power loss takes the end of the disk",
           (Change(LIFECYCLE, "        sync(lifecycle, PHASE_GROW_SYNC, actions)\n",
                   "        lifecycle.phase = PHASE_OPEN\n"),)),
    Mutant("a disk's size forgotten when it is closed",
           "the slot of a closed disk says what it was when it was opened",
           (Change(LIFECYCLE, "    if event.kind == EVENT_START:\n",
                   "    if event.kind == EVENT_STOP:\n"
                   "        lifecycle.slot.device_bytes = lifecycle.options.device_bytes\n"
                   "    if event.kind == EVENT_START:\n"),)),
    Mutant("a disk grows over a failed fdatasync",
           "flushes succeed though the device did not keep what was written",
           (Change(LIFECYCLE, "        if phase == PHASE_GROW_SLOT:\n", "        if True:\n"),)),
)

# -- the world around the engines --------------------------------------------------------------

WORLDS = (
    Mutant("no fence: late stripe write", "it lands on a guest's newer write",
           bug=Bug.NO_FENCE_STRIPE),
    Mutant("no fence: late guest write", "it lands on a stripe that is fetched, or written, anew",
           bug=Bug.NO_FENCE_GUEST),
    Mutant("no fence: late header page", "it takes newer bits away", bug=Bug.NO_FENCE_PAGE),
    Mutant("lost doorbell never noticed", "who waits for that mail waits for ever",
           bug=Bug.LOST_DOORBELL),
    Mutant("valid table not found", "acknowledged writes are known to it alone",
           bug=Bug.TABLE_FORGOTTEN),
    Mutant("latch lost on restart", "a failed fdatasync is forgotten", bug=Bug.LATCH_FORGOTTEN),
    Mutant("table unlinked before the last commit",
           "what is PRESENT and not DURABLE is known to the table alone", bug=Bug.CLOSE_EARLY),
)

# -- what breaks no promise --------------------------------------------------------------------

HARMLESS = (
    Mutant("one header page in flight at a time", "slower, and as good",
           (Change(HYDRATOR, "and hydrator.free_page_tokens != 0:\n",
                   "and hydrator.pages_in_flight == 0:\n"),), survives=True),
    Mutant("buffers are taken from the other end", "one is as good as another",
           (Change(HYDRATOR, "memory.free_buffers[i] = memory.buffers - 1 - i\n",
                   "memory.free_buffers[i] = i\n"),), survives=True),
    Mutant("every flush joins a round", "slower, and as good",
           (Change(QUEUE, "    elif load_i64(&queue.shared.undurable) != 0:\n",
                   "    elif load_i64(&queue.shared.undurable) >= 0:\n"),), survives=True),
    Mutant("every FUA write joins a round", "slower, and as good",
           (Change(QUEUE, "        if state != DURABLE:\n            request.follows",
                   "        if state != ABSENT:\n            request.follows"),
            Change(QUEUE, "OP_WRITE_ZEROES, PRESENT, Action,",
                   "OP_WRITE_ZEROES, PRESENT, ABSENT, Action,")), survives=True),
    Mutant("hints for odd stripes are dropped", "a hint may be dropped",
           (Change(HYDRATOR, "    if hydrator.shared.state[stripe] != ABSENT:\n",
                   "    if hydrator.shared.state[stripe] != ABSENT or stripe & 1:\n"),),
           survives=True),
)

MUTANTS = ROUNDS + STRIPES + REQUESTS + IMAGES + BASES + WORLDS + HARMLESS


def main() -> None:
    """List them."""
    for mutant in MUTANTS:
        print(f"{mutant.name}: {mutant.why}{' (must survive)' if mutant.survives else ''}")


if __name__ == "__main__":
    main()

"""The hydrator engine; its states and invariants are in _hydrator.pxd."""

from libc.errno cimport EIO, ENOSPC
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from ublk_ubi._atomic cimport (
    add_i64, ensure, exchange_u32, load_i64, load_u32, set_once_u32, store_u8,
)
from ublk_ubi._core cimport (
    ABSENT, ACT_HYDRATED, ACT_READ_IMAGE, ACT_STARTED, ACT_STOPPED, ACT_SYNC_BASE, ACT_WRITE_BASE,
    ACT_ZERO_BASE, BASE_SYNCED, BASE_SYNCING, CLAIMED, DATA_OFFSET, DURABLE, EVENT_BUDGET,
    EVENT_DONE, EVENT_HYDRATE, EVENT_MESSAGE, EVENT_ROUND, EVENT_START, EVENT_STOP, EVENT_TICK,
    FETCHING, IN_ROUND, MEM_PAGE, MEM_STRIPE, MSG_CLAIM, MSG_DONE, MSG_GRANT, MSG_HYDRATE, MSG_JOIN,
    MSG_WANT, MSG_WRITTEN, NONE32, OVERWRITING, PAGE, PRESENT, QUEUED, WANTED, Action, Actions,
    Event, Shared, emit, image_lost, next_known, stripe_offset,
)
from ublk_ubi._waiting cimport (
    answer, answer_all, bucket, fifo_pop, fifo_push, has_waiter, list_append, waiter_id,
    waiting_init,
)


cdef void hydrator_init(Hydrator* hydrator, Shared* shared,
                        const HydratorMemory* memory) noexcept nogil:
    """Take over `memory`; shared.state and the shadow pages say what is DURABLE and PRESENT."""
    cdef uint32_t i
    cdef uint8_t state
    memset(hydrator, 0, sizeof(Hydrator))
    hydrator.shared = shared
    hydrator.fetches = memory.fetches
    hydrator.free_buffers = memory.free_buffers
    hydrator.buffers = memory.buffers
    # One buffer at least for each kind of asker.
    ensure(memory.buffers >= 2, b"demand and copy-on-read both need a stripe buffer")
    hydrator.reserve = memory.buffers // 4 if memory.buffers >= 4 else 1
    hydrator.background_most = memory.buffers // 2
    hydrator.backoff_ticks = 1
    for i in range(memory.buffers):
        memory.fetches[i].phase = FETCH_FREE
        memory.free_buffers[i] = memory.buffers - 1 - i
    hydrator.free_count = memory.buffers
    waiting_init(hydrator, memory)
    hydrator.pages = memory.pages
    hydrator.page_present = memory.page_present
    hydrator.page_round = memory.page_round
    hydrator.page_count = memory.page_count
    ensure(header_page(shared.image_stripes - 1) < memory.page_count,
           b"there is a shadow page for every stripe")
    hydrator.free_page_tokens = (1 << PAGE_WINDOW) - 1
    i = next_known(shared, 0)
    while i < shared.image_stripes:
        state = shared.state[i]
        if state == PRESENT:
            hydrator.page_present[header_page(i)] += 1
            hydrator.present_count += 1
            hydrator.stats.present += 1
        elif state == DURABLE:
            hydrator.stats.present += 1
            hydrator.stats.durable += 1
        else:
            ensure(state == ABSENT, b"a device opens with ABSENT, PRESENT and DURABLE stripes")
        i = next_known(shared, i + 1)
    ensure(load_i64(&shared.undurable) == hydrator.present_count,
           b"undurable counts the PRESENT stripes")


# -- stripe states -------------------------------------------------------------------------------

cdef inline void set_state(Hydrator* hydrator, uint32_t stripe, uint8_t value) noexcept nogil:
    """State and flags at once. Release: a queue that sees PRESENT sees the data's completion."""
    store_u8(&hydrator.shared.state[stripe], value)


cdef inline void set_flag(Hydrator* hydrator, uint32_t stripe, uint8_t flag) noexcept nogil:
    set_state(hydrator, stripe, hydrator.shared.state[stripe] | flag)


cdef void make_present(Hydrator* hydrator, uint32_t stripe) noexcept nogil:
    """The stripe's data is on the base, whole. Counted before it is seen: a flush that finds
    nothing undurable must be right."""
    ensure(state_of(hydrator, stripe) == FETCHING or state_of(hydrator, stripe) == OVERWRITING,
           b"a stripe becomes PRESENT out of FETCHING or OVERWRITING")
    add_i64(&hydrator.shared.undurable, 1)
    hydrator.page_present[header_page(stripe)] += 1
    hydrator.present_count += 1
    hydrator.stats.present += 1
    store_u8(&hydrator.shared.table[stripe], 1)
    set_state(hydrator, stripe, PRESENT)


# -- those that wait -----------------------------------------------------------------------------

cdef void wake(Hydrator* hydrator, uint32_t stripe, int32_t result,
               Actions* actions) noexcept nogil:
    """Answer all that wait for `stripe`, first come first served. After a failed fetch the first
    claim is granted instead, and the others wait for that."""
    cdef WaiterList* waiting = bucket(hydrator, stripe)
    cdef uint32_t node = waiting.first
    cdef uint32_t following
    waiting.first = NONE32
    while node != NONE32:
        following = hydrator.waiters[node].next
        if hydrator.waiters[node].stripe != stripe:
            list_append(hydrator, waiting, node)
        elif result >= 0 or hydrator.waiters[node].asked != MSG_CLAIM:
            hydrator.arriving -= 1
            answer(hydrator, node, MSG_GRANT, result, actions)
        elif state_of(hydrator, stripe) == ABSENT:
            set_state(hydrator, stripe, OVERWRITING)
            answer(hydrator, node, MSG_GRANT, CLAIMED, actions)
        else:
            list_append(hydrator, waiting, node)
        node = following


# -- hydration -----------------------------------------------------------------------------------

cdef void demand_stripe(Hydrator* hydrator, uint32_t stripe) noexcept nogil:
    """Queue a stripe that a request waits for, ahead of all copy-on-read."""
    cdef bint pushed
    if flagged(hydrator, stripe, QUEUED):
        return
    pushed = fifo_push(&hydrator.demand, stripe)
    ensure(pushed, b"the demand queue holds a stripe at most once, and only what a tag waits for")
    set_state(hydrator, stripe, ABSENT | QUEUED)


cdef void start_fetch(Hydrator* hydrator, uint32_t stripe, bint background,
                      Actions* actions) noexcept nogil:
    cdef uint64_t offset = stripe_offset(hydrator.shared, stripe)
    cdef uint64_t left = hydrator.shared.image_bytes - offset
    cdef uint32_t length = hydrator.shared.stripe_bytes
    cdef uint32_t index
    cdef Action* action
    ensure(state_of(hydrator, stripe) == ABSENT, b"only an ABSENT stripe is fetched")
    hydrator.free_count -= 1
    index = hydrator.free_buffers[hydrator.free_count]
    ensure(hydrator.fetches[index].phase == FETCH_FREE, b"a buffer on the free stack is free")
    hydrator.fetches[index].stripe = stripe
    hydrator.fetches[index].phase = FETCH_READ
    hydrator.fetches[index].background = background
    hydrator.background_fetches += background
    set_state(hydrator, stripe, FETCHING)
    action = emit(actions, ACT_READ_IMAGE)
    action.memory = MEM_STRIPE
    action.index = index
    action.token = index
    action.stripe = stripe
    action.offset = offset
    action.length = length
    action.minimum = length if left >= length else <uint32_t>left


cdef void start_fetches(Hydrator* hydrator, Actions* actions) noexcept nogil:
    """Give free buffers to demand first; the others leave `reserve` of them alone."""
    cdef uint32_t stripe
    if image_lost(hydrator.shared):
        fail_demand(hydrator, actions)
        return
    while hydrator.free_count > 0:
        stripe = fifo_pop(&hydrator.demand)
        if stripe == NONE32:
            break
        start_fetch(hydrator, stripe, False, actions)
    if hydrator.life != LIFE_RUNNING:
        return
    while hydrator.free_count > hydrator.reserve:
        stripe = fifo_pop(&hydrator.wanted)
        if stripe == NONE32:
            break
        # It may have been demanded, claimed or hydrated since.
        if hydrator.shared.state[stripe] == (ABSENT | WANTED):
            start_fetch(hydrator, stripe, False, actions)
    if hydrator.background:
        start_background(hydrator, actions)


cdef void fail_demand(Hydrator* hydrator, Actions* actions) noexcept nogil:
    """The image is lost: who needs it is told. A whole-stripe write needs none."""
    cdef uint32_t stripe = fifo_pop(&hydrator.demand)
    while stripe != NONE32:
        hydrator.stats.errors += 1
        set_state(hydrator, stripe, ABSENT)
        if hydrator.life == LIFE_STARTING:
            started(hydrator, -EIO, actions)
        wake(hydrator, stripe, -EIO, actions)
        stripe = fifo_pop(&hydrator.demand)


# -- background hydration ------------------------------------------------------------------------

cdef void start_background(Hydrator* hydrator, Actions* actions) noexcept nogil:
    """Copy the next stripes that nobody has asked for, as far as budget and buffers go."""
    cdef Shared* shared = hydrator.shared
    if (hydrator.retry_ticks > 0 or latched(hydrator)
            or hydrator.stats.present == shared.image_stripes):
        return
    while (hydrator.free_count > hydrator.reserve
            and hydrator.background_fetches < hydrator.background_most
            and hydrator.budget >= shared.stripe_bytes):
        while (hydrator.cursor < shared.image_stripes
                and (shared.state[hydrator.cursor] & ~<uint8_t>WANTED) != ABSENT):
            hydrator.cursor += 1
        if hydrator.cursor == shared.image_stripes:
            # What is under way may fail, and counts for this pass.
            if hydrator.background_fetches == 0:
                end_pass(hydrator)
            return
        hydrator.budget -= shared.stripe_bytes
        hydrator.cursor += 1
        start_fetch(hydrator, hydrator.cursor - 1, True, actions)


cdef void end_pass(Hydrator* hydrator) noexcept nogil:
    """What was passed over comes in the next pass: after a tick, or later each time it fails."""
    hydrator.stats.passes += 1
    hydrator.cursor = 0
    hydrator.retry_ticks = 1
    if hydrator.pass_failed > 0:
        hydrator.pass_failed = 0
        hydrator.retry_ticks = hydrator.backoff_ticks
        if hydrator.backoff_ticks < MAX_BACKOFF:
            hydrator.backoff_ticks *= 2


cdef void background_failed(Hydrator* hydrator, int32_t result) noexcept nogil:
    hydrator.pass_failed += 1
    hydrator.stats.failed += 1
    hydrator.stats.last_error = result
    if result == -ENOSPC and hydrator.retry_ticks == 0:
        # Every other stripe would fail, too, after it was read.
        end_pass(hydrator)


cdef void on_hydrate(Hydrator* hydrator, bint on, Actions* actions) noexcept nogil:
    """Begin, and with what failed before; or pause: what is in flight ends."""
    hydrator.background = on
    hydrator.cursor = 0
    hydrator.pass_failed = 0
    hydrator.retry_ticks = 0
    hydrator.backoff_ticks = 1
    start_fetches(hydrator, actions)


cdef void tick_background(Hydrator* hydrator, Actions* actions) noexcept nogil:
    if hydrator.background and hydrator.retry_ticks > 0:
        hydrator.retry_ticks -= 1
        if hydrator.retry_ticks == 0:
            hydrator.pass_failed = 0
        start_fetches(hydrator, actions)


# -- the end of a copy ---------------------------------------------------------------------------

cdef void end_fetch(Hydrator* hydrator, uint32_t index, int32_t result,
                    Actions* actions) noexcept nogil:
    cdef uint32_t stripe = hydrator.fetches[index].stripe
    hydrator.fetches[index].phase = FETCH_FREE
    hydrator.free_buffers[hydrator.free_count] = index
    hydrator.free_count += 1
    hydrator.background_fetches -= hydrator.fetches[index].background
    if result < 0:
        hydrator.stats.errors += 1
        if hydrator.fetches[index].background:
            background_failed(hydrator, result)
        set_state(hydrator, stripe, ABSENT)
        if hydrator.life == LIFE_STARTING:
            started(hydrator, result, actions)
    else:
        hydrator.stats.stripes += 1
        hydrator.stats.bytes += hydrator.shared.stripe_bytes
        make_present(hydrator, stripe)
        result = 0
    wake(hydrator, stripe, result, actions)
    start_fetches(hydrator, actions)


cdef void store_fetched(Hydrator* hydrator, uint32_t index, bint zeros,
                        Actions* actions) noexcept nogil:
    """Write what was read. A stripe of zeros is zeroed: before, anything may be on the base."""
    cdef Fetch* fetch = &hydrator.fetches[index]
    cdef Action* action = emit(actions, ACT_ZERO_BASE if zeros else ACT_WRITE_BASE)
    fetch.phase = FETCH_WRITE
    if zeros:
        hydrator.stats.zeros += 1
        action.unmap = True
        if fetch.background and hydrator.budget <= <uint64_t>-1 - hydrator.shared.stripe_bytes:
            hydrator.budget += hydrator.shared.stripe_bytes
    action.memory = MEM_STRIPE
    action.index = index
    action.token = index
    action.stripe = fetch.stripe
    action.offset = DATA_OFFSET + stripe_offset(hydrator.shared, fetch.stripe)
    action.length = hydrator.shared.stripe_bytes
    action.minimum = action.length


cdef void on_fetch_done(Hydrator* hydrator, uint32_t index, const Event* event,
                        Actions* actions) noexcept nogil:
    cdef uint8_t phase = hydrator.fetches[index].phase
    ensure(phase != FETCH_FREE, b"I/O ends only for a buffer in use")
    if phase == FETCH_WRITE or event.result < 0:
        end_fetch(hydrator, index, event.result, actions)
    elif image_lost(hydrator.shared):
        end_fetch(hydrator, index, -EIO, actions)
    else:
        store_fetched(hydrator, index, event.zeros, actions)


# -- commit rounds -------------------------------------------------------------------------------

cdef void start_sync(Hydrator* hydrator, uint8_t phase, Actions* actions) noexcept nogil:
    cdef Action* action = emit(actions, ACT_SYNC_BASE)
    # Before it begins: a write that ends from here on may not be in it.
    exchange_u32(&hydrator.shared.base, BASE_SYNCING)
    hydrator.round = phase
    action.token = hydrator.buffers + PAGE_WINDOW


cdef void take_round(Hydrator* hydrator) noexcept nogil:
    """D: every stripe that is PRESENT now."""
    cdef uint32_t page, stripe
    for page in range(hydrator.page_count):
        if hydrator.page_present[page] == 0:
            continue
        for stripe in range(page_first_stripe(page), page_end_stripe(hydrator, page)):
            if state_of(hydrator, stripe) == PRESENT:
                set_flag(hydrator, stripe, IN_ROUND)
        hydrator.page_round[page] = hydrator.page_present[page]
        hydrator.page_present[page] = 0
    hydrator.round_count = hydrator.present_count
    hydrator.present_count = 0


cdef void start_round(Hydrator* hydrator, Actions* actions) noexcept nogil:
    ensure(hydrator.round == ROUND_IDLE, b"one commit round at a time")
    ensure(hydrator.joined.first == NONE32, b"a round's joiners are answered before the next")
    # Closed first: who joins from here on is served by the next round.
    hydrator.joined = hydrator.joining
    hydrator.joining.first = NONE32
    take_round(hydrator)
    hydrator.round_result = 0
    hydrator.stop_result = 0
    hydrator.stats.rounds += 1
    start_sync(hydrator, ROUND_SYNC_DATA, actions)


cdef void set_bits(Hydrator* hydrator) noexcept nogil:
    """D's bits into the shadow pages: its data is durable."""
    cdef uint32_t page, stripe
    for page in range(hydrator.page_count):
        if hydrator.page_round[page] == 0:
            continue
        for stripe in range(page_first_stripe(page), page_end_stripe(hydrator, page)):
            if flagged(hydrator, stripe, IN_ROUND):
                hydrator.pages[header_offset(stripe)] = 1


cdef void start_pages(Hydrator* hydrator, Actions* actions) noexcept nogil:
    """Keep up to PAGE_WINDOW writes of D's pages in flight."""
    cdef uint32_t token
    cdef Action* action
    while hydrator.next_page < hydrator.page_count and hydrator.free_page_tokens != 0:
        if hydrator.page_round[hydrator.next_page] != 0:
            token = 0
            while not (hydrator.free_page_tokens >> token) & 1:
                token += 1
            hydrator.free_page_tokens &= ~(<uint32_t>1 << token)
            hydrator.pages_in_flight += 1
            hydrator.stats.pages += 1
            action = emit(actions, ACT_WRITE_BASE)
            action.memory = MEM_PAGE
            action.index = hydrator.next_page
            action.token = hydrator.buffers + token
            action.offset = <uint64_t>hydrator.next_page * PAGE
            action.length = PAGE
            action.minimum = PAGE
        hydrator.next_page += 1


cdef void end_round(Hydrator* hydrator, int32_t result, Actions* actions) noexcept nogil:
    """D is DURABLE, or as before; the joiners are answered either way."""
    cdef uint32_t page, stripe
    cdef bint good = result >= 0
    for page in range(hydrator.page_count):
        if hydrator.page_round[page] == 0:
            continue
        for stripe in range(page_first_stripe(page), page_end_stripe(hydrator, page)):
            if flagged(hydrator, stripe, IN_ROUND):
                set_state(hydrator, stripe, DURABLE if good else PRESENT)
        if not good:
            hydrator.page_present[page] += hydrator.page_round[page]
        hydrator.page_round[page] = 0
    if good:
        add_i64(&hydrator.shared.undurable, -<int32_t>hydrator.round_count)
        hydrator.stats.durable += hydrator.round_count
    else:
        hydrator.present_count += hydrator.round_count
        hydrator.stats.round_errors += 1
    hydrator.round_count = 0
    hydrator.round = ROUND_IDLE
    hydrator.stats.joined += answer_all(hydrator, &hydrator.joined, 0 if good else result, actions)
    after_round(hydrator, result, actions)


cdef void on_page_done(Hydrator* hydrator, uint32_t token, int32_t result,
                       Actions* actions) noexcept nogil:
    ensure(hydrator.round == ROUND_WRITE_PAGES and hydrator.pages_in_flight > 0,
           b"pages are written in their phase of a round only")
    ensure(not (hydrator.free_page_tokens >> token) & 1, b"a page write ends once")
    hydrator.free_page_tokens |= <uint32_t>1 << token
    hydrator.pages_in_flight -= 1
    if result < 0:
        hydrator.round_result = result
        hydrator.next_page = hydrator.page_count
    advance_pages(hydrator, actions)


cdef void advance_pages(Hydrator* hydrator, Actions* actions) noexcept nogil:
    if latched(hydrator) and hydrator.next_page < hydrator.page_count:
        # A queue's fdatasync has failed meanwhile: from then on no bit is written.
        hydrator.round_result = -EIO
        hydrator.next_page = hydrator.page_count
    start_pages(hydrator, actions)
    if hydrator.pages_in_flight > 0:
        return
    if hydrator.round_result < 0:
        # The data of D is durable, so its bits may stay in the shadow; the next round writes them.
        end_round(hydrator, hydrator.round_result, actions)
    else:
        start_sync(hydrator, ROUND_SYNC_PAGES, actions)


cdef void on_sync_done(Hydrator* hydrator, int32_t result, Actions* actions) noexcept nogil:
    ensure(hydrator.round == ROUND_SYNC_DATA or hydrator.round == ROUND_SYNC_PAGES,
           b"an fdatasync ends once")
    if result < 0:
        set_once_u32(hydrator.shared.latch, <uint32_t>-result)
    elif latched(hydrator):
        result = -EIO
    else:
        set_once_u32(&hydrator.shared.base, BASE_SYNCED)
    if result < 0 or hydrator.round == ROUND_SYNC_PAGES or hydrator.round_count == 0:
        end_round(hydrator, result, actions)
        return
    set_bits(hydrator)
    hydrator.round = ROUND_WRITE_PAGES
    hydrator.next_page = 0
    advance_pages(hydrator, actions)


cdef inline bint latched(Hydrator* hydrator) noexcept nogil:
    return load_u32(hydrator.shared.latch) != 0


cdef void commit(Hydrator* hydrator, Actions* actions) noexcept nogil:
    """No round runs: begin one if there is anything to it, or anybody waits for it."""
    if latched(hydrator):
        answer_all(hydrator, &hydrator.joining, -EIO, actions)
    elif hydrator.present_count > 0 or hydrator.joining.first != NONE32:
        start_round(hydrator, actions)


cdef void after_round(Hydrator* hydrator, int32_t result, Actions* actions) noexcept nogil:
    if latched(hydrator):
        answer_all(hydrator, &hydrator.joining, -EIO, actions)
    if hydrator.life == LIFE_STARTING and result < 0:
        started(hydrator, result, actions)
    elif hydrator.life == LIFE_STOPPING:
        hydrator.stop_result = result


# -- life: starting, running, stopping -----------------------------------------------------------

cdef void started(Hydrator* hydrator, int32_t result, Actions* actions) noexcept nogil:
    hydrator.life = LIFE_RUNNING if result >= 0 else LIFE_STOPPED
    emit(actions, ACT_STARTED).result = result


cdef void stopped(Hydrator* hydrator, int32_t result, Actions* actions) noexcept nogil:
    hydrator.life = LIFE_STOPPED
    emit(actions, ACT_STOPPED).result = result


cdef void settle(Hydrator* hydrator, Actions* actions) noexcept nogil:
    """Starting or stopping: commit when nothing is in flight, and say so when all is durable."""
    if hydrator.life != LIFE_STARTING and hydrator.life != LIFE_STOPPING:
        return
    if hydrator.round != ROUND_IDLE or hydrator.free_count < hydrator.buffers:
        return
    if latched(hydrator):
        answer_all(hydrator, &hydrator.joining, -EIO, actions)
    if round_due(hydrator):
        start_round(hydrator, actions)
    elif hydrator.stop_result < 0:
        stopped(hydrator, hydrator.stop_result, actions)
    elif latched(hydrator):
        if hydrator.life == LIFE_STARTING:
            started(hydrator, -EIO, actions)
        else:
            stopped(hydrator, -EIO, actions)
    elif hydrator.present_count > 0:
        start_round(hydrator, actions)
    elif hydrator.life == LIFE_STARTING:
        started(hydrator, 0, actions)
        # What was asked for meanwhile, and that waits for no other event.
        start_fetches(hydrator, actions)
    else:
        stopped(hydrator, 0, actions)


cdef void on_start(Hydrator* hydrator, Actions* actions) noexcept nogil:
    """Commit what a previous daemon left PRESENT, and hydrate the image's last stripe if the image
    ends inside it: no read may depend on where the image ends."""
    cdef uint32_t last = hydrator.shared.image_stripes - 1
    ensure(hydrator.life == LIFE_NEW, b"a hydrator starts once")
    hydrator.life = LIFE_STARTING
    if (hydrator.shared.image_bytes & (hydrator.shared.stripe_bytes - 1)
            and state_of(hydrator, last) == ABSENT):
        demand_stripe(hydrator, last)
        start_fetches(hydrator, actions)


# -- messages ------------------------------------------------------------------------------------

cdef void on_want(Hydrator* hydrator, uint32_t stripe) noexcept nogil:
    if hydrator.shared.state[stripe] != ABSENT:
        return
    if fifo_push(&hydrator.wanted, stripe):
        set_flag(hydrator, stripe, WANTED)
    else:
        hydrator.stats.hints_dropped += 1


cdef void on_demand(Hydrator* hydrator, uint32_t node, Actions* actions) noexcept nogil:
    cdef uint32_t stripe = hydrator.waiters[node].stripe
    if state_of(hydrator, stripe) >= PRESENT:
        answer(hydrator, node, MSG_GRANT, 0, actions)
        return
    hydrator.arriving += 1
    list_append(hydrator, bucket(hydrator, stripe), node)
    if state_of(hydrator, stripe) == ABSENT:
        demand_stripe(hydrator, stripe)


cdef void on_claim(Hydrator* hydrator, uint32_t node, Actions* actions) noexcept nogil:
    cdef uint32_t stripe = hydrator.waiters[node].stripe
    if state_of(hydrator, stripe) == ABSENT and not flagged(hydrator, stripe, QUEUED):
        hydrator.arriving += 1
        set_state(hydrator, stripe, OVERWRITING)
        answer(hydrator, node, MSG_GRANT, CLAIMED, actions)
    else:
        on_demand(hydrator, node, actions)


cdef void on_written(Hydrator* hydrator, uint32_t node, int32_t result,
                     Actions* actions) noexcept nogil:
    cdef uint32_t stripe = hydrator.waiters[node].stripe
    ensure(state_of(hydrator, stripe) == OVERWRITING, b"only a claimed stripe is reported written")
    hydrator.arriving -= 1
    if result >= 0:
        hydrator.stats.whole_stripe_writes += 1
        make_present(hydrator, stripe)
        answer(hydrator, node, MSG_DONE, 0, actions)
        wake(hydrator, stripe, 0, actions)
        return
    set_state(hydrator, stripe, ABSENT)
    answer(hydrator, node, MSG_DONE, result, actions)
    # The others did nothing wrong: the image serves them.
    if has_waiter(hydrator, stripe):
        demand_stripe(hydrator, stripe)


cdef void on_join(Hydrator* hydrator, uint32_t node, Actions* actions) noexcept nogil:
    if latched(hydrator):
        answer(hydrator, node, MSG_DONE, -EIO, actions)
        return
    list_append(hydrator, &hydrator.joining, node)


cdef void on_message(Hydrator* hydrator, const Event* event, Actions* actions) noexcept nogil:
    cdef uint32_t node = waiter_id(hydrator, event.queue, event.tag)
    ensure(event.queue < hydrator.shared.queues and event.tag < hydrator.shared.depth,
           b"a message comes from a tag of a queue")
    ensure(event.op == MSG_JOIN or event.stripe < hydrator.shared.image_stripes,
           b"only stripes of the image are hydrated")
    if event.op == MSG_WANT:
        on_want(hydrator, event.stripe)
        start_fetches(hydrator, actions)
        return
    ensure(hydrator.waiters[node].asked == 0, b"a tag asks once, and then awaits the answer")
    hydrator.waiters[node].stripe = event.stripe
    hydrator.waiters[node].asked = event.op
    if event.op == MSG_HYDRATE:
        on_demand(hydrator, node, actions)
    elif event.op == MSG_CLAIM:
        on_claim(hydrator, node, actions)
    elif event.op == MSG_WRITTEN:
        on_written(hydrator, node, event.result, actions)
    elif event.op == MSG_JOIN:
        on_join(hydrator, node, actions)
    else:
        ensure(False, b"a queue sends WANT, HYDRATE, CLAIM, WRITTEN and JOIN")
    start_fetches(hydrator, actions)


# -- the way in ----------------------------------------------------------------------------------

cdef void on_done(Hydrator* hydrator, const Event* event, Actions* actions) noexcept nogil:
    if event.token < hydrator.buffers:
        on_fetch_done(hydrator, event.token, event, actions)
    elif event.token < hydrator.buffers + PAGE_WINDOW:
        on_page_done(hydrator, event.token - hydrator.buffers, event.result, actions)
    else:
        ensure(event.token == hydrator.buffers + PAGE_WINDOW, b"a token is one that was given out")
        on_sync_done(hydrator, event.result, actions)


cdef void hydrator_step(Hydrator* hydrator, const Event* event, Actions* actions) noexcept nogil:
    """The only way in. Order of events is the caller's, but for START, which comes first."""
    if event.kind == EVENT_MESSAGE:
        on_message(hydrator, event, actions)
    elif event.kind == EVENT_DONE:
        on_done(hydrator, event, actions)
    elif event.kind == EVENT_TICK:
        if hydrator.round == ROUND_IDLE and hydrator.life == LIFE_RUNNING:
            commit(hydrator, actions)
        tick_background(hydrator, actions)
    elif event.kind == EVENT_ROUND:
        ensure(round_due(hydrator), b"a round begins once it is due")
        commit(hydrator, actions)
    elif event.kind == EVENT_BUDGET:
        hydrator.budget = event.offset
        start_fetches(hydrator, actions)
    elif event.kind == EVENT_HYDRATE:
        on_hydrate(hydrator, event.op != 0, actions)
    elif event.kind == EVENT_START:
        on_start(hydrator, actions)
    elif event.kind == EVENT_STOP:
        ensure(hydrator.life != LIFE_NEW, b"a hydrator starts before it stops")
        if hydrator.life != LIFE_STOPPED:
            hydrator.life = LIFE_STOPPING
    else:
        ensure(False, b"an event is one that the hydrator knows")
    settle(hydrator, actions)
    if (hydrator.stats.durable == hydrator.shared.image_stripes and not hydrator.hydrated
            and hydrator.life == LIFE_RUNNING):
        hydrator.hydrated = True
        emit(actions, ACT_HYDRATED)

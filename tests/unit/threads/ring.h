/* A ring in memory, one a thread. Its owner alone touches it, but for `signal` and `lost`.
 *
 * Threads must get their order from the data plane, not from here: what passes between them here is
 * relaxed, and waits on the futex by a call that ThreadSanitizer does not look into.
 */
enum { MAX_OPS = 64, MAX_CQES = 512 };

typedef struct {
    Ring *ring;
    QueueThread *queue;            /* of a queue thread; else */
    HydratorThread *hydrator;
    uint64_t random;
    Action pending[MAX_OPS];       /* kind 0: none */
    uint32_t pending_count;
    int32_t results[MAX_OPS];
    struct io_uring_cqe cqes[MAX_CQES];
    unsigned head, tail;
    uint32_t signal;               /* a doorbell has rung */
    uint32_t lost;                 /* one was to ring, and was lost */
    int dropped;                   /* the image */
    uint64_t sleeps, ticks;
} FakeRing;

static FakeRing rings[MAX_QUEUES + 1];     /* the hydrator's behind the queues' */
static void guest_turn(FakeRing *fake);

static int once_in(FakeRing *fake, uint32_t many) { return random_of(&fake->random) % many == 0; }

static void violation(const char *what, uint64_t a, uint64_t b)
{
    fprintf(stderr, "violation: %s (%llu, %llu)\n", what, (unsigned long long)a,
            (unsigned long long)b);
    _exit(3);
}

static void push(FakeRing *fake, uint8_t kind, uint32_t index, int32_t res)
{
    struct io_uring_cqe *cqe = &fake->cqes[fake->tail++ % MAX_CQES];
    if (fake->tail - fake->head > MAX_CQES)
        violation("a completion queue overflows", fake->tail, fake->head);
    cqe->user_data = (uint64_t)kind << 56 | index;
    cqe->res = res;
}

static FakeRing *fake_of(Ring *ring) { return &rings[ring->uring.ring_fd]; }

static int fake_init(Ring *ring, uint32_t entries, Op *ops, uint32_t op_count, const int *files)
{
    for (int i = 0; i <= MAX_QUEUES; i++)
        if (rings[i].ring == ring) {
            ring->uring.ring_fd = i;
            ring->uring.cq.khead = &rings[i].head;
            ring->uring.cq.ktail = &rings[i].tail;
            ring->uring.cq.cqes = rings[i].cqes;
            ring->uring.cq.ring_mask = MAX_CQES - 1;
            return op_count <= MAX_OPS ? 0 : -EINVAL;
        }
    return -ENOENT;
}

static void fake_exit(Ring *ring) {}
static void fake_arm_wake(Ring *ring, int event_fd) {}
static void fake_drop_image(Ring *ring) { fake_of(ring)->dropped = 1; }

static void fake_action(Ring *ring, const Action *action)
{
    FakeRing *fake = fake_of(ring);
    if (fake->pending[action->token].kind)
        violation("a token is used twice", action->token, action->kind);
    fake->pending[action->token] = *action;
    fake->pending_count++;
}

static int fake_op_done(Ring *ring, uint32_t token, int32_t res, int32_t *result)
{
    *result = fake_of(ring)->results[token];
    return 1;
}

static void signal_ring(FakeRing *fake)
{
    __atomic_store_n(&fake->signal, 1, __ATOMIC_RELAXED);
    syscall(SYS_futex, &fake->signal, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static void fake_doorbell(Ring *ring, int target)
{
    if (once_in(fake_of(ring), 5000) && __atomic_load_n(&losses, __ATOMIC_RELAXED) < MAX_LOSSES) {
        __atomic_fetch_add(&losses, 1, __ATOMIC_RELAXED);
        __atomic_store_n(&rings[target].lost, 1, __ATOMIC_RELAXED);
        return;
    }
    signal_ring(&rings[target]);
}

/* What a disk does; the data are plain memory, so that every access is looked at. */
static int32_t carry_out(FakeRing *fake, const Action *action)
{
    uint8_t *memory = NULL;
    int writes_data = action->kind == CORE(ACT_WRITE_BASE) && action->offset >= CORE(DATA_OFFSET);
    if (action->memory)
        memory = fake->ring->memory[action->memory].start
                 + (uint64_t)action->index * fake->ring->memory[action->memory].stride;
    if (is_faulty(&fake->random, action->kind))
        return -EIO;
    if (action->kind == CORE(ACT_READ_IMAGE) && fake->dropped)
        return -EBADF;
    if (action->kind == CORE(ACT_ZERO_BASE)) {
        memset(base + (action->offset - CORE(DATA_OFFSET)), 0, action->length);
        return 0;
    }
    if (action->kind == CORE(ACT_DISCARD_BASE)) {
        if (once_in(fake, 2))
            memset(base + (action->offset - CORE(DATA_OFFSET)), 0, action->length);
        return 0;
    }
    if (action->kind == CORE(ACT_READ_IMAGE)) {
        memcpy(memory, image + action->offset, action->minimum);
        memset(memory + action->minimum, 0, action->length - action->minimum);
    } else if (action->kind == CORE(ACT_READ_BASE)) {
        memcpy(memory, base + (action->offset - CORE(DATA_OFFSET)), action->length);
    } else if (writes_data) {
        memcpy(base + (action->offset - CORE(DATA_OFFSET)), memory, action->length);
    } else if (action->kind == CORE(ACT_WRITE_BASE)) {
        page_written(action->index, memory);
    } else if (fake->hydrator) {
        bits_synced();
    }
    return (int32_t)action->length;
}

static void complete(FakeRing *fake, uint32_t token)
{
    Action action = fake->pending[token];
    fake->pending[token].kind = 0;
    fake->pending_count--;
    fake->results[token] = carry_out(fake, &action);
    push(fake, RING(CQE_OP), token, 0);
}

/* Complete some of what is under way, in any order; one at least if there is nothing else to do. A
 * guest's read of the image is slow: by its end the image may not be needed any more, and be gone. */
static void complete_some(FakeRing *fake, int must)
{
    uint32_t start = random_of(&fake->random) % MAX_OPS;
    for (uint32_t i = 0; i < MAX_OPS; i++) {
        uint32_t token = (start + i) % MAX_OPS;
        int slow = fake->queue && fake->pending[token].kind == CORE(ACT_READ_IMAGE);
        if (fake->pending[token].kind && (must || once_in(fake, slow ? 60 : 3))) {
            complete(fake, token);
            must = 0;
        }
    }
}

static int take_signal(FakeRing *fake)
{
    if (!__atomic_exchange_n(&fake->signal, 0, __ATOMIC_RELAXED))
        return 0;
    push(fake, RING(CQE_DOORBELL), 0, 0);
    return 1;
}

static int has_mail(FakeRing *fake)
{
    for (int i = 0; i < queue_count; i++) {
        Mailbox *box = fake->queue ? &device.to_queue[i] : &device.to_hydrator[i];
        if (fake->queue && fake->queue->queue.index != i)
            continue;
        if (__atomic_load_n(&box->head, __ATOMIC_RELAXED) != __atomic_load_n(&box->tail, __ATOMIC_RELAXED))
            return 1;
    }
    return 0;
}

static int await_signal(FakeRing *fake, uint64_t timeout_ns)
{
    uint64_t now = ubi_now_ns(), end = now + timeout_ns;
    while (!take_signal(fake)) {
        struct timespec left = {(time_t)((end - now) / 1000000000u), (long)((end - now) % 1000000000u)};
        if (now >= end)
            return 0;
        syscall(SYS_futex, &fake->signal, FUTEX_WAIT_PRIVATE, 0, &left, NULL, 0);
        now = ubi_now_ns();
    }
    return 1;
}

/* Only the tick may find mail when a doorbell was lost; else the sender is about to ring. */
static void sleep_well(FakeRing *fake, uint64_t timeout_ns)
{
    int forever = timeout_ns == (uint64_t)-1;
    fake->sleeps++;
    if (await_signal(fake, forever ? PATIENCE_NS : timeout_ns))
        return;
    if (forever)
        violation("a queue that waits for no message has nothing to do", fake - rings, 0);
    fake->ticks++;
    for (uint64_t end = ubi_now_ns() + PATIENCE_NS; ubi_now_ns() < end;) {
        /* The bell that is about to be rung may be the one that gets lost. */
        if (__atomic_exchange_n(&fake->lost, 0, __ATOMIC_RELAXED) || !has_mail(fake))
            return;
        if (await_signal(fake, 10000000u))
            return;
    }
    violation("a message waits, and nobody has rung", fake - rings, fake->ticks);
}

static void fake_enter(Ring *ring, uint64_t timeout_ns)
{
    FakeRing *fake = fake_of(ring);
    if (once_in(fake, 64))
        sched_yield();
    if (fake->queue)
        guest_turn(fake);
    complete_some(fake, 0);
    if (fake->head == fake->tail && !take_signal(fake) && timeout_ns != 0) {
        if (fake->pending_count)
            complete_some(fake, 1);
        else
            sleep_well(fake, timeout_ns);
    }
}

/* The threads of a device under ThreadSanitizer: `world SECONDS SEED`.
 *
 * Queue threads and hydrator run their own loops, generated from _threads.pyx, with their own engines,
 * mailboxes and doorbells. Rings and guests are the harness's. Epoch after epoch a device is made,
 * used and stopped. Exit status: 0; 3 and a line for what a guest has found; ThreadSanitizer's own.
 */
#include <liburing.h>
#include "_threads.c"
#include "names.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    MAX_QUEUES = 3, MAX_DEPTH = 16, STRIPE = 4096, STRIPE_SECTORS = STRIPE / 512, STRIPES = 200,
    IMAGE_STRIPES = 180, IMAGE_SECTORS = IMAGE_STRIPES * STRIPE_SECTORS - 3,
    SECTORS = STRIPES * STRIPE_SECTORS, BUFFERS = 4, PAGES = 1, MAX_LOSSES = 2,
};
#define PATIENCE_NS 20000000000u

void engine_queue_init(void *queue, void *shared, uint16_t index, void *requests);
void engine_queue_step(void *queue, const void *event, void *actions);
void engine_hydrator_init(void *hydrator, void *shared, const void *memory);
void engine_hydrator_step(void *hydrator, const void *event, void *actions);
int engine_all_zero(const uint8_t *data, uint64_t length);

static Device device;
static HydratorThread hydrator;
static QueueThread queues[MAX_QUEUES];
static int queue_count, depth, faults;
static uint32_t latch, losses, calm, sync_fails_in;
static uint8_t image[STRIPES * STRIPE], base[STRIPES * STRIPE];
static uint8_t bits[IMAGE_STRIPES];        /* in header pages that were written; the hydrator's */
static uint8_t durable[IMAGE_STRIPES];     /* … and synced; relaxed, for all */

static void page_written(uint32_t page, const uint8_t *memory)
{
    for (uint32_t stripe = 0; stripe < IMAGE_STRIPES; stripe++)
        bits[stripe] = memory[14 + 2 * stripe];
}

static void bits_synced(void)
{
    for (uint32_t stripe = 0; stripe < IMAGE_STRIPES; stripe++)
        if (bits[stripe])
            __atomic_store_n(&durable[stripe], 1, __ATOMIC_RELAXED);
}

static int has_latched(void) { return __atomic_load_n(&latch, __ATOMIC_RELAXED) != 0; }

static uint64_t random_of(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state * 0x2545f4914f6cdd1du;
}

static int is_faulty(uint64_t *random, uint8_t kind)
{
    if (__atomic_load_n(&calm, __ATOMIC_RELAXED))
        return 0;
    if (kind == CORE(ACT_SYNC_BASE))
        return __atomic_load_n(&sync_fails_in, __ATOMIC_RELAXED)
               && __atomic_sub_fetch(&sync_fails_in, 1, __ATOMIC_RELAXED) == 0;
    return faults && random_of(random) % 50 == 0;
}

#include "ring.h"
#include "guest.h"

static void *take(size_t length)
{
    void *memory = calloc(1, length);
    if (!memory)
        violation("no memory", length, 0);
    return memory;
}

static uint32_t power_of_two(uint32_t least)
{
    uint32_t value = 1;
    while (value < least)
        value *= 2;
    return value;
}

/* As DataPlane does it. */
static void make_base(ThreadBase *thread, FakeRing *fake, uint32_t ops, uint32_t actions)
{
    thread->device = &device;
    thread->ops = take(ops * sizeof(Op));
    thread->op_count = ops;
    thread->actions.items = take(actions * sizeof(Action));
    thread->actions.capacity = actions;
    thread->wake_fd = -1;
    fake->ring = &thread->ring;
}

static void make_device(uint8_t cache)
{
    uint32_t tags = (uint32_t)(queue_count * depth), capacity = power_of_two(4 * (uint32_t)depth);
    device.notify_fd = -1;
    device.shared.device_bytes = STRIPES * STRIPE;
    device.shared.image_bytes = IMAGE_SECTORS * 512;
    device.shared.stripe_bytes = STRIPE;
    device.shared.stripe_shift = 12;
    device.shared.image_stripes = IMAGE_STRIPES;
    device.shared.queues = (uint16_t)queue_count;
    device.shared.depth = (uint16_t)depth;
    device.shared.copy_on_read = 1;
    device.shared.cache = cache;
    device.shared.state = take(IMAGE_STRIPES);
    device.shared.table = take(IMAGE_STRIPES);
    device.shared.latch = &latch;
    device.to_hydrator = take((size_t)queue_count * sizeof(Mailbox));
    device.to_queue = take((size_t)queue_count * sizeof(Mailbox));
    device.bells = take((size_t)(queue_count + 1) * sizeof(Doorbell));
    HydratorMemory memory = {
        .buffers = BUFFERS, .bucket_count = power_of_two(tags),
        .demand_capacity = power_of_two(tags + 1), .wanted_capacity = 16, .page_count = PAGES,
        .fetches = take(BUFFERS * sizeof(Fetch)), .free_buffers = take(BUFFERS * 4),
        .waiters = take(tags * sizeof(Waiter)), .pages = take(PAGES * 4096),
        .buckets = take(power_of_two(tags) * sizeof(WaiterList)),
        .demand = take(power_of_two(tags + 1) * 4), .wanted = take(16 * 4),
        .page_present = take(PAGES * 2), .page_round = take(PAGES * 2),
    };
    engine_hydrator_init(&hydrator.hydrator, &device.shared, &memory);
    hydrator.pages = memory.pages;
    hydrator.stripes = take(BUFFERS * STRIPE);
    make_base(&hydrator.base, &rings[queue_count], BUFFERS + 17, tags + BUFFERS + 19);
    rings[queue_count].hydrator = &hydrator;
    for (int i = 0; i < queue_count; i++) {
        QueueThread *queue = &queues[i];
        device.to_hydrator[i].mask = device.to_queue[i].mask = capacity - 1;
        device.to_hydrator[i].slots = take(capacity * sizeof(Message));
        device.to_queue[i].slots = take(capacity * sizeof(Message));
        engine_queue_init(&queue->queue, &device.shared, (uint16_t)i,
                          take((size_t)depth * sizeof(Request)));
        queue->started = take((size_t)depth * 8);
        queue->descriptors = take((size_t)depth * sizeof(struct ubi_ublk_io_desc));
        queue->buffer_stride = STRIPE;
        queue->buffers = take((size_t)depth * STRIPE);
        make_base(&queue->base, &rings[i], (uint32_t)depth + 1, (uint32_t)depth + 2);
        rings[i].queue = queue;
    }
}

static void reset(uint64_t seed)
{
    memset(&device, 0, sizeof(device));
    memset(&hydrator, 0, sizeof(hydrator));
    memset(queues, 0, sizeof(queues));
    memset(rings, 0, sizeof(rings));
    memset(guests, 0, sizeof(guests));
    memset(versions, 0, sizeof(versions));
    memset(failed_last, 0, sizeof(failed_last));
    memset(maybe_zero, 0, sizeof(maybe_zero));
    memset(busy, 0, sizeof(busy));
    memset(bits, 0, sizeof(bits));
    memset(durable, 0, sizeof(durable));
    memset(base, 0xee, sizeof(base));
    memset(image, 0xdd, sizeof(image));
    latch = calm = 0;
    queue_count = 1 + (int)(random_of(&seed) % MAX_QUEUES);
    depth = 1 << random_of(&seed) % 5;
    faults = random_of(&seed) % 3 == 0;
    sync_fails_in = random_of(&seed) % 4 == 0 ? 1 + random_of(&seed) % 40 : 0;
    for (uint32_t sector = 0; sector < SECTORS; sector++)
        fill((sector < IMAGE_SECTORS ? image : base) + sector * 512, sector, 0);
    for (uint32_t sector = IMAGE_SECTORS; sector < IMAGE_STRIPES * STRIPE_SECTORS; sector++)
        memset(base + sector * 512, 0xee, 512);
    for (int i = 0; i <= MAX_QUEUES; i++)
        rings[i].random = random_of(&seed) | 1;
}

static void *hydrator_thread(void *unused)
{
    THREADS(run_hydrator)(&hydrator);
    return NULL;
}

static void *queue_thread(void *queue)
{
    THREADS(run_queue)(queue);
    return NULL;
}

/* What a control thread does while a device runs: it begins, paces and pauses background hydration,
 * and once every stripe is durable it has all threads let go of the image, which is then another's.
 */
static uint64_t meddling;
static int drop_asked, image_gone;

static void let_go_of_the_image(void)
{
    if (!drop_asked) {
        drop_asked = 1;
        for (int i = 0; i <= queue_count; i++) {
            ThreadBase *thread = i < queue_count ? &queues[i].base : &hydrator.base;
            __atomic_store_n(&thread->drop_image, 1, __ATOMIC_RELEASE);
            signal_ring(&rings[i]);
        }
    }
    for (int i = 0; i <= queue_count; i++) {
        ThreadBase *thread = i < queue_count ? &queues[i].base : &hydrator.base;
        if (!__atomic_load_n(&thread->image_dropped, __ATOMIC_ACQUIRE))
            return;
    }
    image_gone = 1;
    memset(image, 0x77, sizeof(image));
}

static void meddle(void)
{
    if (!meddling || image_gone)
        return;
    if (__atomic_load_n(&hydrator.hydrated, __ATOMIC_ACQUIRE)) {
        let_go_of_the_image();
    } else if (random_of(&meddling) % 16 == 0) {
        uint64_t lot = random_of(&meddling);
        __atomic_store_n(&hydrator.rate, lot % 4 ? 0 : 1 << 20, __ATOMIC_RELEASE);
        __atomic_store_n(&hydrator.hydrate, lot % 5 != 0, __ATOMIC_RELEASE);
        __atomic_store_n(&hydrator.kicks, hydrator.kicks + 1, __ATOMIC_RELEASE);
        signal_ring(&rings[queue_count]);
    }
}

static void await_state(ThreadBase *thread, uint32_t wanted)
{
    for (int i = 0; __atomic_load_n(&thread->state, __ATOMIC_ACQUIRE) < wanted; i++) {
        if (i > 600000)
            violation("a thread does not get on", wanted, thread - &queues[0].base);
        if (wanted == THREAD(THREAD_STOPPED))
            meddle();
        usleep(100);
    }
    if (thread->state == THREAD(THREAD_FAILED))
        violation("a thread fails", (uint64_t)-thread->status, 0);
}

/* All is as its owner knows it, and committed unless an fdatasync failed. */
static void check_end(void)
{
    for (uint32_t stripe = 0; stripe < IMAGE_STRIPES; stripe++) {
        /* A hint that nobody had time for is none of the guest's business. */
        uint8_t state = device.shared.state[stripe] & ~CORE(WANTED);
        if (state != (device.shared.table[stripe] ? CORE(DURABLE) : CORE(ABSENT)) && !latch)
            violation("a stripe is in no state to end in", stripe, state);
        if (state == CORE(DURABLE) && !durable[stripe])
            violation("a stripe is DURABLE, its bit is not", stripe, 0);
    }
    if (device.shared.undurable != 0 && !latch)
        violation("stripes are not durable after a clean stop", (uint64_t)device.shared.undurable, 0);
    for (uint32_t sector = 0; sector < SECTORS; sector++) {
        uint32_t stripe = sector / STRIPE_SECTORS;
        int here = stripe >= IMAGE_STRIPES || device.shared.table[stripe];
        const uint8_t *at = here ? base + sector * 512 : image + sector * 512;
        if (!here && sector >= IMAGE_SECTORS)
            violation("the image's last stripe is cold", sector, 0);
        if (!is_legal(at, sector))
            violation("the disk holds what was never written there", sector, versions[sector]);
    }
}

static uint64_t totals[12];

static void epoch(uint64_t seed, uint32_t requests)
{
    pthread_t threads[MAX_QUEUES + 1];
    reset(seed);
    make_device((uint8_t)(seed % 3));
    /* A hydrated device's queues have little to say: in half of the epochs it is left alone. */
    meddling = seed >> 8 & 1 ? seed | 1 : 0;
    drop_asked = image_gone = 0;
    calm = 1;                      /* a fault while it starts means that it does not start */
    pthread_create(&threads[queue_count], NULL, hydrator_thread, NULL);
    await_state(&hydrator.base, THREAD(THREAD_LIVE));
    __atomic_store_n(&calm, 0, __ATOMIC_RELAXED);
    for (int i = 0; i < queue_count; i++) {
        guests[i].left = requests;
        pthread_create(&threads[i], NULL, queue_thread, &queues[i]);
    }
    for (int i = 0; i < queue_count; i++) {
        await_state(&queues[i].base, THREAD(THREAD_STOPPED));
        pthread_join(threads[i], NULL);
    }
    __atomic_store_n(&calm, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&hydrator.base.stop, 1, __ATOMIC_RELEASE);
    signal_ring(&rings[queue_count]);
    await_state(&hydrator.base, THREAD(THREAD_STOPPED));
    pthread_join(threads[queue_count], NULL);
    if (hydrator.base.status < 0 && !latch)
        violation("a stop fails on sound disks", (uint64_t)-hydrator.base.status, 0);
    check_end();
    for (int i = 0; i < queue_count; i++) {
        totals[0] += guests[i].reads;
        totals[1] += guests[i].writes;
        totals[2] += guests[i].flushes;
        totals[3] += guests[i].failures;
    }
    totals[4] += hydrator.hydrator.stats.stripes;
    totals[5] += hydrator.hydrator.stats.whole_stripe_writes;
    totals[6] += hydrator.hydrator.stats.rounds;
    for (int i = 0; i <= queue_count; i++)
        totals[7] += rings[i].sleeps;
    for (int i = 0; i < queue_count; i++) {
        totals[8] += guests[i].zeroed;
        totals[9] += guests[i].discards;
    }
    totals[10] += hydrator.hydrator.stats.zeros;
    totals[11] += (uint64_t)image_gone;
}

int main(int argc, char **argv)
{
    static const char *names[] = {"reads", "writes", "flushes", "failures", "stripes hydrated",
                                  "whole stripes", "rounds", "sleeps", "zeroed", "discards",
                                  "stripes of zeros", "images let go of"};
    uint64_t end = ubi_now_ns() + (uint64_t)(atof(argv[1]) * 1e9), seed = strtoull(argv[2], NULL, 0);
    uint64_t epochs = 0;
    __pyx_f_8ublk_ubi_6_queue_queue_step = (void *)engine_queue_step;
    __pyx_f_8ublk_ubi_9_hydrator_hydrator_step = (void *)engine_hydrator_step;
    RING_CALL(ring_init) = fake_init;
    RING_CALL(ring_exit) = fake_exit;
    RING_CALL(ring_action) = fake_action;
    RING_CALL(ring_op_done) = fake_op_done;
    RING_CALL(ring_ublk) = fake_ublk;
    RING_CALL(ring_doorbell) = fake_doorbell;
    RING_CALL(ring_arm_wake) = fake_arm_wake;
    RING_CALL(ring_enter) = fake_enter;
    RING_CALL(ring_drop_image) = fake_drop_image;
    __pyx_f_8ublk_ubi_7_format_all_zero = (void *)engine_all_zero;
    for (; epochs < 80 || ubi_now_ns() < end; epochs++)
        epoch(seed * 1000003 + epochs * 0x9e3779b97f4a7c15u + 1, epochs % 2 ? 1500 : 300);
    printf("epochs %llu, doorbells lost %u", (unsigned long long)epochs, losses);
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
        printf(", %s %llu", names[i], (unsigned long long)totals[i]);
    printf("\n");
    return 0;
}

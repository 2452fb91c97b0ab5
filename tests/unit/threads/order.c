/* Mailboxes and doorbells in every order that C's memory model allows: `order`.
 *
 * The functions are those that Cython has generated from _mailbox.pxd and _threads.pyx; the atomic
 * operations beneath them are a model. Each location has a history; a thread has seen some of it; a
 * load may return anything that is not older than what its thread has seen; what is released carries
 * along what its writer had seen; only a fence makes two threads agree on an order. Threads are
 * coroutines that may change places at every atomic operation, up to a number of times.
 *
 * It must never come to pass that a receiver sleeps, has mail, and nobody has rung or will ring.
 * Exit status: 0; 3 and a line when it has.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define UBI_ATOMIC_H
#define ubi_load(p) ((__typeof__(*(p)))model_load((p), sizeof(*(p)), 1))
#define ubi_peek(p) ((__typeof__(*(p)))model_load((p), sizeof(*(p)), 0))
#define ubi_store(p, v) model_write((p), sizeof(*(p)), (uint64_t)(v), 0)
#define ubi_exchange(p, v) ((__typeof__(*(p)))model_write((p), sizeof(*(p)), (uint64_t)(v), 1))
#define ubi_add(p, v) (abort(), (v))
#define ubi_set_once(p, v) abort()
#define ubi_fence() model_fence()
#define ubi_ensure(ok, what) do { if (!(ok)) violation((what)); } while (0)

enum { MAX_THREADS = 3, MAX_PLACES = 16, MAX_HISTORY = 64, MAX_CHOICES = 400 };

typedef struct { uint8_t seen[MAX_PLACES]; } View;
typedef struct { uint64_t value; View view; } Write;
typedef struct {
    const volatile void *address;
    Write history[MAX_HISTORY];
    int last;
} Place;

static Place places[MAX_PLACES];
static int place_count;

typedef struct {
    ucontext_t context;
    View view;
    int done, asleep;
    void (*body)(void);
    char stack[64 << 10];
} Coroutine;

static Coroutine coroutines[MAX_THREADS];
static ucontext_t scheduler;
static View fences;
static int running, coroutine_count, changes_left;
static int path[MAX_CHOICES], options[MAX_CHOICES], path_length, step;

static void violation(const char *what)
{
    fprintf(stderr, "violation: %s\n", what);
    exit(3);
}

/* One of n, every one in its turn: the path through all choices is gone through depth first. */
static int choose(int n)
{
    if (n == 1)
        return 0;
    if (step == MAX_CHOICES)
        violation("the model is too large");
    if (step == path_length)
        path[path_length++] = 0;
    options[step] = n;
    return path[step++];
}

static int next_path(void)
{
    while (path_length && path[path_length - 1] + 1 == options[path_length - 1])
        path_length--;
    if (!path_length)
        return 0;
    path[path_length - 1]++;
    return 1;
}

static int can_run(int number) { return !coroutines[number].done && !coroutines[number].asleep; }

static void join(View *into, const View *other)
{
    for (int i = 0; i < place_count; i++)
        if (into->seen[i] < other->seen[i])
            into->seen[i] = other->seen[i];
}

static void change_places(void) { swapcontext(&coroutines[running].context, &scheduler); }

/* Before every atomic operation another one may come first. */
static void may_change(void)
{
    int others[MAX_THREADS], count = 0, chosen;
    for (int i = 0; i < coroutine_count; i++)
        if (i != running && can_run(i))
            others[count++] = i;
    if (!changes_left || !count)
        return;
    chosen = choose(count + 1);
    if (chosen) {
        changes_left--;
        coroutines[running].asleep = 2;    /* gives way, this once */
        change_places();
    }
}

static int place_of(const volatile void *address)
{
    for (int i = 0; i < place_count; i++)
        if (places[i].address == address)
            return i;
    if (place_count == MAX_PLACES)
        violation("more places than the model has");
    memset(&places[place_count], 0, sizeof(Place));
    places[place_count].address = address;
    return place_count++;
}

static uint64_t model_load(const volatile void *address, size_t size, int acquire)
{
    View *view = &coroutines[running].view;
    int at;
    may_change();
    at = place_of(address);
    int newest = places[at].last;
    int taken = newest - choose(newest - view->seen[at] + 1);
    view->seen[at] = (uint8_t)taken;
    if (acquire)
        join(view, &places[at].history[taken].view);
    return places[at].history[taken].value;
}

/* Release; an exchange reads the newest value and acquires what it carries. */
static uint64_t model_write(volatile void *address, size_t size, uint64_t value, int exchange)
{
    View *view = &coroutines[running].view;
    int at;
    may_change();
    at = place_of(address);
    Place *place = &places[at];
    uint64_t old = place->history[place->last].value;
    if (exchange)
        join(view, &place->history[place->last].view);
    if (place->last + 1 == MAX_HISTORY)
        violation("more writes than the model has room for");
    view->seen[at] = (uint8_t)++place->last;
    place->history[place->last].value = value;
    place->history[place->last].view = *view;
    memcpy((void *)address, &value, size);     /* for what reads its own variable without ado */
    return old;
}

static void model_fence(void)
{
    may_change();
    join(&coroutines[running].view, &fences);
    fences = coroutines[running].view;
}

#include "_threads.c"
#include "names.h"

/* -- the scene: one receiver, one sender or two ---------------------------------------------------- */

enum { RECEIVER = 0, MESSAGES = 2 };

static Device device;
static Message slots[4][8];
static Mailbox to_hydrator[2], to_queue[1];
static Doorbell bells[3];
static QueueThread queues[2];
static HydratorThread hydrator;
static Action actions[1];
static int rung, received, expected, sent_by[2];
static View rung_view;

static void receive(void *engine, const Event *event, Actions *unused)
{
    received++;
}

static int init_is_not_called(Ring *ring, uint32_t entries, Op *ops, uint32_t count, const int *files)
{
    violation("ring_init");
    return -1;
}

/* Sleep until somebody rings; a call into the kernel and the wake-up out of it are in order. */
static void enter(Ring *ring, uint64_t timeout_ns)
{
    if (timeout_ns == 0)
        return;
    while (!rung) {
        coroutines[running].asleep = 1;
        change_places();
    }
    rung = 0;
    join(&coroutines[running].view, &rung_view);
}

static void ring(Ring *unused, int target)
{
    rung = 1;
    rung_view = coroutines[running].view;
    if (coroutines[RECEIVER].asleep == 1)
        coroutines[RECEIVER].asleep = 0;
}

static void queue_receives(void)
{
    while (received < expected) {
        THREADS(queue_wait)(&queues[0], &bells[0]);
        THREADS(queue_messages)(&queues[0]);
    }
}

static void hydrator_receives(void)
{
    while (received < expected) {
        THREADS(hydrator_wait)(&hydrator, &bells[device.shared.queues]);
        THREADS(hydrator_messages)(&hydrator);
    }
}

static Action message(void)
{
    Action action;
    memset(&action, 0, sizeof(action));
    action.message = CORE(MSG_JOIN);
    return action;
}

/* A turn of the hydrator for each message, and one for two. */
static void hydrator_sends(void)
{
    Action action = message();
    for (int turn = 0; turn < MESSAGES; turn++) {
        THREADS(put)(&to_queue[0], &action);
        THREADS(ring_bell)(&hydrator.base, &to_queue[0], &bells[0]);
    }
}

static void hydrator_sends_at_once(void)
{
    Action action = message();
    for (int i = 0; i < MESSAGES; i++)
        THREADS(put)(&to_queue[0], &action);
    THREADS(ring_bell)(&hydrator.base, &to_queue[0], &bells[0]);
}

static void queue_sends(void)
{
    QueueThread *queue = &queues[running - 1];
    Action action = message();
    for (int i = 0; i < expected / (coroutine_count - 1); i++) {
        THREADS(send_to_hydrator)(queue, &action);
        THREADS(ring_bell)(&queue->base, &to_hydrator[queue->queue.index],
                           &bells[device.shared.queues]);
    }
}

typedef struct {
    const char *name;
    void (*receiver)(void), (*sender)(void);
    int senders, messages, changes;
} Scene;

static const Scene scenes[] = {
    {"messages to a queue in one turn", queue_receives, hydrator_sends_at_once, 1, MESSAGES, 5},
    {"messages to a queue, each in a turn", queue_receives, hydrator_sends, 1, MESSAGES, 4},
    {"a message to the hydrator, any order", hydrator_receives, queue_sends, 1, 1, 100},
    {"messages to the hydrator", hydrator_receives, queue_sends, 1, 2, 4},
    {"two queues to the hydrator", hydrator_receives, queue_sends, 2, 2, 2},
};

static void start(void)
{
    coroutines[running].body();
    coroutines[running].done = 1;
    change_places();
}

static void reset(const Scene *scene)
{
    memset(&device, 0, sizeof(device));
    memset(queues, 0, sizeof(queues));
    memset(&hydrator, 0, sizeof(hydrator));
    memset(bells, 0, sizeof(bells));
    memset(&fences, 0, sizeof(fences));
    memset(slots, 0, sizeof(slots));
    place_count = step = rung = received = 0;
    expected = scene->messages;
    changes_left = scene->changes;
    device.shared.queues = (uint16_t)scene->senders;
    device.to_hydrator = to_hydrator;
    device.to_queue = to_queue;
    device.bells = bells;
    for (int i = 0; i < 2; i++) {
        to_hydrator[i] = (Mailbox){.mask = 7, .slots = slots[i]};
        queues[i].base.device = &device;
        queues[i].queue.index = (uint16_t)i;
        queues[i].queue.depth = 2;
        queues[i].queue.awaiting = 1;
        queues[i].base.actions.items = actions;
    }
    to_queue[0] = (Mailbox){.mask = 7, .slots = slots[2]};
    hydrator.base.device = &device;
    hydrator.base.actions.items = actions;
    hydrator.next_tick = (uint64_t)-1;
    coroutine_count = 1 + scene->senders;
    for (int i = 0; i < coroutine_count; i++) {
        Coroutine *coroutine = &coroutines[i];
        memset(&coroutine->view, 0, sizeof(View));
        coroutine->done = coroutine->asleep = 0;
        coroutine->body = i == RECEIVER ? scene->receiver : scene->sender;
        getcontext(&coroutine->context);
        coroutine->context.uc_stack.ss_sp = coroutine->stack;
        coroutine->context.uc_stack.ss_size = sizeof(coroutine->stack);
        coroutine->context.uc_link = NULL;
        makecontext(&coroutine->context, start, 0);
    }
}

/* One run through a scene, as the path says. */
static void play(void)
{
    for (;;) {
        int ready[MAX_THREADS], count = 0, gave_way = -1;
        for (int i = 0; i < coroutine_count; i++) {
            if (coroutines[i].asleep == 2) {
                coroutines[i].asleep = 0;
                gave_way = i;
            } else if (can_run(i)) {
                ready[count++] = i;
            }
        }
        if (!count && gave_way >= 0)
            ready[count++] = gave_way;
        if (!count)
            break;
        running = ready[choose(count)];
        swapcontext(&scheduler, &coroutines[running].context);
    }
    for (int i = 0; i < coroutine_count; i++)
        if (!coroutines[i].done)
            violation("a receiver sleeps, has mail, and nobody rings");
    if (received != expected)
        violation("a message is lost");
}

int main(void)
{
    __pyx_f_8ublk_ubi_6_queue_queue_step = (void *)receive;
    __pyx_f_8ublk_ubi_9_hydrator_hydrator_step = (void *)receive;
    RING_CALL(ring_init) = init_is_not_called;
    RING_CALL(ring_enter) = enter;
    RING_CALL(ring_doorbell) = ring;
    for (size_t i = 0; i < sizeof(scenes) / sizeof(*scenes); i++) {
        unsigned long orders = 0;
        path_length = 0;
        do {
            reset(&scenes[i]);
            play();
            orders++;
        } while (next_path());
        printf("%s: %lu orders\n", scenes[i].name, orders);
    }
    return 0;
}

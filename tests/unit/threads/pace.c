/* When the hydrator's thread lets a round begin that is due: `pace`. Exit status 0, or 3 and a line. */
#include "_threads.c"
#include "names.h"

#include <stdio.h>
#include <stdlib.h>

enum { ROUND_NS = 100000, NEVER = 1 << 30 };
static HydratorThread hydrator;
static uint64_t now = 1000000000;
static int began;

static void step(void *engine, const Event *event, void *actions)
{
    began = event->kind == CORE(EVENT_ROUND);
    hydrator.hydrator.joining.first = CORE(NONE32);
    hydrator.hydrator.round = began ? 1 : 0;
}

/* One joins while `arriving` wait for stripes; how long the round is held back, looked at each µs. */
static uint64_t held_back(uint32_t arriving)
{
    uint64_t joined = now;
    began = 0;
    hydrator.hydrator.joining.first = 0;
    hydrator.hydrator.arriving = arriving;
    for (; !began && now - joined < NEVER; now += began ? 0 : 1000)
        THREADS(pace_rounds)(&hydrator, now);
    return now - joined;
}

/* … and the round takes so long. */
static void take(uint64_t ns)
{
    now += ns;
    hydrator.hydrator.round = 0;
    THREADS(pace_rounds)(&hydrator, now);
}

static void expect(const char *what, uint64_t found, uint64_t least, uint64_t most)
{
    if (found < least || found > most) {
        fprintf(stderr, "violation: %s: %llu ns\n", what, (unsigned long long)found);
        exit(3);
    }
}

int main(void)
{
    __pyx_f_8ublk_ubi_9_hydrator_hydrator_step = (void *)step;
    hydrator.hydrator.joining.first = CORE(NONE32);
    THREADS(pace_rounds)(&hydrator, now);
    expect("nothing is due, and a round begins", (uint64_t)began, 0, 0);
    for (int i = 0; i < 40; i++) {
        expect("a lone writer is held back", held_back(0), 0, 0);
        take(ROUND_NS);
    }
    expect("a round is held back as long as rounds take", held_back(1), 3 * ROUND_NS, 5 * ROUND_NS);
    for (int i = 0; i < 40; i++) {
        take(100 * ROUND_NS);
        held_back(0);
    }
    take(100 * ROUND_NS);
    expect("a round is held back too long", held_back(1), 1000000, 5001000);
    return 0;
}

/* The hydrator's entry points: its functions are static in the file that Cython generates. */
#include "_hydrator.c"

void engine_hydrator_init(void *hydrator, void *shared, const void *memory)
{
    __pyx_f_8ublk_ubi_9_hydrator_hydrator_init(hydrator, shared, memory);
}

void engine_hydrator_step(void *hydrator, const void *event, void *actions)
{
    __pyx_f_8ublk_ubi_9_hydrator_hydrator_step(hydrator, event, actions);
}

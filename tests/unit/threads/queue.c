/* The queue engine's entry points: its functions are static in the file that Cython generates. */
#include "_queue.c"

void engine_queue_init(void *queue, void *shared, uint16_t index, void *requests)
{
    __pyx_f_8ublk_ubi_6_queue_queue_init(queue, shared, index, requests);
}

void engine_queue_step(void *queue, const void *event, void *actions)
{
    __pyx_f_8ublk_ubi_6_queue_queue_step(queue, event, actions);
}

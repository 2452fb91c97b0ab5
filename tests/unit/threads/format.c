/* What the threads use of the format: its functions are static in the file that Cython generates. */
#include "_format.c"

int engine_all_zero(const uint8_t *data, uint64_t length)
{
    return __pyx_f_8ublk_ubi_7_format_all_zero(data, length);
}

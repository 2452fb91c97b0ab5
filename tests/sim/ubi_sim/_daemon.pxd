"""A daemon's life: the base is opened as an operator would, served, grown, closed; or it is killed.

A refusal must be the one that the base's state asks for, and must not have written anything. What
an operator may accept (a latch, tables of another host, a lost /run) is then forced, and counts as
a power loss. An opening that fails for an injected error is tried again without errors.
"""

from libc.stdint cimport uint8_t

from ublk_ubi._lifecycle cimport LifecycleOptions
from ubi_sim._model cimport World

# Until the device is live. False: halted, or a refusal that cannot be helped.
cdef bint daemon_up(World* world) noexcept nogil
# The lifecycle engine alone, on these options; leaves its phase for all to see.
cdef void daemon_open(World* world, const LifecycleOptions* options) noexcept nogil
# The disk grows, whatever else is under way.
cdef void daemon_grow(World* world) noexcept nogil
# A clean stop. True if the base is closed.
cdef bint daemon_stop(World* world) noexcept nogil
# The process is gone. Its writes land, or not, before a new one opens the base (the fence).
cdef void daemon_killed(World* world) noexcept nogil

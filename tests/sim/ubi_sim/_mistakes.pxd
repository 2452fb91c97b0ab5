"""Openings that must be refused: wrong options, damaged metadata, tables that are not the base's.

Each is made on the world as it is, and taken back. A refusal must be the right one and must leave
base and tables as they were; --force and --force-stale must then open what they are meant for.
"""

from ubi_sim._model cimport World

# Make one, if this base lends itself to it; `saved` is room for a copy of the world.
cdef void make_mistake(World* world, World* saved) noexcept nogil

"""The data plane's threads without Python: the generated C of the queue, the hydrator, their loops.

    build       Cython's C of the sources, as they are or with a planted bug, linked with these
    names.h     short names for what Cython has generated
    queue.c     the queue engine's entry points, out of its own C file
    hydrator.c  the same of the hydrator
    world.c     main: threads under ThreadSanitizer, with
    ring.h        a ring that completes I/O on memory, at random, with no synchronisation of its own
    guest.h       guests that know what every sector must hold
    order.c     main: mailboxes and doorbells in every order that the memory model allows
    pace.c      main: when a commit round begins that is due, by the clock
"""

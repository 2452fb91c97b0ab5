"""One queue over stripes of every kind, and the guest, disks and hydrator that speak to it."""

from __future__ import annotations

import errno

from ublk_ubi import _testing as t

KIB = 1 << 10
STRIPE = 64 * KIB
DEPTH = 4
STRIPES = 4
IMAGE_BYTES = STRIPES * STRIPE
DEVICE_BYTES = 2 * IMAGE_BYTES
TAG = 1
SYNC_TOKEN = DEPTH
READ, WRITE, FLUSH = t.OP_READ, t.OP_WRITE, t.OP_FLUSH
DISCARD, ZEROES = t.OP_DISCARD, t.OP_WRITE_ZEROES
EIO = errno.EIO
UNALIGNED = 4 * KIB                # where a partial write of these tests begins in its stripe
PART = 8 * KIB
# Stripes of `engine()`, by their state.
COLD, HAS_DATA, COMMITTED = 0, 1, 2


def engine(*, copy_on_read: bool = True, clean: bool = False, dsync_mask: int = 0,
           cache: int = t.CACHE_WRITEBACK) -> t.Engines:
    """Make one queue over a cold, a PRESENT and a DURABLE stripe; `clean`: nothing is PRESENT."""
    return t.Engines(stripes=STRIPES, depth=DEPTH, stripe_bytes=STRIPE, copy_on_read=copy_on_read,
                     cache=cache, present=() if clean else (HAS_DATA,), durable=(COMMITTED,),
                     dsync_mask=dsync_mask)


def submit(e: t.Engines, op: int, stripe: int = 0, at: int = 0, length: int = PART, *,
           tag: int = TAG, fua: bool = False, unmap: bool = False) -> list[t.Act]:
    """Send a request; where it is counts from the stripe's start."""
    if op == FLUSH:
        # What the kernel's descriptor holds: start sector 2^64 − 1, shifted to bytes.
        at, length, stripe = ((1 << 64) - 1) << 9 & ((1 << 64) - 1), 0, 0
    return e.queue_step(0, t.EVENT_REQUEST, op=op, tag=tag, fua=int(fua), unmap=int(unmap),
                        offset=stripe * STRIPE + at, length=length)


def ended(e: t.Engines, result: int, token: int = TAG) -> list[t.Act]:
    """End an action."""
    return e.queue_step(0, t.EVENT_DONE, token=token, result=result)


def told(e: t.Engines, message: int, result: int = 0, tag: int = TAG) -> list[t.Act]:
    """Speak as the hydrator does."""
    return e.queue_step(0, t.EVENT_MESSAGE, op=message, tag=tag, result=result)

"""The actions of the engines, whole: what a test expects is compared field by field."""

from __future__ import annotations

from ublk_ubi import _testing as t

_NOTHING = dict.fromkeys(t.Act._fields, 0)


def act(kind: int, **fields: int) -> t.Act:
    """Give an action of a kind; all fields that are not named are zero."""
    return t.Act(**(_NOTHING | {"kind": kind} | fields))


# -- of a queue -----------------------------------------------------------------------------------


def request_io(kind: int, tag: int, offset: int, length: int, *, dsync: bool = False) -> t.Act:
    """Move a request's data; `offset` is where it is in image or base."""
    return act(kind, memory=t.MEM_REQUEST, index=tag, token=tag, tag=tag, offset=offset,
               length=length, minimum=length, dsync=int(dsync))


def read_image(tag: int, offset: int, length: int) -> t.Act:
    """Image → request, from a byte of the device."""
    return request_io(t.ACT_READ_IMAGE, tag, offset, length)


def read_base(tag: int, offset: int, length: int) -> t.Act:
    """Base → request, from a byte of the device."""
    return request_io(t.ACT_READ_BASE, tag, t.DATA_OFFSET + offset, length)


def write_base(tag: int, offset: int, length: int, *, dsync: bool = False) -> t.Act:
    """Request → base, to a byte of the device."""
    return request_io(t.ACT_WRITE_BASE, tag, t.DATA_OFFSET + offset, length, dsync=dsync)


def zero_base(tag: int, offset: int, length: int, *, unmap: bool = True) -> t.Act:
    """Make a range of the base read zeros, from a byte of the device."""
    return request_io(t.ACT_ZERO_BASE, tag, t.DATA_OFFSET + offset, length)._replace(
        unmap=int(unmap))


def discard_base(tag: int, offset: int, length: int) -> t.Act:
    """Give up a range of the base, from a byte of the device."""
    return act(t.ACT_DISCARD_BASE, token=tag, tag=tag, offset=t.DATA_OFFSET + offset, length=length)


def ask(message: int, tag: int, stripe: int = 0, *, queue: int = 0, result: int = 0) -> t.Act:
    """Send a message, either way."""
    return act(t.ACT_SEND, message=message, queue=queue, tag=tag, stripe=stripe, result=result)


def complete(tag: int, result: int) -> t.Act:
    """End a request."""
    return act(t.ACT_COMPLETE, tag=tag, result=result)


def sync(token: int) -> t.Act:
    """Make the base durable."""
    return act(t.ACT_SYNC_BASE, token=token)


# -- of the hydrator ------------------------------------------------------------------------------


def fetch(buffer: int, stripe: int, stripe_bytes: int, minimum: int | None = None) -> t.Act:
    """Image → stripe buffer."""
    return act(t.ACT_READ_IMAGE, memory=t.MEM_STRIPE, index=buffer, token=buffer, stripe=stripe,
               offset=stripe * stripe_bytes, length=stripe_bytes,
               minimum=stripe_bytes if minimum is None else minimum)


def store(buffer: int, stripe: int, stripe_bytes: int) -> t.Act:
    """Stripe buffer → base."""
    return act(t.ACT_WRITE_BASE, memory=t.MEM_STRIPE, index=buffer, token=buffer, stripe=stripe,
               offset=t.DATA_OFFSET + stripe * stripe_bytes, length=stripe_bytes,
               minimum=stripe_bytes)


def store_zeros(buffer: int, stripe: int, stripe_bytes: int) -> t.Act:
    """Make a stripe of the base read zeros."""
    return store(buffer, stripe, stripe_bytes)._replace(kind=t.ACT_ZERO_BASE, unmap=1)


def write_page(token: int, page: int) -> t.Act:
    """Shadow page → base."""
    return act(t.ACT_WRITE_BASE, memory=t.MEM_PAGE, index=page, token=token, offset=page * t.PAGE,
               length=t.PAGE, minimum=t.PAGE)


def grant(tag: int, stripe: int, result: int = 0, *, queue: int = 0) -> t.Act:
    """Answer a request for a stripe."""
    return ask(t.MSG_GRANT, tag, stripe, queue=queue, result=result)


def done(tag: int, stripe: int = 0, result: int = 0, *, queue: int = 0) -> t.Act:
    """Answer a joiner, or who wrote a stripe."""
    return ask(t.MSG_DONE, tag, stripe, queue=queue, result=result)

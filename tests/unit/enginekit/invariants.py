"""What holds of the engines between any two steps (_hydrator.pxd, _core.pxd)."""

from __future__ import annotations

from ublk_ubi import _testing as t

HEADERS_OFFSET = 14
STATES = (t.ABSENT, t.FETCHING, t.OVERWRITING, t.PRESENT, t.DURABLE)
# A stripe's byte, flags and all.
ALLOWED = {*STATES, t.PRESENT | t.IN_ROUND, t.ABSENT | t.WANTED, t.ABSENT | t.QUEUED}


def _table(wanted: set[int]) -> bytes:
    """Make a translation of the bytes in `wanted` to 1, and of all others to 0."""
    return bytes(byte in wanted for byte in range(256))


_HAS_DATA = _table({byte for byte in range(256) if byte & t.STATE_MASK >= t.PRESENT})
_DURABLE = _table({t.DURABLE})
_IN_ROUND = _table({t.PRESENT | t.IN_ROUND})
_FETCHING = _table({t.FETCHING})
_NOT_ZERO = _table(set(range(1, 256)))


def _where(flags: bytes) -> list[int]:
    """Give the indices of the ones."""
    found, at = [], flags.find(1)
    while at >= 0:
        found.append(at)
        at = flags.find(1, at + 1)
    return found


def durable(e: t.Engines) -> set[int]:
    """Give the stripes that are DURABLE."""
    return set(_where(e.state_bytes.translate(_DURABLE)))


def in_round(e: t.Engines) -> set[int]:
    """Give the stripes of the running round."""
    return set(_where(e.state_bytes.translate(_IN_ROUND)))


def header_bits(e: t.Engines) -> set[int]:
    """Give the stripes whose header bit is set in the shadow pages."""
    headers = e.pages[HEADERS_OFFSET : HEADERS_OFFSET + 2 * len(e.table) : 2]
    return set(_where(headers.translate(_NOT_ZERO)))


def moved(before: bytes, after: bytes) -> set[tuple[int, int]]:
    """Give the changes of state, (old, new), between two moments of `state_bytes`."""
    change = int.from_bytes(before, "big") ^ int.from_bytes(after, "big")
    places = _where(change.to_bytes(len(before), "big").translate(_NOT_ZERO))
    pairs = {(before[at] & t.STATE_MASK, after[at] & t.STATE_MASK) for at in places}
    return {(old, new) for old, new in pairs if old != new}


def problems(e: t.Engines, buffers: int) -> list[str]:
    """Name everything that does not hold; a hydrator with so many `buffers`."""
    states, found = e.state_bytes, []

    def check(what: str, got: object, expected: object) -> None:
        if got != expected:
            found.append(f"{what}: {got!r}, not {expected!r}")

    round_count = states.count(t.PRESENT | t.IN_ROUND)
    check("states", set(states) - ALLOWED, set())
    check("undurable", e.undurable, states.count(t.PRESENT) + round_count)
    check("present_count", e.present_count, states.count(t.PRESENT))
    check("round_count", e.round_count, round_count)
    if e.round == t.ROUND_IDLE:
        check("stripes in no round", round_count, 0)
    if e.table != states.translate(_HAS_DATA):
        found.append("the table is not what the states say")
    check("arriving", e.arriving, e.stripe_waiters + states.count(t.OVERWRITING))
    fetched = sorted(stripe for stripe, _ in e.fetches())
    check("buffers", e.free_buffers + len(fetched), buffers)
    check("stripes in buffers", fetched, _where(states.translate(_FETCHING)))
    bits = header_bits(e)
    check("DURABLE without a header bit", durable(e) - bits, set())
    check("header bit without data", bits - set(_where(e.table)), set())
    stats = e.hydrator_stats
    check("stats.present", stats["present"], e.table.count(1))
    check("stats.durable", stats["durable"], states.count(t.DURABLE))
    return found

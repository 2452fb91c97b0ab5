"""A hydrator on a bench: every step of it is checked, and what it has in flight is known."""

from __future__ import annotations

from enginekit.actions import act
from enginekit.invariants import durable, header_bits, in_round, moved, problems
from ublk_ubi import _testing as t

STRIPE = 64 << 10
TAGS = 8
# What one step may do to a stripe: the list in _hydrator.pxd, and two of its lines at once.
LEGAL_MOVES = {
    (t.ABSENT, t.FETCHING), (t.FETCHING, t.PRESENT), (t.FETCHING, t.ABSENT),
    (t.FETCHING, t.OVERWRITING), (t.ABSENT, t.OVERWRITING), (t.OVERWRITING, t.PRESENT),
    (t.OVERWRITING, t.ABSENT), (t.PRESENT, t.DURABLE),
    (t.OVERWRITING, t.FETCHING),       # failed, and somebody waits
}
IO = (t.ACT_READ_IMAGE, t.ACT_WRITE_BASE, t.ACT_ZERO_BASE, t.ACT_SYNC_BASE)


class Bench:
    """A hydrator whose every step is checked, and what it has in flight."""

    def __init__(self, *, buffers: int = 4, stripes: int = 8, depth: int = TAGS, queues: int = 1,
                 start: bool = True, **options) -> None:
        self.e = t.Engines(stripes=stripes, depth=depth, queues=queues, stripe_bytes=STRIPE,
                           buffers=buffers, **options)
        self.buffers = buffers
        self.in_flight: dict[int, t.Act] = {}
        self.synced: set[int] = set()  # stripes whose data a finished fdatasync has covered
        self.written: list[tuple[int, set[int]]] = []  # pages, and the bits in them when written
        self.hydrated = 0              # how often it was said
        self.lost = False
        if start:
            assert self.step(t.EVENT_START) == [act(t.ACT_STARTED)]

    # -- events --

    def step(self, kind: int, **fields: int) -> list[t.Act]:
        states = self.e.state_bytes
        rounds, phase = self.e.hydrator_stats["rounds"], self.e.round
        actions = self.e.hydrator_step(kind, **fields)
        assert problems(self.e, self.buffers) == []
        assert moved(states, self.e.state_bytes) <= LEGAL_MOVES
        if phase == t.ROUND_SYNC_DATA and self.e.round in (t.ROUND_WRITE_PAGES, t.ROUND_SYNC_PAGES):
            self.synced |= in_round(self.e)
        assert header_bits(self.e) <= self.synced | durable(self.e)
        assert self.e.hydrator_stats["rounds"] - rounds <= 1
        self.hydrated += self.says_hydrated(actions)
        for action in actions:
            if action.kind in IO:
                assert action.token not in self.in_flight
                self.in_flight[action.token] = action
            assert not self.lost or action.kind != t.ACT_READ_IMAGE
            if action.memory == t.MEM_PAGE:
                self.written.append((action.index, header_bits(self.e)))
            if action.kind == t.ACT_STOPPED:
                assert not self.in_flight
                assert not self.e.round_due
        return actions

    def says_hydrated(self, actions: list[t.Act]) -> bool:
        """Tell whether it does, and check that it does when it must: once, of a running device."""
        said = [action for action in actions if action.kind == t.ACT_HYDRATED]
        assert said in ([], [act(t.ACT_HYDRATED)])
        all_durable = set(self.e.state_bytes) == {t.DURABLE}
        assert all_durable or not said
        if self.e.life == t.LIFE_RUNNING:
            assert self.hydrated + len(said) == all_durable
        return bool(said)

    def done(self, token: int, result: int | None = None, *, zeros: bool = False) -> list[t.Act]:
        """End an action, well if no result is given; `zeros` is what was read."""
        action = self.in_flight.pop(token)
        return self.step(t.EVENT_DONE, token=token, zeros=int(zeros),
                         result=action.length if result is None else result)

    def background(self, on: bool = True) -> list[t.Act]:
        """Begin to copy all of the image, or pause."""
        return self.step(t.EVENT_HYDRATE, op=int(on))

    def budget(self, stripes: int) -> list[t.Act]:
        """Let it copy so many stripes unasked."""
        return self.step(t.EVENT_BUDGET, offset=stripes * STRIPE)

    def lose_image(self) -> None:
        self.lost = True
        self.e.lose_image()

    def tell(self, message: int, tag: int = 0, stripe: int = 0, result: int = 0,
             queue: int = 0) -> list[t.Act]:
        return self.step(t.EVENT_MESSAGE, op=message, tag=tag, stripe=stripe, result=result,
                         queue=queue)

    def want(self, stripe: int) -> list[t.Act]:
        return self.tell(t.MSG_WANT, TAGS - 1, stripe)

    def hydrate(self, tag: int, stripe: int) -> list[t.Act]:
        return self.tell(t.MSG_HYDRATE, tag, stripe)

    def claim(self, tag: int, stripe: int) -> list[t.Act]:
        return self.tell(t.MSG_CLAIM, tag, stripe)

    def written_by(self, tag: int, stripe: int, result: int = STRIPE) -> list[t.Act]:
        return self.tell(t.MSG_WRITTEN, tag, stripe, result)

    def join(self, tag: int) -> list[t.Act]:
        return self.tell(t.MSG_JOIN, tag)

    def begin_round(self) -> list[t.Act]:
        """Let the round begin that is due."""
        return self.step(t.EVENT_ROUND)

    def commit(self, *tags: int) -> list[t.Act]:
        """Begin a round for those that join now."""
        for tag in tags:
            assert self.join(tag) == []
        return self.begin_round()

    def tick(self) -> list[t.Act]:
        return self.step(t.EVENT_TICK)

    def synced_now(self, result: int = 0) -> list[t.Act]:
        return self.done(self.sync_token, result)

    # -- shortcuts --

    @property
    def sync_token(self) -> int:
        return self.buffers + t.PAGE_WINDOW

    def page_token(self, token: int = 0) -> int:
        return self.buffers + token

    def make_present(self, *stripes: int) -> None:
        for stripe in stripes:
            self.claim(TAGS - 2, stripe)
            self.written_by(TAGS - 2, stripe)

    def finish(self) -> None:
        """End all I/O well, and begin rounds, until there is none."""
        while self.in_flight or self.e.round_due:
            if self.e.round_due:
                self.begin_round()
            else:
                self.done(next(iter(self.in_flight)))

    def buffer_of(self, stripe: int) -> int:
        (token,) = [token for token, action in self.in_flight.items()
                    if action.memory == t.MEM_STRIPE and action.stripe == stripe]
        return token

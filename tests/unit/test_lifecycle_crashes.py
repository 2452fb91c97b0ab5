"""The lifecycle engine cut short at every action: by a kill, by power loss, and both in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from enginekit.basedisk import Disk, Opening, Tables, open_base, torn
from enginekit.scenes import ELSEWHERE, OPENINGS, SCENES, Scene, made, played

from ublk_ubi import _testing as t

if TYPE_CHECKING:
    from collections.abc import Iterator

    from enginekit.basedisk import Write

OLD_UUID, NEW_UUID = b"u" * 16, b"n" * 16


def lengths(scene: Scene) -> range:
    """Give the numbers of the actions before which a daemon may die."""
    return range(len(played(scene).trace) + 1)


def states_after(scene: Scene, disk: Disk, tables: Tables, **options) -> bytes:
    """Open a base that somebody left, as the scene's user would again."""
    opening = open_base(disk, tables, **(scene.options | options))
    assert disk.unsynced == []
    assert opening.uuid not in tables.temporary
    assert tables.published[opening.uuid].rows is opening.rows
    assert disk.head().minor == 2
    assert disk.current().is_open
    return opening.steps.states()[0]


def remains(disk: Disk) -> Iterator[Disk]:
    """Give what power loss may leave: any of these subsets of what no fdatasync has covered."""
    seen = set()
    for kept in subsets(disk.unsynced):
        left = disk.after_power_loss(kept)
        key = frozenset(left.pages.items())
        if key not in seen:
            seen.add(key)
            yield left


def subsets(writes: list[Write]) -> Iterator[list[Write]]:
    """None, all, each alone, all but each; each of these whole and torn."""
    yield []
    yield writes
    for at, write in enumerate(writes):
        others = writes[:at] + writes[at + 1 :]
        for part in ([write], [], *torn(write)):
            yield part
            yield [*others, *part]


@pytest.mark.parametrize("name", SCENES)
def test_whoever_is_killed_at_any_action_can_try_again(name: str) -> None:
    scene = SCENES[name]
    for at in lengths(scene):
        left = played(scene, stop_at=at)
        options = {"new_uuid": b"m" * 16}
        assert states_after(scene, left.disk, left.tables, **options) == scene.states, at


@pytest.mark.parametrize("name", [name for name in OPENINGS if name != "formatting"])
def test_whoever_is_killed_while_trying_again_can_try_a_third_time(name: str) -> None:
    scene = SCENES[name]
    stride = max(1, len(lengths(scene)) // 10)
    for first in lengths(scene)[::stride]:
        left = played(scene, stop_at=first)
        second = 0
        while True:
            again = Opening(left.disk.copy(), left.tables.copy(), **scene.options)
            if len(again.run(t.EVENT_START, stop_at=second)) < second:
                break
            assert states_after(scene, again.disk, again.tables) == scene.states, (first, second)
            second += stride


@pytest.mark.parametrize("name", SCENES)
def test_power_loss_at_any_action_leaves_a_base_that_opens(name: str) -> None:
    """Tables go with the power; header bits do not, and none comes from anywhere."""
    scene = SCENES[name]
    durable = scene.states.replace(bytes([t.PRESENT]), bytes([t.ABSENT]))
    for at in lengths(scene):
        left = played(scene, stop_at=at)
        for disk in remains(left.disk):
            assert states_after(scene, disk, Tables(), boot_id=ELSEWHERE) == durable, at


# -- formatting that is cut short ------------------------------------------------------------------

LARGE = {"stripe_bytes": 64 << 10, "image_bytes": 600_000 << 16, "base_bytes": 1 << 40}
BITS = {0, 300, 3000, 599_999}     # in the first sector, page and MiB, and behind them


def old_or_new_or_nothing(opening: Opening, *, tail_is_gone: bool) -> None:
    """After a cut: refused, the old disk with all that it had, or the new one."""
    if opening.steps.phase == t.PHASE_FAILED:
        assert opening.steps.refusal in (t.REFUSE_FOREIGN, t.REFUSE_ADOPT)
        return
    states = opening.steps.states()[0]
    found = {stripe for stripe in BITS if states[stripe] == t.DURABLE}
    if opening.uuid == OLD_UUID:
        assert found == BITS
        assert not tail_is_gone
    else:
        assert found == set()
        assert len(states) == states.count(t.ABSENT)


@pytest.mark.parametrize("power_loss", [False, True], ids=["killed", "power loss"])
def test_formatting_an_old_disk_leaves_it_whole_or_no_disk_at_all(power_loss: bool) -> None:
    """Never one that opens without asking and has lost some of its header bits, or its tail."""
    original, _ = made(*BITS, **LARGE)
    outcomes = set()
    for at in range(40):
        left = Opening(original.copy(), Tables(), **LARGE, format=True, new_uuid=NEW_UUID)
        left.run(t.EVENT_START, stop_at=at)
        for disk in remains(left.disk) if power_loss else [left.disk]:
            after = Opening(disk, Tables() if power_loss else left.tables.copy(), **LARGE,
                            new_uuid=b"x" * 16, boot_id=ELSEWHERE if power_loss else b"b" * 16)
            after.run(t.EVENT_START)
            old_or_new_or_nothing(after, tail_is_gone="host zero_tail" in left.trace)
            outcomes.add(after.uuid if after.steps.phase == t.PHASE_OPEN else "refused")
    assert {OLD_UUID, NEW_UUID, "refused"} <= outcomes


def test_a_closing_that_was_cut_short_leaves_its_table_to_be_dropped() -> None:
    scene = SCENES["closing"]
    for at in lengths(scene):
        left = played(scene, stop_at=at)
        was_open = left.disk.current().is_open
        again = open_base(left.disk, left.tables)
        # As long as the base does not say that it is closed, the same generation goes on.
        assert again.steps.going_on == was_open
        assert left.disk.current().generation == (2 if was_open else 3)

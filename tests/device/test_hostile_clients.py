"""Hostile clients on the control socket: requests, honest clients and memory are unharmed."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.device import RUN_ROOT
from support.fio import Fio
from support.mob import KINDS, Mob
from support.shell import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Outcome, Ubi
    from support.images import Image
    from support.undo import Undo

pytestmark = pytest.mark.cpus(2)

CLIENTS = int(os.environ.get("UBLK_UBI_HOSTILE_CLIENTS", "200"))
RUNS = int(os.environ.get("UBLK_UBI_HOSTILE_RUNS", "1"))      # of fio, which is what takes time
NO_DEVICE = 4
MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 16 * MIB
PART = 4 * MIB
ANSWER_S = 5.0                     # an honest client's time limit by default
# What may become resident once: the hydrator's buffers, and what those for clients leave behind.
GROWTH = 32 * STRIPE + 2 * MIB
MOST_CLIENTS = 64


def descriptors(device: Device) -> int:
    return len(os.listdir(f"/proc/{device.pid}/fd"))


def memory(device: Device) -> int:
    status = Path(f"/proc/{device.pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def answer(ubi: Ubi, *words: object) -> Outcome:
    """What an honest client hears, who asks again when it hears nothing."""
    def heard() -> Outcome | None:
        outcome = ubi.command(*words)
        return outcome if outcome.code == 0 else None

    outcome = until(heard, f"an answer to {words}", 4 * ANSWER_S)
    assert outcome is not None
    return outcome


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
@pytest.mark.limit(90 + 60 * RUNS)
def test_hostile_clients_harm_nobody(
    ubi: Ubi, undo: Undo, make_image: Callable[..., Image], make_base: Callable[..., str],
    tmp_path: Path, seed: int,
) -> None:
    device = ubi.add(make_image(SIZE), make_base(SIZE), stripe_size=STRIPE)
    socket_path = RUN_ROOT / device.name / "control.sock"
    held = descriptors(device)
    most_held, used, answers, longest_s = 0, [], 0, 0.0
    with Mob(socket_path, CLIENTS, seed) as mob:
        until(lambda: set(mob.turns) == set(KINDS), "all kinds are at it", 30.0)
        device.hydrate(run=True)
        for number in range(RUNS):
            fio = Fio(
                device, undo, tmp_path, start=number % 3 * PART, part=PART, jobs=1,
                seed=seed + number,
            )
            while not fio.done:
                asked_at = time.monotonic()
                honest = answer(ubi, "status", device.name, "--json")
                assert honest.json()["state"] == "live"
                longest_s = max(longest_s, time.monotonic() - asked_at)
                answers += 1
                most_held = max(most_held, descriptors(device))
                used.append(memory(device))
            fio.result()
            fio.verify()
        answer(ubi, "hydrate", device.name, "--pause")
        print(
            f"{mob.connections} connections, {answers} honest answers, the longest after "
            f"{longest_s:.2f} s; descriptors {held} to {most_held}, "
            f"memory {used[0]} to {used[-1]}",
        )
        assert mob.connections > CLIENTS
    assert answers >= 1
    assert most_held <= held + MOST_CLIENTS + 8
    assert used[-1] - used[0] <= GROWTH
    until(lambda: descriptors(device) <= held + 2, "none of theirs is left")
    log = (RUN_ROOT / device.name / "log").read_text()
    assert "Traceback" not in log
    assert len(log) < MIB
    device.stop()


def test_an_honest_client_is_answered_while_many_wait(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], seed: int,
) -> None:
    """… and the disk can be taken away."""
    device = ubi.add(make_image(SIZE), make_base(SIZE), stripe_size=STRIPE)
    with Mob(RUN_ROOT / device.name / "control.sock", CLIENTS, seed) as mob:
        until(lambda: mob.connections >= min(CLIENTS, 100), "a crowd", 30.0)
        for _ in range(5):
            asked_at = time.monotonic()
            answer(ubi, "status", device.name)
            assert time.monotonic() - asked_at < 4 * ANSWER_S
        # One whose answer is lost has been deleted all the same.
        until(lambda: ubi.command("del", device.name).code in (0, NO_DEVICE), "it is deleted")
        device.live = False
    assert device.name not in ubi.command("list").stdout

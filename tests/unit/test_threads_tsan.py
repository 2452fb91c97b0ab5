"""The data plane's threads, without Python: under ThreadSanitizer, and in every legal order.

`world` runs the loops, engines, mailboxes and doorbells that the daemon runs, on rings in memory,
with guests that check what they read. `order` goes through the orders in which one thread may see
what another has done. Both must notice when a release, a fence or a second look is taken away.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from unit.threads import build
from unit.threads.build import Change

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = float(os.environ.get("UBLK_UBI_TSAN_SECONDS", "4"))
RACE = "WARNING: ThreadSanitizer: data race"
# What a bug breaks first is the threads' affair: whatever a check of world's says of it is a find.
ANY_FIND = RACE + "|violation: (?!no memory|a thread does not get on)|broken invariant: "
UNHEARD = "violation: a receiver sleeps, has mail, and nobody rings"

PLANTED = {
    "relaxed-store": ("world", RACE, Change(
        "_atomic.pxd",
        "#define ubi_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)",
        "#define ubi_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)",
    )),
    "relaxed-load": ("world", RACE, Change(
        "_atomic.pxd",
        "#define ubi_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)",
        "#define ubi_load(p) __atomic_load_n((p), __ATOMIC_RELAXED)",
    )),
    "plain-state": ("world", RACE, Change(
        "_hydrator.pyx",
        "    store_u8(&hydrator.shared.state[stripe], value)\n",
        "    hydrator.shared.state[stripe] = value\n",
    )),
    "slot-freed-early": ("world", ANY_FIND, Change(
        "_mailbox.pxd",
        "    message[0] = box.slots[head & box.mask]\n    store_u32(&box.head, head + 1)\n",
        "    store_u32(&box.head, head + 1)\n    message[0] = box.slots[head & box.mask]\n",
    )),
    "present-before-written": ("world", ANY_FIND, Change(
        "_hydrator.pyx",
        "    if phase == FETCH_WRITE or event.result < 0:\n"
        "        end_fetch(hydrator, index, event.result, actions)\n"
        "    elif image_lost(hydrator.shared):\n"
        "        end_fetch(hydrator, index, -EIO, actions)\n"
        "    else:\n",
        "    set_state(hydrator, hydrator.fetches[index].stripe, FETCHING)\n"
        "    if phase == FETCH_WRITE or event.result < 0:\n"
        "        end_fetch(hydrator, index, event.result, actions)\n"
        "    else:\n"
        "        set_state(hydrator, hydrator.fetches[index].stripe, PRESENT)\n",
    )),
    "zeros-not-written": ("world", ANY_FIND, Change(
        "_hydrator.pyx",
        "    else:\n        store_fetched(hydrator, index, event.zeros, actions)\n",
        "    elif event.zeros:\n        end_fetch(hydrator, index, 0, actions)\n"
        "    else:\n        store_fetched(hydrator, index, event.zeros, actions)\n",
    )),
    "image-dropped-in-word-only": ("world", ANY_FIND, Change(
        "_threads.pyx",
        "        ring_drop_image(&base.ring)\n",
        "",
    )),
    "no-fence-before-the-bell": ("order", UNHEARD, Change(
        "_mailbox.pxd",
        "    full_fence()\n    return peek_u32(&bell.armed) != 0",
        "    return peek_u32(&bell.armed) != 0",
    )),
    "no-fence-after-arming": ("order", UNHEARD, Change(
        "_mailbox.pxd",
        "    exchange_u32(&bell.armed, 1)\n    full_fence()\n",
        "    exchange_u32(&bell.armed, 1)\n",
    )),
    "no-second-look": ("order", UNHEARD, Change(
        "_threads.pyx",
        "    doorbell_arm(bell)\n    if not mailbox_empty(",
        "    mailbox_empty(&thread.base.device.to_queue[thread.queue.index])\n"
        "    doorbell_arm(bell)\n    if False and not mailbox_empty(",
    )),
}

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("setarch") is None, reason="needs gcc and setarch",
)


def test_no_race_and_no_lost_byte() -> None:
    status, output = build.run(build.plain("world"), str(SECONDS), "1")
    print(output)
    assert status == 0, output
    counts = {item.rpartition(" ")[0]: int(item.rpartition(" ")[2])
              for item in output.strip().split(", ")}
    assert [name for name, count in counts.items() if not count] in ([], ["doorbells lost"]), output


def test_no_receiver_sleeps_on_its_mail() -> None:
    status, output = build.run(build.plain("order"))
    print(output)
    assert status == 0, output


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found(planted: str, tmp_path: Path) -> None:
    program, words, change = PLANTED[planted]
    status, output = build.run(build.planted(program, tmp_path / "build", change), "60", "1")
    assert status != 0
    assert re.search(words, output), output


@pytest.mark.parametrize("program", ["world", "order"])
def test_there_is_no_python_in_it(program: str) -> None:
    symbols = subprocess.run(
        ["nm", "--undefined-only", str(build.plain(program))],
        capture_output=True, text=True, check=True,
    ).stdout.split()
    assert not [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))]

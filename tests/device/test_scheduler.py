"""The disk has no I/O scheduler of its own, unless somebody gives it one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.images import Image

MIB = 1 << 20


def scheduler(device: Device) -> Path:
    return Path("/sys/block", Path(device.node).resolve().name, "queue/scheduler")


def chosen(file: Path) -> str:
    return file.read_text().partition("[")[2].partition("]")[0]


def test_a_disk_has_none_and_keeps_what_it_is_given(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    device = ubi.add(make_image(MIB), make_base(MIB), recovery=True)
    file = scheduler(device)
    assert chosen(file) == "none"
    assert "mq-deadline" in file.read_text(), "the kernel has none to give"
    file.write_text("mq-deadline")
    device.kill()
    device.recover()
    assert chosen(file) == "mq-deadline"

"""How much memory a disk's daemon takes, of private pages and of locked ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.direct import read_direct
from support.shell import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.images import Image
    from support.stores import Stores

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
HEADERS = 14                       # where they begin on a base
SIZE = 64 * MIB
STEADY_S = 2.0                     # twice the time between two looks after everything
MOST = {"zero-copy": 32 * MIB, "copy": 64 * MIB}


def smaps(device: Device, *, but_programs: bool = False) -> int:
    """Private and locked bytes, as the kernel counts them; a page may be both. `but_programs`: not
    the share of locked programs and libraries, which changes with all that map them."""
    text = Path(f"/proc/{device.pid}/smaps").read_text()
    total = 0
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)[1:]:
        fields = dict(re.findall(r"^(\w+): +(\d+) kB$", mapping, re.MULTILINE))
        is_shared = mapping.split()[1].endswith("s")
        locked = 0 if but_programs and not is_shared else int(fields["Locked"])
        total += max(int(fields["Anonymous"]), locked)
    return total << 10


def own(device: Device) -> int:
    """Its own bytes, once what it does every second adds nothing to them any more."""
    last, since = 0, time.monotonic()

    def is_steady() -> bool:
        nonlocal last, since
        if last != (now := smaps(device, but_programs=True)):
            last, since = now, time.monotonic()
        return time.monotonic() > since + STEADY_S

    until(is_steady, f"{device.name} takes no more memory")
    return last


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
@pytest.mark.data_paths("zero-copy", "copy")
def test_of_a_default_disk_after_load(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], tmp_path: Path,
    data_path: str,
) -> None:
    """As many requests at once as there are tags, as large as they get, cold and hot."""
    image = make_image(SIZE, holes=0.2)
    device = ubi.add(image, make_base(SIZE), size=SIZE)
    command = [
        "fio", f"--filename={device.node}", "--direct=1", "--ioengine=libaio", "--iodepth=128",
        "--bssplit=4k/40:256k/20:1m/40", f"--size={SIZE}", "--number_ios=600", "--norandommap",
        "--randrepeat=1", "--output-format=json", "--name=job", "--rw=randrw",
    ]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=60,
    )
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    assert job["error"] == 0
    device.hydrate(run=True)
    memory = device.wait_until_independent()["memory"]
    print(f"{data_path}: {memory / MIB:.1f} MiB, smaps {smaps(device) / MIB:.1f} MiB")
    assert memory <= MOST[data_path]
    assert smaps(device) <= MOST[data_path]


def test_of_a_huge_disk(ubi: Ubi, stores: Stores) -> None:
    """2 TiB take 8 MiB more than 10 GiB at the most, cold, and with every stripe on the base: then
    all is touched that is kept of a stripe. That is 44 KiB less than they may take."""
    folder = stores.folder("ext4")
    cold, hydrated = {}, {}
    for size in (10 * GIB, 2 * TIB):
        image, base = folder / f"image{size}", folder / f"base{size}"
        image.touch()
        os.truncate(image, size)
        device = ubi.add(image, base)
        assert device.size == size
        assert not any(read_direct(device.node, size - 4096, 4096))
        with device.open() as disk:
            disk.pwrite(b"x" * 4096, size - 4096)
            disk.fsync()
        memory = device.status()["memory"]
        assert memory <= MOST["zero-copy"]
        assert abs(smaps(device) - memory) < MIB
        cold[size] = own(device)
        print(f"{size >> 30} GiB: {memory} bytes, {cold[size]} but for programs")
        device.stop()
        with open(base, "r+b") as file:        # all of its stripes are hydrated
            file.seek(HEADERS)
            file.write(b"\x01\x00" * (size // MIB))
            os.fsync(file.fileno())
        device.start()
        memory = device.wait_until_independent()["memory"]
        assert memory <= MOST["zero-copy"]
        assert abs(smaps(device) - memory) < MIB
        hydrated[size] = own(device)
        print(f"{size >> 30} GiB, hydrated: {memory} bytes, {hydrated[size]} but for programs")
        device.stop()
    assert cold[2 * TIB] <= cold[10 * GIB] + 8 * MIB
    assert hydrated[2 * TIB] <= hydrated[10 * GIB] + 8 * MIB

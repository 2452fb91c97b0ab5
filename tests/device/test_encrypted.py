"""docs/encrypted-bases.md, line by line as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.device import CHECKOUT
from support.direct import DirectFile, assert_same, read_direct

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.device import Ubi
    from support.images import Image
    from support.stores import Stores
    from support.undo import Undo

MIB = 1 << 20
SIZE = 56 * MIB  # of the disk: LUKS takes 16 MiB, the metadata 8
LINK = "/dev/ublk-ubi/vm1"


@pytest.mark.limit(300)
@pytest.mark.usefixtures("no_watch")
def test_the_document(
    ubi: Ubi, stores: Stores, undo: Undo, make_image: Callable[..., Image], tmp_path: Path,
) -> None:
    text = (CHECKOUT / "docs/encrypted-bases.md").read_text()
    make, again, end = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    image, disk = make_image(2 * MIB + 512), stores.block("loop", SIZE)
    (tmp_path / "key").write_bytes(bytes(range(64)))
    # What `ublk-ubi` and `cryptsetup` are here, and no udev to wait for.
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ublk-ubi").write_text(f'#!/bin/sh\nexec {sys.executable} -m ublk_ubi "$@"\n')
    (folder / "ublk-ubi").chmod(0o755)
    environment = os.environ | {
        "DISK": disk, "KEY": str(tmp_path / "key"), "IMAGE": image.path, "DM_DISABLE_UDEV": "1",
        "PYTHONPATH": str(CHECKOUT), "PATH": f"{folder}:/usr/sbin:/sbin:{os.environ['PATH']}",
    }
    assert shutil.which("cryptsetup", path=environment["PATH"])

    def sh(lines: str) -> None:
        done = subprocess.run(["sh", "-ec", lines], env=environment, capture_output=True, text=True,
                              check=False, timeout=200)
        assert done.returncode == 0, f"{lines}: {done.stdout}{done.stderr}"

    undo.callback(subprocess.run, ["dmsetup", "remove", "--force", "vm1-crypt"], env=environment,
                  check=False, capture_output=True)
    undo.callback(ubi.command, "del", "vm1", "--force", "--if-exists")
    sh(make)
    # Behind the image's end it reads zero, although the disk below is noise.
    assert_same(read_direct(LINK, 0, 24 * MIB), image.as_disk(24 * MIB), 0, "a new disk")
    secret = b"What a tenant has written. " * 1024
    with DirectFile(LINK) as file:
        file.pwrite(secret[:8192], MIB)
        file.fsync()
    sh(end)
    sh(again)
    assert read_direct(LINK, MIB, 8192) == secret[:8192]
    sh(end)
    with open(disk, "rb") as below:
        stored = below.read()
    assert secret[:27] not in stored
    assert b"BDEV_UBI" not in stored

"""No thread is the first to use a type: where two were at once, the process crashed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from unit.serve.conftest import served  # noqa: F401 - a fixture
from unit.serve.kit import WITH_FAKES, Served
from unit.vhost.conftest import add, spdk  # noqa: F401 - fixtures

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spdkpeer import Spdk

FIRST_USE = "a thread is the first to use"
# msgspec takes a type apart by this function of its own.
WATCHED = f"""
import sys, threading
def watch(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "get_class_annotations":
        name = getattr(frame.f_locals.get("obj"), "__name__", "a type")
        print("{FIRST_USE}", name, file=sys.stderr, flush=True)
threading.setprofile(watch)
{WITH_FAKES}"""


def test_serve(tmp_path: Path, served: Served, spdk: Spdk) -> None:  # noqa: F811
    watched = Served(tmp_path, served.path, (sys.executable, "-c", WATCHED))
    watched.start("--spdk", spdk.socket)
    try:
        watched.call("bdev_ubi_create", **watched.disk())
        watched.call("bdev_ubi_status", name="ubi0")
        watched.call("bdev_ubi_hydrate", name="ubi0")
        watched.call("bdev_ubi_resize", name="ubi0", size=6 << 30)
        watched.call("vhost_create_blk_controller", ctrlr="vhost.0", dev_name="ubi0")
        (tmp_path / "saved.json").write_text(watched.rpc_py("save_config"))
        watched.stop()
        watched.start("--json", "saved.json", "--spdk", spdk.socket)
        watched.call("bdev_ubi_delete", name="ubi0")
        assert FIRST_USE not in (tmp_path / "serve.log").read_text()
    finally:
        watched.kill()


def test_del(add: Callable[..., object]) -> None:  # noqa: F811
    add("vm1")
    add("vm2")
    done = subprocess.run([sys.executable, "-c", WATCHED, "del", "-a"], check=True,
                          capture_output=True, text=True, env=os.environ, timeout=60)
    assert (done.stdout, done.stderr) == ("vm1 deleted\nvm2 deleted\n", "")

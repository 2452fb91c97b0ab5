"""The disks that are compared: ours and each peer's, made, brought to a state, and taken down.

`SUBJECTS` has a context manager for each subject; it yields the node that a load is run on. Those
in `FRESH` are made anew for each load: it changes their state.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from functools import partial
from typing import TYPE_CHECKING, Any

from . import disks
from .disks import IMAGE, SECTOR
from .loads import IMAGE_BYTES, KIB, MIB
from .shell import FailedError, MissingError, run, running, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PLACE = "/tmp/bench"               # the payload: in memory, so that no figure waits for the host
UBI = f"{PLACE}/bin/ublk-ubi"
SOCKETS = "/run/bench"
NBD = "/dev/nbd0"


# -- ours -----------------------------------------------------------------------------------------


def ubi(*words: str) -> Any:
    """Run one of our commands; return its JSON."""
    return json.loads(run(UBI, *words, "--json"))


def ask_daemon(method: str, **params: Any) -> Any:
    """Ask our disk's daemon itself: a command of ours would take its time of what is measured."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect("/run/ublk-ubi/bench/control.sock")
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        line.sendall(json.dumps(request).encode() + b"\n")
        with line.makefile("rb") as answers:
            answer = json.loads(answers.readline())
    if "error" in answer:
        raise FailedError(f"{method}: {answer['error']['message']}")
    return answer["result"]


@contextlib.contextmanager
def our_disk(*options: str, hydrated: bool = True) -> Iterator[str]:
    """Make a disk on a new base."""
    disks.zero(disks.UBI)
    words = ("--image", IMAGE, "--base", disks.UBI, "--keep-old-data")
    made = ubi("add", *words, "--name", "bench", *options)
    try:
        if hydrated:
            ask_daemon("hydrate", run=True)
            until(lambda: ask_daemon("status")["independent"], "hydration", 0.05)
        yield made["device"]
    finally:
        ubi("del", "bench")


# -- kublk ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def kublk(kind: str, *options: str, scheduler: str = "") -> Iterator[str]:
    """Have the kernel selftests' server serve; its `del` may hang, so it is killed.

    Its disk's I/O scheduler is the kernel's choice, but for a `scheduler`.

    It runs as a daemon, as ours does: in fio's own session the scheduler has the two take turns
    five times as often, which costs a fifth of the requests.
    """
    program = f"{PLACE}/kublk"
    if not os.path.exists(program):
        raise MissingError("not built")
    files = [disks.KUBLK] if kind == "loop" else []
    told = run(program, "add", "-t", kind, "-q", "1", "-d", "128", *options, *files)
    device, pid = re.search(r"^dev id (\d+):", told), re.search(r"daemon pid (\d+)", told)
    if device is None or pid is None:
        raise FailedError(f"kublk add: {told.strip()}")
    node = f"/dev/ublkb{device[1]}"
    try:
        until(lambda: os.path.exists(node), "kublk's disk")
        if scheduler:
            with open(f"/sys/block/{os.path.basename(node)}/queue/scheduler", "w") as file:
                file.write(scheduler)
        yield node
    finally:
        os.kill(int(pid[1]), signal.SIGKILL)
        until(lambda: not os.path.exists(node), "the end of kublk's disk")


# -- dm-clone -------------------------------------------------------------------------------------


def clone_hydrated(name: str = "clone") -> int:
    """Tell how many regions it has."""
    words = run("dmsetup", "status", name).split()
    return int(words[6].split("/")[0])


@contextlib.contextmanager
def dm_clone(region: int, *options: str, hydrated: bool = False) -> Iterator[str]:
    """Make a clone that copies what is touched."""
    disks.zero(disks.CLONE_METADATA, 4 * MIB)
    sectors = IMAGE_BYTES // SECTOR
    settings = ["0"] if hydrated else ["1", "no_hydration"]
    words = ["0", str(sectors), "clone", disks.CLONE_METADATA, disks.CLONE, IMAGE,
             str(region // SECTOR), *settings, *options]  # fmt: skip
    run("dmsetup", "create", "clone", "--table", " ".join(words))
    try:
        if hydrated:
            until(lambda: clone_hydrated() == IMAGE_BYTES // region, "dm-clone's hydration", 0.05)
        yield "/dev/mapper/clone"
    finally:
        run("dmsetup", "remove", "clone")


# -- NBD ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nbd(server: list[str], path: str, export: str) -> Iterator[str]:
    """Attach the kernel's NBD client to a server."""
    for program in (server[0], "nbd-client"):
        if shutil.which(program) is None:
            raise MissingError(f"no {program} in the guest")
    os.makedirs(SOCKETS, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with running(*server) as process:
        until(lambda: os.path.exists(path) or process.poll() is not None, f"{server[0]}'s socket")
        if process.poll() is not None:
            told = process.stdout.read().strip() if process.stdout else ""
            raise FailedError(f"{server[0]}: exit {process.returncode}: {told}")
        run("nbd-client", "-unix", path, NBD, "-N", export, "-b", "512")
        try:
            yield NBD
        finally:
            run("nbd-client", "-d", NBD)


def host_device(name: str, path: str) -> dict[str, Any]:
    """Describe a disk to QEMU, as fast as it can be."""
    return {"driver": "host_device", "filename": path, "node-name": name,
            "cache": {"direct": True}, "aio": "io_uring"}  # fmt: skip


@contextlib.contextmanager
def qsd(*, hydrated: bool) -> Iterator[str]:
    """Have a qcow2 file over the image, with the filter that copies what is read."""
    path = f"{SOCKETS}/qsd"
    disks.zero(disks.QCOW)
    image = host_device("image", IMAGE) | {"read-only": True}
    store = host_device("store", disks.QCOW)
    create = {"driver": "qcow2", "file": "store", "size": IMAGE_BYTES}
    top = {"driver": "qcow2", "file": "store", "backing": "image", "node-name": "top"}
    filter_ = {"driver": "copy-on-read", "file": "top", "node-name": "copying"}
    make_qcow(store, create)
    words = ["qemu-storage-daemon"]
    for layer in (image, store, top, filter_):
        words += ["--blockdev", json.dumps(layer)]
    words += ["--nbd-server", f"addr.type=unix,addr.path={path}"]
    words += ["--export", "type=nbd,id=bench,node-name=copying,name=bench,writable=on"]
    with nbd(words, path, "bench") as node:
        if hydrated:
            read_all(node)
        yield node


def make_qcow(store: dict[str, Any], options: dict[str, Any]) -> None:
    """Make an empty qcow2 disk, as the image has no qemu-img."""
    talk = [
        {"execute": "qmp_capabilities"},
        {"execute": "blockdev-create", "arguments": {"job-id": "make", "options": options}},
        {"execute": "query-jobs"},
    ]
    with subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", json.dumps(store),
         "--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        if process.stdin is None or process.stdout is None:
            raise FailedError("qemu-storage-daemon: no pipes")
        for line in talk[:2]:
            process.stdin.write(json.dumps(line) + "\n")
        process.stdin.flush()
        for text in process.stdout:
            told = json.loads(text)
            if told.get("data", {}).get("status") == "concluded":
                break
        process.stdin.write(json.dumps(talk[2]) + "\n" + json.dumps({"execute": "quit"}) + "\n")
        process.stdin.flush()
        rest = process.stdout.read()
    if '"error": "' in rest:
        raise FailedError(f"blockdev-create: {rest.strip()}")


@contextlib.contextmanager
def nbdkit(*, hydrated: bool) -> Iterator[str]:
    """Have nbdkit's filter that keeps what is written, and what is read."""
    path = f"{SOCKETS}/nbdkit"
    words = ["nbdkit", "--foreground", "--unix", path, "--filter=cow", "file", IMAGE,
             "cow-on-read=true"]  # fmt: skip
    with nbd(words, path, "") as node:
        if hydrated:
            read_all(node)
        yield node


def read_all(node: str) -> None:
    """Have all of a disk read once."""
    run("dd", f"if={node}", "of=/dev/null", "bs=1M", "iflag=direct", f"count={IMAGE_BYTES // MIB}")


@contextlib.contextmanager
def raw() -> Iterator[str]:
    """Give the ram disk itself."""
    yield disks.RAW


Disk = contextlib.AbstractContextManager[str]
COLD = partial(our_disk, hydrated=False)
SUBJECTS: dict[str, Callable[[], Disk]] = {
    "raw": raw,
    "ubi-zero-copy": partial(our_disk, "--data-path", "zero-copy"),
    "ubi-plain": partial(our_disk, "--data-path", "copy", "--stripe-size", "64K"),
    "ubi-writethrough": partial(our_disk, "--cache", "writethrough"),
    "ubi-cold-fixed": partial(COLD, "--no-copy-on-read"),
    "ubi-cold-64k": partial(COLD, "--stripe-size", "64K"),
    "ubi-cold-1m": COLD,
    "kublk-loop": partial(kublk, "loop", "--auto_zc"),
    "kublk-loop-none": partial(kublk, "loop", "--auto_zc", scheduler="none"),
    "kublk-null": partial(kublk, "null", "--auto_zc"),
    "kublk-loop-plain": partial(kublk, "loop"),
    "kublk-null-plain": partial(kublk, "null"),
    "dm-clone": partial(dm_clone, MIB, hydrated=True),
    "dm-clone-cold-64k": partial(dm_clone, 64 * KIB),
    "dm-clone-cold-1m": partial(dm_clone, MIB),
    "qsd": partial(qsd, hydrated=True),
    "qsd-cold": partial(qsd, hydrated=False),
    "nbdkit": partial(nbdkit, hydrated=True),
    "nbdkit-cold": partial(nbdkit, hydrated=False),
}
FRESH = frozenset({"ubi-cold-64k", "ubi-cold-1m", "dm-clone-cold-64k", "dm-clone-cold-1m",
                   "qsd-cold", "nbdkit-cold"})  # fmt: skip


def slowness(subject: str) -> int:
    """Tell by how much fewer requests do: these take long enough."""
    return 4 if subject.startswith(("qsd", "nbdkit")) else 1

"""A daemon without a device, for the tests of those who talk to one. Run, not imported.

What it does is the last part of its image's path: normal, late (comes up once there is BASE.go),
warns, refuses, busy, slow, stuck, mute, dies, degraded, other; and of background hydration: copies
(a part at every look), fails, full, lost, halts, done.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import signal
import sys
import time
from typing import Any, Literal

import msgspec

from ublk_ubi import links, runtime
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import DeviceOptions, Task
from ublk_ubi.rpc_server import Deferred, NoParams, Server
from ublk_ubi.status import (
    Commit,
    Hydration,
    Io,
    IoCounters,
    Latency,
    Space,
    Status,
    Stripes,
)


class StopParams(msgspec.Struct, forbid_unknown_fields=True):
    force: bool = False


class HydrateParams(msgspec.Struct, forbid_unknown_fields=True):
    run: bool | None = None
    rate: int | Literal["max"] | None = None


class ResizeParams(msgspec.Struct, forbid_unknown_fields=True):
    size: int
    keep_old_data: bool = False


TOTAL, STRIPE = 2252, 1 << 20


def main() -> None:
    with open(int(sys.argv[1]), "rb") as file:
        task = msgspec.json.decode(file.read(), type=Task)
    options = task.options

    def ready(**answer: Any) -> None:
        os.write(task.ready_fd, msgspec.json.encode(answer) + b"\n")
        os.close(task.ready_fd)

    kind = os.path.basename(options.image or "done")
    if kind == "refuses":
        ready(ok=False, error=f"image {options.image} is empty", exit=1)
        sys.exit(1)
    while kind == "late" and not os.path.exists(f"{options.base}.go"):
        time.sleep(0.02)
    try:
        claim = runtime.claim(options.name, base=options.base)
    except UbiError as error:
        ready(ok=False, error=error.message, exit=int(error.code))
        sys.exit(1)
    claim.adopt_log(1)
    Fake(kind, claim, options).serve(ready)


class Fake:
    def __init__(self, kind: str, claim: runtime.Claim, options: DeviceOptions) -> None:
        self.kind, self.claim, self.options = kind, claim, options
        self.id = self.free_id() if options.id is None else options.id
        self.device = links.device_path(self.id)
        self.stopping: list[Deferred] = []
        self.hydrated = TOTAL if kind == "done" else 1000
        self.hydration = Hydration(
            stripes=10, bytes=10 << 20, errors=3, whole_stripe_writes=2, min_free=options.min_free,
            rate=options.rate, state={"done": "done", "halts": "running"}.get(kind, "off"),
        )

    def free_id(self) -> int:
        for number in itertools.count():
            with contextlib.suppress(FileExistsError), open(links.device_path(number), "x"):
                return number
        raise AssertionError

    def serve(self, ready: Any) -> None:
        with open(self.device, "a", encoding="ascii") as device:
            device.truncate(5 << 30)
        link = links.publish_link(self.claim.name, self.id)
        self.claim.write_options(self.options)
        self.claim.write_state(runtime.State(
            image=self.options.image, base=self.options.base, id=self.id, device=self.device,
            link=link, size=5 << 30, cookie=12345, base_identity=self.base_identity(),
        ))
        selector = selectors.DefaultSelector()
        server = Server(
            self.claim.socket,
            {
                "status": (NoParams, self.status), "stop": (StopParams, self.stop),
                "hydrate": (HydrateParams, self.hydrate), "resize": (ResizeParams, self.resize),
            },
            selector,
        )
        ready(
            ok=True, name=self.claim.name, device=self.device, link=link, id=self.id,
            pid=os.getpid(), size=5 << 30,
            warnings=["it goes on\nbuffered"] if self.kind == "warns" else [],
        )
        if self.kind == "mute":
            os.kill(os.getpid(), signal.SIGSTOP)
        while not self.done():
            for key, mask in selector.select(server.tick()):
                key.data(mask)
        if self.kind == "dies":
            os._exit(1)
        if self.kind == "slow":
            selector.select(0.3)
        for answer in self.stopping:
            answer.resolve({"stopped": True})
        server.close(linger_s=1)
        links.remove_link(self.claim.name, self.id)
        os.unlink(self.device)
        self.claim.release()

    def base_identity(self) -> tuple[bool, int, int] | None:
        try:
            found = os.stat(self.options.base)
        except FileNotFoundError:
            return None
        return (False, found.st_dev, found.st_ino)

    def done(self) -> bool:
        return bool(self.stopping) and self.kind != "stuck"

    def stop(self, params: StopParams) -> Deferred:
        if self.kind == "busy" and not params.force:
            raise UbiError(f"{self.claim.name} is in use: close it first", Exit.BUSY)
        self.stopping.append(Deferred())
        return self.stopping[-1]

    def hydrate(self, params: HydrateParams) -> Any:
        hydration = self.hydration
        if params.rate is not None:
            hydration.rate = None if params.rate == "max" else params.rate
        if params.run is False:
            hydration.state = "off" if hydration.state == "off" else "paused"
        elif self.kind == "fails":
            hydration.state, hydration.retry_in_s = "waiting", 12
            hydration.failed, hydration.last_error = 3, 5
        else:
            hydration.state = "low-space" if self.kind == "full" else "running"
        return self.status(NoParams())

    def resize(self, params: ResizeParams) -> Any:
        os.truncate(self.device, params.size)
        return {"size": params.size}

    def copy(self) -> None:
        if self.hydration.state == "running" and self.kind == "copies":
            self.hydrated = min(TOTAL, self.hydrated + 400)
        if self.hydrated == TOTAL:
            self.hydration.state = "done"

    def status(self, _params: NoParams) -> Any:
        if self.kind == "other":
            return {"schema": 2, "hello": "world"}
        independent = self.hydrated == TOTAL
        lost = self.kind == "lost" and self.hydration.state == "running"
        problem = "an fdatasync failed" if self.kind == "degraded" else None
        reads = IoCounters(1234567, 5 << 30, 2, Latency(85, 990, 1200, 65000, 2_500_000))
        full = Status(
            name=self.claim.name, state="live", device=self.device,
            link=links.link_path(self.claim.name), id=self.id, pid=os.getpid(),
            degraded="its image has changed" if lost else problem,
            image=self.options.image, image_size=2361393152, base=self.options.base,
            size=5 << 30, stripe_size=STRIPE, block_size=512, queues=1, depth=128,
            copy_on_read=True, image_cache="none", base_direct=False, data_path="copy",
            cache="writeback",
            stripes=Stripes(TOTAL, self.hydrated, self.hydrated - (0 if independent else 10)),
            io=Io(read=reads), cold_reads=1, hydration=self.hydration, commit=Commit(5, 1, 7),
            independent=independent, memory=17 << 20, uptime_s=93784.5,
            space=Space(
                allocated=1010 << 20, free=(1 << 20 if self.kind == "full" else 1 << 40),
                hydrated=self.hydrated * STRIPE, needed=(TOTAL - self.hydrated) * STRIPE,
            ),
        )
        self.copy()
        return {**msgspec.to_builtins(full), "from_the_future": 1}


main()

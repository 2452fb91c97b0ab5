"""The device daemon: one process a device. Its main thread owns control, never an I/O.

    python -m ublk_ubi.daemon N

reads its Task as JSON from descriptor N, brings the device up, says so in one JSON line, then
serves its control socket until the device is stopped: by `stop` on the socket, by a signal, or
because somebody took the disk away. What waits (stopping) runs on a thread of its own, one at a
time.

It may be told to take over the disk that a dead daemon left under its name; and to load all that
it needs first, write `{"ready": true}`, and begin when it gets a byte (an upgrade).

It *leaves* when it is to end and the disk is to stay: on SIGTERM while the disk is in use, and for
an upgrade. Then it stands by, and goes on itself if no other daemon has come up.
"""

from __future__ import annotations

import ublk_ubi.late  # noqa: F401 - before what it puts off

# isort: split

import contextlib
import gc
import os
import select
import selectors
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from ublk_ubi import hygiene, runtime
from ublk_ubi.control import Control
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.growth import not_grown, prepare, take
from ublk_ubi.log import log, standard, warn
from ublk_ubi.notify import Manager
from ublk_ubi.options import MAX_RATE, MIN_RATE, Task, continued
from ublk_ubi.rpc_server import Deferred, NoParams, Server
from ublk_ubi.session import Session
from ublk_ubi.session_status import describe, summary
from ublk_ubi.signals import ENDING
from ublk_ubi.systemd import own_unit

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from ublk_ubi.options import DeviceOptions

GC_THRESHOLD = (700, 10, 10)       # Python's own; see late.py
LINGER_S = 2.0
SECOND_SIGNAL_S = 5.0
STAND_BY_S = 60.0
STAND_BY_POLL_S = 0.02
PATIENCE_S = 90.0
"""How long a disk's users may take to end when the host goes down; units allow 120 s in all."""

USERS_PERIOD_S = 0.5
USERS_PATIENCE_S = 0.3
"""How long one may have the disk open who does not use it, but looks at it."""

UPGRADER_END_S = 5.0
BARRIER_S = 5.0
ASKED_S = 5.0
"""How long a stop that had begun before the manager heard of a new daemon may take to ask."""


class StopParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of `stop`; `force` takes an open disk away from its users."""

    force: bool = False


class HydrateParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of `hydrate`: `run` starts or pauses, `rate` is bytes a second or "max"."""

    run: bool | None = None
    rate: Annotated[int, msgspec.Meta(ge=MIN_RATE, le=MAX_RATE)] | Literal["max"] | None = None


class ResizeParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of `resize`: the disk's new size in bytes, or None for all that its base has."""

    size: Annotated[int, msgspec.Meta(gt=0, le=(1 << 63) - 1)] | None = None
    keep_old_data: bool = False


class LeaveParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of `leave`: the process that starts the next daemon; None: nobody does."""

    upgrader: Annotated[int, msgspec.Meta(gt=0)] | None = None


class Terminated(BaseException):
    """A signal asks to end while the device is being brought up."""


class Daemon:
    """Serves one live device until it is stopped."""

    def __init__(self, session: Session, manager: Manager) -> None:
        self._session = session
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._state = "live"
        self._worker: threading.Thread | None = None
        self._waiting: list[Deferred] = []
        self._outcome: tuple[UbiError | None, bool] | None = None
        self._resizing: tuple[Deferred, threading.Thread] | None = None
        self._resized: int | UbiError | None = None
        self.left = False
        self.upgrader: int | None = None
        self._signalled_at = float("-inf")
        self._manager = manager
        self._patient_until: float | None = None
        self._look_for_users_at = 0.0
        self._server = Server(
            session.claim.socket,
            {
                "status": (NoParams, self._on_status),
                "stop": (StopParams, self._on_stop),
                "hydrate": (HydrateParams, self._on_hydrate),
                "leave": (LeaveParams, self._on_leave),
                "resize": (ResizeParams, self._on_resize),
            },
            self._selector,
            report=warn,
        )
        self._signals_fd = self._catch_signals()
        self._selector.register(self._wake, selectors.EVENT_READ, self._on_wake)
        self._hear_notices()
        self._selector.register(self._signals_fd, selectors.EVENT_READ, self._on_signal)

    def serve(self) -> int:
        """Run until the device is gone; returns the exit code of the process."""
        while True:
            for key, mask in self._selector.select(self._wait_s()):
                key.data(mask)
            self._answer_resize()
            self._manager.look(lambda: summary(self._session, self._state))
            self._look_for_users()
            if self._outcome is not None:
                problem, gone = self._outcome
                self._outcome = None
                self._worker = None
                self._answer(problem)
                if gone:
                    self._refuse_resize()
                    self._server.close(linger_s=LINGER_S)
                    return int(problem.code) if problem else 0
                self._state = "live"
                self._hear_notices()
                os.eventfd_write(self._session.plane.notify_fd, 1)  # of what was said meanwhile

    def _wait_s(self) -> float | None:
        """Give the seconds until something is due by itself."""
        due = self._manager.wait_s(self._server.tick())
        if self._patient_until is None:
            return due
        return USERS_PERIOD_S if due is None else min(due, USERS_PERIOD_S)

    def signals(self, timeout_s: float = 0.0) -> bytes:
        """Take the numbers of signals that asked it to end; for when it has left already."""
        if select.select([self._signals_fd], [], [], timeout_s)[0]:
            return bytes(set(os.read(self._signals_fd, 64)) & set(ENDING))
        return b""

    # ---- requests ---------------------------------------------------------------------------

    def _on_status(self, _params: NoParams) -> dict[str, Any]:
        return describe(self._session, self._state)

    def _on_hydrate(self, params: HydrateParams) -> dict[str, Any]:
        hydration = self._session.hydration
        if params.rate is not None:
            hydration.set_rate(None if params.rate == "max" else params.rate)
        if params.run is not None:
            log("background hydration is " + ("on" if params.run else "paused"))
            if params.run:
                hydration.start()
            else:
                hydration.pause()
        self._session.keep_hydration()
        return describe(self._session, self._state)

    def _on_leave(self, params: LeaveParams) -> Deferred:
        if not self._session.device.recoverable:
            raise UbiError(f"{self._session.claim.name} was added with --no-recovery")
        if self._worker is not None:
            raise UbiError(f"{self._session.claim.name} is stopping", Exit.BUSY)
        if self._resizing is not None:
            raise UbiError(
                f"{self._session.claim.name} is being resized: try again when that is done",
                Exit.BUSY,
            )
        self.upgrader = params.upgrader
        answer = Deferred()
        self._waiting.append(answer)
        self._leave()
        return answer

    def _on_resize(self, params: ResizeParams) -> Deferred:
        answer = Deferred()
        if self._worker is not None or self._resizing is not None:
            raise UbiError(f"{self._session.claim.name} is busy: try again", Exit.BUSY)
        self._resizing = (answer, threading.Thread(
            target=self._do_resize, args=(params,), daemon=True,
        ))
        self._resizing[1].start()
        return answer

    def _do_resize(self, params: ResizeParams) -> None:
        result: int | UbiError
        try:
            result = prepare(self._session, params.size, keep_old_data=params.keep_old_data)
        except UbiError as error:
            result = error
        except Exception as error:
            result = UbiError(f"the daemon failed to resize: {error!r}")
        self._resized = result
        os.eventfd_write(self._wake, 1)

    def _answer_resize(self) -> None:
        if self._resizing is None or self._resized is None:
            return
        answer, result = self._resizing[0], self._resized
        self._resizing = self._resized = None
        if not isinstance(result, UbiError):
            result = self._take(result)
        if isinstance(result, UbiError):
            warn(result.message)
            answer.fail(result)
        else:
            log(f"the disk has {result} bytes now")
            answer.resolve({"size": result})

    def _take(self, size: int) -> int | UbiError:
        """Grow, unless the disk has begun to go, or to be another daemon's, meanwhile."""
        if self._worker is not None:
            return not_grown(self._session.claim.name)
        try:
            take(self._session, size)
        except UbiError as error:
            return error
        except Exception as error:
            return UbiError(f"the daemon failed to resize: {error!r}")
        return size

    def _refuse_resize(self) -> None:
        """Tell who waits for the disk to grow that it has gone."""
        if self._resizing is not None:
            self._resizing[0].fail(not_grown(self._session.claim.name))

    def _on_stop(self, params: StopParams) -> Deferred:
        answer = Deferred()
        self._waiting.append(answer)
        self._stop(force=params.force)
        return answer

    # ---- stopping, on a thread --------------------------------------------------------------

    def _stop(self, *, force: bool) -> None:
        """Begin to stop, unless that is under way."""
        self._begin(lambda: self._do_stop(force))

    def _leave(self) -> None:
        """Begin to leave the disk to another daemon, unless it is being stopped."""
        self._begin(self._do_leave)

    def _begin(self, work: Callable[[], None]) -> None:
        if self._worker is not None:
            return
        self._state = "stopping"
        # What I/O threads tell is for the worker to hear: who reads it here has it wait for more.
        self._selector.unregister(self._session.plane.notify_fd)
        self._worker = threading.Thread(target=work, daemon=True)
        self._worker.start()

    def _hear_notices(self) -> None:
        notify_fd = self._session.plane.notify_fd
        self._selector.register(notify_fd, selectors.EVENT_READ, self._on_notice)

    def _do_leave(self) -> None:
        problem: UbiError | None = None
        try:
            self._session.leave(on_purpose=self.upgrader is None)
        except Exception as error:
            problem = UbiError(f"the daemon failed to leave: {error!r}")
        self.left = True
        self._outcome = (problem, True)
        os.eventfd_write(self._wake, 1)

    def _do_stop(self, force: bool) -> None:
        problem: UbiError | None = None
        gone = False
        try:
            self._session.stop_disk(force=force)
            self._manager.stopping("the disk is gone: committing")
            problem = self._session.finish()
            gone = True
        except UbiError as error:
            problem = error
        except Exception as error:
            problem = UbiError(f"the daemon failed to stop: {error!r}")
        self._outcome = (problem, gone)
        os.eventfd_write(self._wake, 1)

    def _answer(self, problem: UbiError | None) -> None:
        if problem is not None:
            warn(problem.message)
        for answer in self._waiting:
            if problem is None:
                answer.resolve({"stopped": True})
            else:
                answer.fail(problem)
        self._waiting.clear()

    # ---- events -----------------------------------------------------------------------------

    def _on_wake(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _on_notice(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._session.plane.notify_fd)
        if self._session.release_image():
            log("the base has all of its image: independent of it")
        if self._session.upkeep.image_problem is not None:
            with contextlib.suppress(UbiError):  # no room in /run; `leave` tries once more
                self._session.record_state()
        if self._worker is None and not self._session.serves():
            log("the disk was taken away from outside; stopping")
            self._stop(force=True)

    def _on_signal(self, _mask: int) -> None:
        """Stop. A disk in use is left to the next daemon, if it can be.

        If it cannot, stopping is refused, but when a second signal comes soon after. When the host
        goes down (SIGPWR), its users are waited for first, and other signals say nothing new.
        """
        asked = self.signals()
        if not asked:
            return
        if signal.SIGPWR in asked and self._patient_until is None:
            self._patient_until = time.monotonic() + PATIENCE_S
            self._manager.stopping("the host goes down: waiting until nobody uses the disk")
        if self._patient_until is not None:
            self._look_for_users()
            return
        if self._session.device.recoverable and self._is_used():
            self._leave_to_the_next()
            return
        now = time.monotonic()
        force = now - self._signalled_at < SECOND_SIGNAL_S
        self._signalled_at = now
        log("asked to end by a signal" + (" again: taking the disk away" if force else ""))
        self._stop(force=force)

    def _look_for_users(self) -> None:
        """Stop as soon as nobody uses the disk any more, on a host that goes down."""
        now = time.monotonic()
        if self._patient_until is None or self._worker is not None or now < self._look_for_users_at:
            return
        self._look_for_users_at = now + USERS_PERIOD_S
        if not self._is_used():
            log("the host goes down, and nobody uses the disk: stopping")
            self._stop(force=False)
        elif now > self._patient_until:
            log(f"the host goes down, and the disk is in use after {PATIENCE_S:g} s")
            if self._session.device.recoverable:
                self._leave_to_the_next()
            else:
                self._stop(force=True)

    def _is_used(self) -> bool:
        return self._session.device.in_use(USERS_PATIENCE_S)

    def _leave_to_the_next(self) -> None:
        """Leave a disk that is in use, and say how it goes on."""
        name, unit = self._session.claim.name, own_unit()
        start = f"`systemctl start {unit}`" if unit is not None else f"`ublk-ubi recover {name}`"
        log(f"asked to end by a signal: leaving the disk, which is in use, to the next daemon; its "
            f"requests wait for {start}; `ublk-ubi del --force {name}` fails them")
        self._manager.stopping(f"left, in use: its requests wait for {start}")
        self._leave()

    def _catch_signals(self) -> int:
        """Signals become bytes in a pipe that the loop reads."""
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in ENDING:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        return read_fd


def has_taken_over(name: str) -> bool:
    """Tell whether another daemon serves the device `name`."""
    for device in runtime.all_devices():
        if device.name == name:
            return device.alive and not device.starting and device.pid != os.getpid()
    return True  # it was served, and deleted


def stand_by(name: str, upgrader: int, resume: threading.Event) -> bool:
    """Wait until another daemon serves the device; False when none will.

    `resume` (SIGUSR1) says so, or the end of the process that was to start it.
    """
    deadline = time.monotonic() + STAND_BY_S
    try:
        upgrader_fd = os.pidfd_open(upgrader)
    except OSError:
        upgrader_fd = -1
    try:
        while not has_taken_over(name):
            ended = upgrader_fd < 0
            if not ended:
                ended = bool(select.select([upgrader_fd], [], [], STAND_BY_POLL_S)[0])
            if resume.is_set() or ended or time.monotonic() > deadline:
                return has_taken_over(name)
    finally:
        if upgrader_fd >= 0:
            os.close(upgrader_fd)
    return True


def wait_for_end(pid: int, timeout_s: float | None = None) -> None:
    """Wait until a process has ended."""
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        select.select([fd], [], [], timeout_s)
        os.close(fd)


def hand_over(
    name: str, upgrader: int, manager: Manager, signals: Callable[[float], bytes],
) -> None:
    """Tell the service manager which process serves the disk now.

    Not before the upgrader has ended: only then the new daemon is a child of the manager's. What
    the manager asked of this process until it heard that (`signals`) is for the next one: then it
    hears of no other main process, and takes this one's end for the unit's.
    """
    if not manager.listens:
        return
    wait_for_end(upgrader, UPGRADER_END_S)
    for device in runtime.all_devices():
        if device.name == name and device.alive and device.pid is not None:
            manager.tell(f"MAINPID={device.pid}")
            manager.barrier(BARRIER_S)
            if numbers := signals(ASKED_S):
                for number in numbers:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(device.pid, number)
                wait_for_end(device.pid)


def serve_to_the_end(session: Session, daemon: Daemon, manager: Manager) -> int:
    """Serve; after leaving for an upgrade that came to nothing, serve on."""
    resume = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: resume.set())
    while True:
        resume.clear()
        code = daemon.serve()
        if not daemon.left or daemon.upgrader is None:
            return code
        name = session.claim.name
        if stand_by(name, daemon.upgrader, resume):
            hand_over(name, daemon.upgrader, manager, daemon.signals)
            return code
        log("no other daemon has come up: going on")
        session = Session(
            continued(session.options, name), notice=log, control=session.device.control,
            before=session,
        )
        session.start(recover=True)
        unheard = daemon.signals()
        daemon = Daemon(session, manager)
        for number in unheard:
            signal.raise_signal(number)
        log(f"{name} is live again: {session.info.disk_path}")


def run(
    options: DeviceOptions,
    ready: Callable[[dict[str, Any]], None],
    log_fd: int | None = None,
    *,
    recover: bool = False,
    control: Control | None = None,
) -> int:
    """Bring a device up, say so through `ready`, serve it to its end; returns the exit code.

    `log_fd` is the daemon's log (runtime.open_log), to be kept with the device; `control` was
    opened before, while nobody waited.

    Raises UbiError when it cannot be brought up; then nothing of it is left.
    """
    manager = Manager.of_this_process()
    session = Session(options, notice=manager.hears(log), control=control)
    late: list[int] = []

    def terminate(number: int, _frame: FrameType | None) -> None:
        if session.is_live:
            late.append(number)  # for the daemon that takes over in a moment
            return
        for other in ENDING:  # what is being undone is not to be interrupted in its turn
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(signal.Signals(number).name)

    for number in ENDING:
        signal.signal(number, terminate)
    try:
        with manager.patience():
            session.start(recover=recover)
    except Terminated as error:
        raise UbiError(f"ended by {error} before the device was live", Exit.FAILED) from None
    try:
        daemon = Daemon(session, manager)
        session.release_image()
        if log_fd is not None:
            session.claim.adopt_log(log_fd)
        for line in hygiene.refused:
            log(line)
        for warning in session.warnings:
            warn(f"warning: {warning}")
        log(f"{session.claim.name} is live: {session.info.disk_path}, {session.size} bytes")
        ready({
            "ok": True,
            "name": session.claim.name,
            "device": session.info.disk_path,
            "link": session.link,
            "id": session.info.id,
            "pid": os.getpid(),
            "size": session.size,
            "warnings": session.warnings,
        })
    except BaseException:
        session.take_back()
        raise
    for signal_number in late:
        signal.raise_signal(signal_number)
    if manager.listens:
        manager.ready(summary(session, "live"))
    gc.freeze()  # what there is by now stays; garbage of serving is small, and goes soon
    gc.set_threshold(*GC_THRESHOLD)
    return serve_to_the_end(session, daemon, manager)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the daemon process; what fails before it is live goes to the ready pipe."""
    with open(int((sys.argv[1:] if argv is None else argv)[0]), "rb") as file:
        task = msgspec.json.decode(file.read(), type=Task)
    ready_fd, go_fd = task.ready_fd, task.go_fd
    hygiene.close_inherited((ready_fd,) if go_fd is None else (ready_fd, go_fd))
    os.set_inheritable(ready_fd, False)
    standard().keep_bounded()
    hygiene.settle()
    told = False

    def tell(message: dict[str, Any]) -> None:
        nonlocal told
        told = True
        with contextlib.suppress(OSError):
            os.write(ready_fd, msgspec.json.encode(message) + b"\n")
        os.close(ready_fd)

    control = None
    try:
        if go_fd is not None:
            control = Control.open(fork=True)
            control.get_features()
            os.write(ready_fd, b'{"ready": true}\n')
            if not os.read(go_fd, 1):
                return int(Exit.FAILED)
            os.close(go_fd)
        return run(
            task.options, tell, log_fd=sys.stderr.fileno(), recover=task.recover, control=control,
        )
    except UbiError as error:
        warn(error.message)
        if not told:
            tell({"ok": False, "error": error.message, "exit": int(error.code)})
        return int(error.code)
    except Exception as error:
        if not told:
            tell({"ok": False, "error": f"the daemon failed: {error!r}", "exit": 1})
        raise


if __name__ == "__main__":
    sys.exit(main())

"""Hostile clients of a control socket: many, of every kind that comes to mind, on one thread."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

_STATUS = b'{"jsonrpc":"2.0","id":1,"method":"status"}\n'
_RECEIVE = 1 << 16
_TURN_S = 0.05
_FLOOD = 20                        # connections a turn of one that floods
KINDS = (
    "garbage", "half", "slow", "deaf", "oversized", "nested", "flood", "batches", "half-closed",
    "binary", "unknown", "impatient",
)


class Hostile:
    """One client: connects, does its worst, and comes again when it was thrown out."""

    def __init__(self, kind: str, path: str, rng: random.Random) -> None:
        self.kind = kind
        self.sock: socket.socket | None = None
        self._path = path
        self._rng = rng
        self._pending = b""
        self._sent = 0

    def connect(self) -> bool:
        """Connect, if the server's queue has room."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            return False
        self.sock = sock
        self._pending = self._first()
        self._sent = 0
        return True

    def _first(self) -> bytes:
        rng = self._rng
        return {
            "garbage": rng.randbytes(4096),
            "half": _STATUS[: rng.randrange(1, len(_STATUS) - 2)],
            "slow": _STATUS * 50,
            "deaf": _STATUS * 500,
            "oversized": b'{"jsonrpc":"2.0","id":1,"method":"' + b"x" * (256 << 10),
            "nested": b"[" * 5000,
            "flood": b"",
            "batches": b"[" + b",".join([_STATUS.strip()] * 200) + b"]\n",
            "half-closed": _STATUS,
            "binary": bytes(range(256)) * 16,
            "unknown": b'{"jsonrpc":"2.0","id":"%s","method":"%s","params":[1,2,{"a":null}]}\n'
                       % (b"i" * 300, b"m" * 3000) * 20,
            "impatient": _STATUS,
        }[self.kind]

    def turn(self) -> bool:
        """Do a little more; False when the server has thrown it out, or it leaves by itself."""
        sock = self.sock
        assert sock is not None
        try:
            if self._pending:
                piece = self._pending[:1] if self.kind == "slow" else self._pending
                sent = sock.send(piece)
                self._pending = self._pending[sent:]
                self._sent += sent
            if self.kind == "half-closed" and not self._pending:
                sock.shutdown(socket.SHUT_WR)
            if self.kind in ("flood", "impatient") and not self._pending:
                return False
            if self.kind != "deaf" and sock.recv(_RECEIVE) == b"":
                return False
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class Mob:
    """So many hostile clients at once, until it is closed. `turns` counts what they did by kind."""

    def __init__(self, path: Path, count: int, seed: int) -> None:
        self.turns: Counter[str] = Counter()
        self.connections = 0
        self._path = str(path)
        rng = random.Random(seed)
        self._clients = [
            Hostile(KINDS[n % len(KINDS)], self._path, random.Random(rng.random()))
            for n in range(count)
        ]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        for client in self._clients:
            client.close()

    def _run(self) -> None:
        while not self._end.is_set():
            for client in self._clients:
                if client.sock is None and not self._come(client):
                    continue
                if client.kind == "flood":
                    self._flood(client)
                elif not client.turn():
                    client.close()
                self.turns[client.kind] += 1
            time.sleep(_TURN_S)

    def _come(self, client: Hostile) -> bool:
        came = client.connect()
        self.connections += came
        return came

    def _flood(self, client: Hostile) -> None:
        client.close()
        for _ in range(_FLOOD):
            with contextlib.suppress(OSError):
                if not self._come(client):
                    return
            client.close()

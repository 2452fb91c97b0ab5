"""JSON-RPC 2.0 on a UNIX socket, the client's side: one request, one answer, one time limit.

`rpc_server` is the other side. Requests and answers are JSON objects one after the other.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

import msgspec

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.framing import Framer, FramingError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_RESPONSE = 1 << 20
ATTEMPTS = 3
_SUN_PATH = 107  # bytes of a path in a socket's address


class Error(msgspec.Struct, omit_defaults=True):
    """The `error` of an answer; `data` holds the exit code of an expected failure."""

    code: int
    message: str
    data: dict[str, Any] | None = None


class _Response(msgspec.Struct):
    id: Any
    result: Any = None
    error: Error | None = None


class NoAnswerError(UbiError):
    """The daemon cannot be reached, or went away before it answered."""


class RpcError(UbiError):
    """An answer's error, with its JSON-RPC code: ours, or a negative errno as SPDK has them."""

    def __init__(self, message: str, rpc_code: int, code: Exit = Exit.FAILED) -> None:
        super().__init__(message, code)
        self.rpc_code = rpc_code


def call(path: str, method: str, params: object = None, timeout_s: float = 5.0) -> Any:
    """Send one request to the socket at `path` and return its result.

    A server that is swamped may close a connection before it has read it: that is tried again, so
    methods must stand being called twice. Raises UbiError: the server's own, with its exit code;
    NoAnswerError when nobody listens or the connection ends first, or, with the code for timed
    out, after `timeout_s` seconds in all.
    """
    deadline = time.monotonic() + timeout_s
    request: dict[str, object] = {"jsonrpc": "2.0", "id": 1, "method": method}
    if params is not None:
        request["params"] = params
    data = msgspec.json.encode(request) + b"\n"
    try:
        for _ in range(ATTEMPTS):
            text = _exchange(path, data, deadline)
            if text is not None:
                return _result_of(msgspec.json.decode(text, type=_Response))
    except TimeoutError:
        message = f"{path}: no answer to {method!r} within {timeout_s:g} s"
        raise NoAnswerError(message, Exit.TIMED_OUT) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise NoAnswerError(f"{path}: no daemon listens there") from None
    except (FramingError, msgspec.MsgspecError, UnicodeError) as error:
        raise NoAnswerError(f"{path}: the answer makes no sense: {error}") from None
    except OSError as error:
        raise NoAnswerError(f"{path}: {error.strerror}") from None
    raise NoAnswerError(f"{path}: the daemon went away before it answered")


def _exchange(path: str, request: bytes, deadline: float) -> bytes | None:
    """Connect, send, and give the answer's text; None if the connection ended without a byte."""
    framer = Framer(MAX_RESPONSE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        _connect(sock, path, deadline)
        _until(sock, deadline)
        try:
            sock.sendall(request)
            while (text := framer.next()) is None:
                _until(sock, deadline)
                data = sock.recv(framer.room)
                if not data:
                    break
                framer.feed(data)
        except (BrokenPipeError, ConnectionResetError):
            text = None
    if text is None and framer.partial:
        raise NoAnswerError(f"{path}: the daemon went away in the middle of its answer")
    return text


def _result_of(response: _Response) -> Any:
    """Return an answer's result, or raise its error with the exit code that it names."""
    if response.error is None:
        return response.result
    code = Exit.FAILED
    with contextlib.suppress(ValueError):
        code = Exit((response.error.data or {}).get("exit", code))
    raise RpcError(response.error.message, response.error.code, code)


def _connect(sock: socket.socket, path: str, deadline: float) -> None:
    """Connect, in turn with all who wait for a place in the server's queue.

    The limit is the kernel's: with one of Python's the socket would not block, and a full queue
    be an error at once; who tries again and again goes empty where others wait.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    limit = struct.pack("@ll", int(left), int(left % 1 * 1e6) + 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    with short_path(path) as short:
        try:
            sock.connect(short)
        except BlockingIOError:
            raise TimeoutError from None


def _until(sock: socket.socket, deadline: float) -> None:
    """Let the socket's next call wait until the deadline, no longer."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)


@contextlib.contextmanager
def short_path(path: str) -> Iterator[str]:
    """Give a path for `path` that fits into a socket's address."""
    if len(os.fsencode(path)) <= _SUN_PATH:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)

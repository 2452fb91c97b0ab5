"""JSON-RPC 2.0 on a UNIX socket, the server's side: inside a daemon, on its main thread.

The server has no loop and no thread of its own. It registers its sockets in the owner's selector
with a callback as `data`, so the owner's loop is

    for key, mask in selector.select(server.tick()):
        key.data(mask)

and nothing in here ever waits. Everything is bounded: clients, bytes held for each in both
directions, requests answered in a turn, answers still owed. Who does not read is not read from;
who is idle makes room. Requests are objects one after the other, as SPDK frames them; arrays of
requests (batches) where the owner allows them.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import socket
import stat
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.framing import Framer, FramingError
from ublk_ubi.rpc import Error, RpcError, short_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Method = tuple[Any, Callable[[Any], object]]

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
FAILED = -32000  # an expected failure; its `data.exit` is the exit code of the command

MAX_REQUEST = 64 << 10
MAX_CLIENTS = 64
MAX_OWED = 8  # answers to one client that come later
MAX_WAITING = 32  # clients that wait for such answers: there is always room for others
MAX_UNREAD = 64 << 10  # bytes for one client, beyond which its requests wait
MAX_TURN = 8  # requests of one client in one turn
MAX_ACCEPTS = 16
MAX_ID = 256
IDLE_TIMEOUT_S = 60.0
ACCEPT_PAUSE_S = 1.0


class Limits(NamedTuple):
    """What a server holds at most; a device daemon's, unless told."""

    request: int = MAX_REQUEST
    clients: int = MAX_CLIENTS
    owed: int = MAX_OWED
    waiting: int = MAX_WAITING  # less than `clients`
    batch: int = 0  # requests in one array, all answered in one turn; 0: batches are refused
    idle: bool = False  # who asks nothing may stay, as long as there is room


DEFAULT_LIMITS = Limits()


class NoParams(msgspec.Struct, forbid_unknown_fields=True):
    """The parameters of a method that has none."""


class _Request(msgspec.Struct):
    method: str
    jsonrpc: str = "2.0"
    params: msgspec.Raw = msgspec.Raw(b"{}")
    id: msgspec.Raw = msgspec.Raw(b"")


class _Identified(msgspec.Struct):
    id: msgspec.Raw = msgspec.Raw(b"null")


class Deferred:
    """An answer that a handler owes; `resolve` or `fail` pays it, once, from the loop's thread."""

    def __init__(self) -> None:
        self.wanted = True
        """Whether somebody may still wait for it: who answers may look now and then."""

        self._deliver: Callable[[bytes], None] | None = None
        self._answer: tuple[object, UbiError | None] | None = None
        self._id = b""

    def resolve(self, result: object = None) -> None:
        """Answer with a result; the client may have gone, which is no error."""
        self._settle(result, None)

    def fail(self, error: UbiError) -> None:
        """Answer with an expected failure."""
        self._settle(None, error)

    def _settle(self, result: object, error: UbiError | None) -> None:
        assert self._answer is None, "answered twice"
        self._answer = (result, error)
        self._pay()

    def _promise(self, request_id: bytes, deliver: Callable[[bytes], None]) -> None:
        self._id, self._deliver = request_id, deliver
        self._pay()

    def _pay(self) -> None:
        if self._deliver is None or self._answer is None:
            return
        result, error = self._answer
        try:
            answer = _failure(self._id, error) if error else _success(self._id, result)
        except (TypeError, ValueError, RecursionError) as wrong:
            answer = _failure_text(self._id, INTERNAL_ERROR, f"internal error: {wrong}")
        self._deliver(answer)


class _Client:
    """One connection: what it sent, what it has not read, what it is owed."""

    def __init__(self, sock: socket.socket, now: float, limit: int) -> None:
        self.sock = sock
        self.framer = Framer(limit)
        self.unread = bytearray()
        self.debts: set[Deferred] = set()
        self.active = now
        self.mask = 0
        self.more = False  # requests are left over from the last turn
        self.ended = False  # it sends no more
        self.broken = False  # its stream makes no sense: close once it has read why

    @property
    def owed(self) -> int:
        """Answers that come later."""
        return len(self.debts)


class _Batch(Deferred):
    """The answers to an array of requests, paid when the last of them is."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: list[bytes] = []
        self.parts: list[Deferred] = []
        self._missing = 0
        self._complete = False

    def add(self, request_id: bytes, answer: bytes | Deferred) -> None:
        """Take one request's answer, which may come later; a notification has none."""
        if isinstance(answer, Deferred):
            if request_id:
                self.parts.append(answer)
                self._missing += 1
                answer._promise(request_id, self._take)
        elif request_id:
            self._answers.append(answer.strip())

    def complete(self) -> None:
        """All requests were handled."""
        self._complete = True
        self._pay()

    def _take(self, answer: bytes) -> None:
        self._answers.append(answer.strip())
        self._missing -= 1
        self._pay()

    def _promise(self, _request_id: bytes, deliver: Callable[[bytes], None]) -> None:
        self._deliver = deliver
        self._pay()

    def _pay(self) -> None:
        if self._deliver is None or not self._complete or self._missing:
            return
        deliver, self._deliver = self._deliver, None
        deliver(b"[" + b",".join(self._answers) + b"]\n" if self._answers else b"")


class Server:
    """Answers requests on one socket (mode 0600). Construct, then let the owner's loop drive it.

    `methods` maps a name to its parameters' type and a handler, which gets an instance of it and
    returns the result, or a `Deferred`; `other` gives that for names that it does not have. A
    handler's UbiError becomes the answer's error; any other exception an internal error, told to
    `report`.
    """

    def __init__(
        self,
        path: str,
        methods: Mapping[str, Method],
        selector: selectors.BaseSelector,
        *,
        other: Callable[[str], Method | None] = lambda _name: None,
        limits: Limits = DEFAULT_LIMITS,
        report: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        self._path = path
        self._methods = methods
        self._other = other
        self._limits = limits
        self._selector = selector
        self._report = report or (lambda _text: None)
        self._clock = clock
        self._idle_timeout_s = idle_timeout_s
        self._clients: dict[int, _Client] = {}
        self.serving: object = None
        """Stands for the client whose request is being handled."""

        self._socket = _listen(path)
        self._selector.register(self._socket, selectors.EVENT_READ, self._on_connection)
        self._accepting = True
        self._accept_at = 0.0

    def tick(self) -> float | None:
        """Close who was idle too long; return the seconds until the next call is due, if any."""
        now = self._clock()
        deadlines = []
        if not self._accepting and now >= self._accept_at:
            self._selector.register(self._socket, selectors.EVENT_READ, self._on_connection)
            self._accepting = True
        if not self._accepting:
            deadlines.append(self._accept_at)
        for client in list(self._clients.values()):
            stays = client.owed or (self._limits.idle and not client.framer.partial)
            if stays and not client.unread:
                continue  # it waits for us, not we for it
            deadline = client.active + self._idle_timeout_s
            if deadline <= now:
                self._drop(client)
            else:
                deadlines.append(deadline)
        return max(0.0, min(deadlines) - now) if deadlines else None

    def close(self, *, linger_s: float = 0.0) -> None:
        """Take no more requests, let clients read answers up to `linger_s`, remove the socket."""
        if self._socket.fileno() < 0:
            return
        if self._accepting:
            self._selector.unregister(self._socket)
        self._socket.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        deadline = time.monotonic() + linger_s
        clients = list(self._clients.values())
        # One that does not read must not use up the time of those that do: hence two rounds.
        for limit in (0.0, deadline):
            for client in clients:
                with contextlib.suppress(OSError):
                    while client.unread:
                        client.sock.settimeout(max(0.0, limit - time.monotonic()))
                        del client.unread[: client.sock.send(client.unread)]
        for client in clients:
            self._drop(client)

    def _on_connection(self, _mask: int) -> None:
        """Accept a few; when full, the one that has been silent longest makes room."""
        for _ in range(MAX_ACCEPTS):
            try:
                sock, _address = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors or memory: look again in a while
                self._report(f"control socket: cannot accept: {error.strerror}")
                self._selector.unregister(self._socket)
                self._accepting = False
                self._accept_at = self._clock() + ACCEPT_PAUSE_S
                return
            sock.setblocking(False)
            if len(self._clients) >= self._limits.clients:
                idle = [client for client in self._clients.values() if not client.owed]
                self._drop(min(idle, key=lambda client: client.active))
            client = _Client(sock, self._clock(), self._limits.request)
            self._clients[sock.fileno()] = client
            # Its request is here already, as a rule. Once answered, it may well make room.
            self._serve(client, selectors.EVENT_READ)

    def _serve(self, client: _Client, mask: int) -> None:
        """Read, answer, write: as far as it goes without waiting."""
        if client.sock.fileno() < 0:
            return  # it made room for another since the selector reported it
        try:
            if mask & selectors.EVENT_READ:
                self._receive(client)
            self._answer(client)
            self._send(client)
            self._settle(client)
        except OSError:
            self._drop(client)
        except Exception as error:
            # A fault of ours with one client must not take a disk down.
            self._report(f"control socket: client dropped: {_described(error)}")
            self._drop(client)

    def _receive(self, client: _Client) -> None:
        try:
            data = client.sock.recv(max(1, client.framer.room))
        except BlockingIOError:
            return
        if data:
            client.framer.feed(data)
            # Drip-feeding one request keeps no place: only a request's first bytes count.
        else:
            client.ended = True

    def _answer(self, client: _Client) -> None:
        """Answer whole requests, until the client owes us reading or has had its turn."""
        client.more = False
        for turn in range(MAX_TURN + 1):
            if client.broken or self._is_blocked(client):
                return
            if turn == MAX_TURN:
                client.more = True
                return
            try:
                text = client.framer.next()
            except FramingError as error:
                self._break(client, error.message)
                return
            if text is None:
                return
            client.active = self._clock()
            self._handle(client, text)

    def _break(self, client: _Client, reason: str) -> None:
        client.unread += _failure_text(b"null", PARSE_ERROR, f"parse error: {reason}")
        client.broken = True

    def _handle(self, client: _Client, text: bytes) -> None:
        """Answer one request, or a batch, now or by a Deferred."""
        self.serving = client
        try:
            request_id, answer = self._batch(text) if text[:1] == b"[" else self._call(text)
        except (msgspec.DecodeError, UnicodeError) as error:
            self._break(client, str(error))
            return
        if isinstance(answer, Deferred):
            if request_id:
                self._owe(client, request_id, answer)
        elif request_id:
            client.unread += answer

    def _owe(self, client: _Client, request_id: bytes, answer: Deferred) -> None:
        """Promise an answer, unless too many wait already."""
        if not client.owed and self._waiting() >= self._limits.waiting:
            refusal = UbiError("too many clients wait for an answer: try again later", Exit.BUSY)
            client.unread += _failure(request_id, refusal)
            return
        client.debts.add(answer)
        answer._promise(request_id, lambda data: self._deliver(client, answer, data))

    def _waiting(self) -> int:
        """Count the clients that wait; when that is too many, those who left go first."""
        if sum(1 for client in self._clients.values() if client.owed) >= self._limits.waiting:
            self.drop_who_left()
        return sum(1 for client in self._clients.values() if client.owed)

    def drop_who_left(self) -> None:
        """Notice who waits for an answer no more."""
        waiting = [client for client in self._clients.values() if client.owed]
        poll = select.poll()
        for client in waiting:
            poll.register(client.sock, 0)  # a hang-up is always told
        left = {fd for fd, _ in poll.poll(0)}
        for client in waiting:
            if client.sock.fileno() in left:
                self._drop(client)

    def _batch(self, text: bytes) -> tuple[bytes, bytes | Deferred]:
        """Answer an array of requests by one of answers. Raises msgspec.DecodeError."""
        requests = msgspec.json.decode(text, type=list[msgspec.Raw])
        if not 0 < len(requests) <= self._limits.batch:
            message = f"a batch has 1 to {self._limits.batch} requests, not {len(requests)}"
            if not self._limits.batch:
                message = "batches are not supported"
            return b"null", _failure_text(b"null", INVALID_REQUEST, message)
        batch = _Batch()
        for request in requests:
            batch.add(*self._call(bytes(request)))
        batch.complete()
        return b"null", batch

    def _call(self, text: bytes) -> tuple[bytes, bytes | Deferred]:
        """Decode a request and run its handler; the id is empty for a notification.

        Raises msgspec.DecodeError for what is no JSON at all.
        """
        try:
            request = _decode_request(text)
        except msgspec.ValidationError as error:
            return b"null", _failure_text(_salvage_id(text), INVALID_REQUEST, str(error))
        request_id = bytes(request.id)
        method = self._methods.get(request.method) or self._other(request.method)
        if method is None:
            message = f"unknown method {request.method[:64]!r}"
            return request_id, _failure_text(request_id, METHOD_NOT_FOUND, message)
        params_type, handler = method
        # SPDK takes null for no parameters, and so do its clients.
        given = b"{}" if bytes(request.params) == b"null" else request.params
        try:
            params = msgspec.json.decode(given, type=params_type)
        except msgspec.DecodeError as error:
            return request_id, _failure_text(request_id, INVALID_PARAMS, str(error))
        try:
            result = handler(params)
            if isinstance(result, Deferred):
                return request_id, result
            return request_id, _success(request_id, result)
        except UbiError as error:
            return request_id, _failure(request_id, error)
        except Exception as error:
            self._report(f"control socket: {request.method} failed: {_described(error)}")
            return request_id, _failure_text(request_id, INTERNAL_ERROR, "internal error: see log")

    def _deliver(self, client: _Client, answer: Deferred, data: bytes) -> None:
        """Queue an answer that was owed; it is sent, and requests that waited go on, next turn."""
        client.debts.discard(answer)
        if self._clients.get(client.sock.fileno()) is not client:
            return  # it has gone
        client.unread += data
        client.more = True
        client.active = self._clock()
        self._rearm(client)

    def _send(self, client: _Client) -> None:
        if client.unread:
            with contextlib.suppress(BlockingIOError):
                del client.unread[: client.sock.send(client.unread)]
                client.active = self._clock()

    def _settle(self, client: _Client) -> None:
        """Close a client that is done with, or wait for what it can do next."""
        finished = client.broken or (client.ended and not client.more)
        if finished and not client.unread and not client.owed:
            self._drop(client)
        else:
            self._rearm(client)

    def _rearm(self, client: _Client) -> None:
        mask = 0
        blocked = self._is_blocked(client) or client.more
        if not (blocked or client.ended or client.broken) and client.framer.room:
            mask |= selectors.EVENT_READ
        if client.unread or client.more:
            mask |= selectors.EVENT_WRITE
        if mask == client.mask:
            return
        if client.mask == 0:
            self._selector.register(client.sock, mask, lambda ready: self._serve(client, ready))
        elif mask == 0:
            self._selector.unregister(client.sock)
        else:
            self._selector.modify(client.sock, mask, lambda ready: self._serve(client, ready))
        client.mask = mask

    def _is_blocked(self, client: _Client) -> bool:
        """Tell whether its next request has to wait: until it reads, or until it is answered."""
        return len(client.unread) > MAX_UNREAD or client.owed >= self._limits.owed

    def _drop(self, client: _Client) -> None:
        for debt in client.debts:
            for answer in (debt, *(debt.parts if isinstance(debt, _Batch) else ())):
                answer.wanted = False
        if client.mask:
            self._selector.unregister(client.sock)
            client.mask = 0
        self._clients.pop(client.sock.fileno(), None)
        client.sock.close()


def _listen(path: str) -> socket.socket:
    """Bind and listen; a socket that a dead daemon left is replaced. Raises UbiError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _clear_the_way(path)
        with short_path(path) as short:
            sock.bind(short)
        os.chmod(path, 0o600)  # before listen: nobody can have connected
        sock.listen(128)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise UbiError(f"{path}: cannot listen: {error.strerror}") from None
    except UbiError:
        sock.close()
        raise
    return sock


def _clear_the_way(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UbiError(f"{path} is in the way: it is not a socket")
        os.unlink(path)


def _decode_request(text: bytes) -> _Request:
    """Decode and check what the decoder does not. Raises msgspec.DecodeError."""
    request = msgspec.json.decode(text, type=_Request)
    if request.jsonrpc != "2.0":
        raise msgspec.ValidationError("jsonrpc must be '2.0'")
    if not _is_id(bytes(request.id)):
        raise msgspec.ValidationError("id must be a string, a number or null")
    return request


def _is_id(raw: bytes) -> bool:
    if not raw or len(raw) > MAX_ID:
        return not raw
    try:
        msgspec.json.decode(raw, type=str | int | float | None)
    except (msgspec.DecodeError, UnicodeError):
        return False
    return True


def _salvage_id(text: bytes) -> bytes:
    """Find the id of an invalid request, so that its sender can tell which one it was."""
    with contextlib.suppress(msgspec.DecodeError):
        raw = bytes(msgspec.json.decode(text, type=_Identified).id)
        if _is_id(raw):
            return raw
    return b"null"


def _success(request_id: bytes, result: object) -> bytes:
    body = msgspec.json.encode(result)
    return b'{"jsonrpc":"2.0","id":' + request_id + b',"result":' + body + b"}\n"


def _failure(request_id: bytes, error: UbiError) -> bytes:
    rpc_code = error.rpc_code if isinstance(error, RpcError) else FAILED
    return _failure_text(request_id, rpc_code, error.message, {"exit": int(error.code)})


def _failure_text(
    request_id: bytes, code: int, message: str, data: dict[str, Any] | None = None,
) -> bytes:
    body = msgspec.json.encode(Error(code, message, data))
    return b'{"jsonrpc":"2.0","id":' + (request_id or b"null") + b',"error":' + body + b"}\n"


def _described(error: BaseException) -> str:
    """Say what failed and where: a live daemon has no sources for `traceback` to read."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return f"{error!r} at {' > '.join(places)}"

"""The control socket: what a client gets, and that hostile clients harm nobody."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from ublk_ubi import rpc_server
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.rpc import NoAnswerError, RpcError, call
from ublk_ubi.rpc_server import DEFAULT_LIMITS, Deferred, Limits, NoParams, Server

if TYPE_CHECKING:
    from pathlib import Path


class Echo(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    number: int = 0


class Harness:
    """A server on a thread, driven by a loop as a daemon has it."""

    def __init__(self, path: Path, limits: Limits = DEFAULT_LIMITS) -> None:
        self.path = str(path)
        self.now = 0.0  # added to the clock
        self.reports: list[str] = []
        self.deferred: list[Deferred] = []
        self.seen: list[Any] = []
        self.selector = selectors.DefaultSelector()
        self.jobs: list[Any] = []
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK)
        self.selector.register(self.wake_read, selectors.EVENT_READ, self.on_wake)
        self.server = Server(
            self.path,
            {
                "echo": (Echo, self.echo),
                "fail": (NoParams, self.fail),
                "fail_as_spdk_does": (NoParams, self.fail_as_spdk_does),
                "crash": (NoParams, lambda _: 1 / 0),
                "odd": (NoParams, lambda _: object()),
                "big": (NoParams, lambda _: "x" * 10_000),
                "later": (NoParams, self.later),
                "at_once": (NoParams, self.at_once),
            },
            self.selector,
            limits=limits,
            report=self.reports.append,
            clock=lambda: time.monotonic() + self.now,
        )
        self.running = True
        self.longest_turn_s = 0.0
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def loop(self) -> None:
        while self.running:
            ready = self.selector.select(self.server.tick())
            started = time.thread_time()
            for key, mask in ready:
                key.data(mask)
            self.longest_turn_s = max(self.longest_turn_s, time.thread_time() - started)

    def on_wake(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_read, 100)
        while self.jobs:
            self.jobs.pop(0)()

    def do(self, job) -> None:
        """Run something on the loop's thread and wait for it."""
        done = threading.Event()
        self.jobs.append(lambda: (job(), done.set()))
        os.write(self.wake_write, b"x")
        assert done.wait(5)

    def end(self) -> None:
        if self.thread.is_alive():
            self.do(lambda: setattr(self, "running", False))
            self.thread.join()
        self.server.close()
        assert len(self.selector.get_map()) == 1
        self.selector.close()
        os.close(self.wake_read)
        os.close(self.wake_write)

    def echo(self, params: Echo) -> dict[str, Any]:
        self.seen.append(params)
        return {"text": params.text, "number": params.number}

    def fail(self, _params: NoParams) -> None:
        raise UbiError("it is open", Exit.BUSY)

    def fail_as_spdk_does(self, _params: NoParams) -> None:
        raise RpcError("it exists", -17)

    def later(self, _params: NoParams) -> Deferred:
        self.deferred.append(Deferred())
        return self.deferred[-1]

    def at_once(self, _params: NoParams) -> Deferred:
        answer = Deferred()
        answer.resolve("now")
        return answer

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)  # without a limit: it waits for a place in the queue
        sock.settimeout(5)
        return sock

    def clients(self) -> int:
        found: list[int] = []
        self.do(lambda: found.append(len(self.server._clients)))
        return found[0]

    def wait_for_clients(self, count: int) -> None:
        deadline = time.monotonic() + 10
        while self.clients() != count:
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture
def harness(tmp_path: Path):
    made = Harness(tmp_path / "control.sock")
    yield made
    made.end()


def answers(sock: socket.socket, count: int) -> list[dict[str, Any]]:
    """Read `count` answers; each is one line."""
    data = b""
    while data.count(b"\n") < count:
        piece = sock.recv(1 << 16)
        if not piece:
            break
        data += piece
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def ask(harness: Harness, data: bytes, count: int = 1) -> list[dict[str, Any]]:
    with harness.connect() as sock:
        sock.sendall(data)
        return answers(sock, count)


def request(method: str = "echo", request_id: object = 1, **params: object) -> bytes:
    return json.dumps(
        {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params},
    ).encode()


# what honest clients get ---------------------------------------------------------------------


def test_call(harness: Harness) -> None:
    assert call(harness.path, "echo", {"text": "ä", "number": 5}) == {"text": "ä", "number": 5}


def test_socket_is_for_its_owner_only(harness: Harness) -> None:
    assert stat.S_IMODE(os.stat(harness.path).st_mode) == 0o600


def test_errors_carry_the_exit_code(harness: Harness) -> None:
    with pytest.raises(UbiError, match=r"^it is open$") as caught:
        call(harness.path, "fail")
    assert caught.value.code == Exit.BUSY
    (answer,) = ask(harness, request("fail", "id"))
    assert answer == {
        "jsonrpc": "2.0", "id": "id",
        "error": {"code": -32000, "message": "it is open", "data": {"exit": 5}},
    }


def test_null_stands_for_no_parameters(harness: Harness) -> None:
    """SPDK and its clients have it so; what is missing is told all the same."""
    data = b'{"jsonrpc":"2.0","id":1,"method":"%s","params":null}'
    assert ask(harness, data % b"big")[0]["result"] == "x" * 10_000
    assert "text" in ask(harness, data % b"echo")[0]["error"]["message"]


def test_errors_may_have_a_code_of_their_own(harness: Harness) -> None:
    with pytest.raises(RpcError) as caught:
        call(harness.path, "fail_as_spdk_does")
    assert (caught.value.rpc_code, caught.value.message, caught.value.code) == (
        -17, "it exists", Exit.FAILED)
    with pytest.raises(RpcError) as caught:
        call(harness.path, "nope")
    assert caught.value.rpc_code == -32601


@pytest.mark.parametrize("separator", [b"", b"\n", b" \r\n\t"])
def test_objects_one_after_the_other(harness: Harness, separator: bytes) -> None:
    data = separator.join(request(request_id=number, text="x") for number in range(100))
    assert [answer["id"] for answer in ask(harness, data, 100)] == list(range(100))


def test_byte_by_byte(harness: Harness) -> None:
    with harness.connect() as sock:
        for byte in request(text='}"\\{'):
            sock.sendall(bytes([byte]))
        assert answers(sock, 1)[0]["result"]["text"] == '}"\\{'


@pytest.mark.parametrize("request_id", [0, -1, 1.5, "x", "", "\u20ac", None, 2**63, 10**30])
def test_ids_come_back_as_they_are(harness: Harness, request_id: object) -> None:
    assert ask(harness, request(request_id=request_id, text="x"))[0]["id"] == request_id


def test_notifications_get_no_answer(harness: Harness) -> None:
    silent = b'{"jsonrpc":"2.0","method":"echo","params":{"text":"silent"}}'
    unknown = b'{"jsonrpc":"2.0","method":"nope"}'
    later = b'{"jsonrpc":"2.0","method":"later"}'
    (answer,) = ask(harness, silent + unknown + later + request(request_id=9, text="x"))
    assert answer["id"] == 9
    assert [params.text for params in harness.seen] == ["silent", "x"]
    harness.do(harness.deferred[0].resolve)


def test_half_closed_client_gets_its_answer(harness: Harness) -> None:
    with harness.connect() as sock:
        sock.sendall(request(text="x"))
        sock.shutdown(socket.SHUT_WR)
        assert answers(sock, 1)[0]["result"]["text"] == "x"
        assert sock.recv(1) == b""


def test_answers_that_come_later(harness: Harness) -> None:
    with harness.connect() as one, harness.connect() as two:
        one.sendall(request("later", "a") + request(request_id="b", text="x"))
        two.sendall(request("later", "c"))
        assert answers(one, 1)[0]["id"] == "b"
        while len(harness.deferred) < 2:
            time.sleep(0.001)
        harness.do(lambda: harness.deferred[0].resolve({"stopped": True}))
        harness.do(lambda: harness.deferred[1].fail(UbiError("no", Exit.TIMED_OUT)))
        by_id = {a["id"]: a for a in answers(one, 1) + answers(two, 1)}
    assert set(by_id) == {"a", "c"}


def test_a_client_that_left_is_not_waited_for(harness: Harness) -> None:
    with harness.connect() as sock:
        sock.sendall(request("later"))
        while not harness.deferred:
            time.sleep(0.001)
    harness.do(harness.deferred[0].resolve)
    harness.wait_for_clients(0)


def test_an_answer_owed_is_no_idleness(harness: Harness) -> None:
    with harness.connect() as sock:
        sock.sendall(request("later"))
        while not harness.deferred:
            time.sleep(0.001)
        harness.now += 10 * rpc_server.IDLE_TIMEOUT_S
        harness.do(lambda: None)
        harness.do(lambda: harness.deferred[0].resolve("x"))
        assert answers(sock, 1)[0]["result"] == "x"


def test_thousands_of_answers_at_once_do_not_recurse(harness: Harness) -> None:
    count = 1500
    data = request("at_once") * count
    with harness.connect() as sock:
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        assert len(answers(sock, count)) == count
        sender.join()


def test_close_lets_answers_be_read(tmp_path: Path) -> None:
    harness = Harness(tmp_path / "control.sock")
    with harness.connect() as stuck, harness.connect() as sock:
        # Much more than a socket's buffer holds, and nobody reads it.
        stuck.sendall(request("big") * 100)
        sock.sendall(request("later"))
        while not harness.deferred:
            time.sleep(0.001)

        def stop() -> None:
            harness.deferred[0].resolve({"stopped": True})
            harness.running = False

        harness.do(stop)
        harness.thread.join()
        started = time.monotonic()
        harness.server.close(linger_s=0.3)
        assert time.monotonic() - started < 5
        assert answers(sock, 1)[0]["result"] == {"stopped": True}
        assert sock.recv(1) == b""
    assert not os.path.exists(harness.path)
    harness.end()


# errors of the protocol ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code", "request_id"),
    [
        (b'{"jsonrpc":"2.0","id":1,"method":"nope"}', -32601, 1),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo"}', -32602, 1),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo","params":{"text":1}}', -32602, 1),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo","params":{"text":"x","y":1}}', -32602, 1),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo","params":["x"]}', -32602, 1),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo","params":null}', -32602, 1),
        (b'{"jsonrpc":"2.0","id":1}', -32600, 1),
        (b'{"jsonrpc":"2.0","id":1,"method":5}', -32600, 1),
        (b'{"jsonrpc":"1.0","id":1,"method":"echo"}', -32600, 1),
        (b'{"jsonrpc":"2.0","id":{},"method":"echo"}', -32600, None),
        (b'{"jsonrpc":"2.0","id":[1],"method":"echo"}', -32600, None),
        (b'{"jsonrpc":"2.0","id":true,"method":"echo"}', -32600, None),
        (b'{"jsonrpc":"2.0","id":"' + b"x" * 300 + b'","method":"echo"}', -32600, None),
        (b'{"jsonrpc":"2.0","id":"\xff","method":"echo"}', -32600, None),
        (b"{}", -32600, None),
        (b"[]", -32600, None),
        (b'[{"jsonrpc":"2.0","id":1,"method":"echo"}]', -32600, None),
        (b'{"jsonrpc":"2.0","id":1,"method":"crash"}', -32603, 1),
        (b'{"jsonrpc":"2.0","id":1,"method":"odd"}', -32603, 1),
    ],
)
def test_errors_that_leave_the_stream_usable(harness, data, code, request_id) -> None:
    wrong, right = ask(harness, data + request(request_id="next", text="x"), 2)
    assert (wrong["error"]["code"], wrong["id"]) == (code, request_id)
    assert "\n" not in wrong["error"]["message"]
    assert right["id"] == "next"


@pytest.mark.parametrize(
    "data",
    [
        b"garbage",
        b"\0\1\2\3",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"}",
        b"1",
        b"{]",
        b"{,}",
        b'{"a":}',
        b'{"method":"\xff\xfe"}',
        b"{'a':1}",
        b'{"a":01}',
        b'{"a":"\n"}',
        b"[" * 1000,
        b'{"a":' * 50,
        b'{"a":"' + b"x" * (70 << 10),
        b'{"a":' + b"1" * (70 << 10),
        b"{" + b" " * (70 << 10),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_streams_that_make_no_sense_are_told_and_closed(harness, data) -> None:
    with harness.connect() as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
        (answer,) = answers(sock, 1)
        assert answer["error"]["code"] == -32700
        assert answer["id"] is None
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert call(harness.path, "echo", {"text": "x"})


def test_crashes_are_reported_not_shown(harness: Harness) -> None:
    with pytest.raises(UbiError, match=r"^internal error: see log$"):
        call(harness.path, "crash")
    assert "ZeroDivisionError" in harness.reports[0]


def test_deferred_result_that_is_no_json(harness: Harness) -> None:
    with harness.connect() as sock:
        sock.sendall(request("later"))
        while not harness.deferred:
            time.sleep(0.001)
        harness.do(lambda: harness.deferred[0].resolve(object()))
        assert answers(sock, 1)[0]["error"]["code"] == -32603


# hostile clients -----------------------------------------------------------------------------


def test_slow_reader_blocks_nobody(harness: Harness) -> None:
    with harness.connect() as slow:
        slow.settimeout(0.2)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 16 << 20:
                sent += slow.send(request("big") * 50)
        assert sent < 4 << 20  # we stopped reading what it sends
        started = time.monotonic()
        for _ in range(20):
            call(harness.path, "echo", {"text": "x"})
        assert time.monotonic() - started < 10
        held: list[int] = []
        harness.do(lambda: held.extend(len(c.unread) for c in harness.server._clients.values()))
        assert max(held) <= rpc_server.MAX_UNREAD + 11_000
        # When it reads at last, it gets whole answers.
        slow.settimeout(5)
        assert all(len(a["result"]) == 10_000 for a in answers(slow, 20))


def test_idle_and_dripping_clients_go(harness: Harness) -> None:
    with harness.connect() as idle, harness.connect() as dripping:
        dripping.sendall(b'{"jsonrpc":')
        harness.wait_for_clients(2)
        harness.now += rpc_server.IDLE_TIMEOUT_S - 10
        dripping.sendall(b'"2.0",')
        harness.do(lambda: None)
        assert harness.clients() == 2
        harness.now += 20
        harness.do(lambda: None)
        assert idle.recv(1) == b""
        with contextlib.suppress(ConnectionResetError):
            assert dripping.recv(1) == b""


def test_idle_clients_stay_where_they_may(tmp_path: Path) -> None:
    """As with SPDK, whose clients keep their connections; one that drips goes all the same."""
    harness = Harness(tmp_path / "socket", Limits(idle=True))
    try:
        with harness.connect() as idle, harness.connect() as dripping:
            idle.sendall(request("echo", text="a"))
            assert answers(idle, 1)[0]["result"]
            dripping.sendall(b'{"jsonrpc":')
            harness.wait_for_clients(2)
            harness.now += 10 * rpc_server.IDLE_TIMEOUT_S
            harness.wait_for_clients(1)
            assert dripping.recv(1) == b""
            idle.sendall(request("echo", text="b"))
            assert answers(idle, 1)[0]["result"]
    finally:
        harness.end()


def test_more_clients_than_places(harness: Harness) -> None:
    crowd = [harness.connect() for _ in range(3 * rpc_server.MAX_CLIENTS)]
    try:
        for _ in range(20):
            assert call(harness.path, "echo", {"text": "x"})["text"] == "x"
        assert harness.clients() <= rpc_server.MAX_CLIENTS
    finally:
        for sock in crowd:
            sock.close()


def test_who_waits_for_an_answer_keeps_its_place(harness: Harness) -> None:
    with harness.connect() as waiting:
        waiting.sendall(request("later"))
        while not harness.deferred:
            time.sleep(0.001)
        crowd = [harness.connect() for _ in range(2 * rpc_server.MAX_CLIENTS)]
        harness.do(lambda: harness.deferred[0].resolve("x"))
        assert answers(waiting, 1)[0]["result"] == "x"
        for sock in crowd:
            sock.close()


def test_answers_owed_are_bounded(harness: Harness) -> None:
    with harness.connect() as sock:
        sock.sendall(request("later") * 100)
        call(harness.path, "echo", {"text": "x"})
        assert len(harness.deferred) == rpc_server.MAX_OWED
        for number in range(100):
            while len(harness.deferred) <= number:
                time.sleep(0.001)
            harness.do(harness.deferred[number].resolve)
            assert len(answers(sock, 1)) == 1


def test_out_of_descriptors(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    listening = harness.server._socket

    class Failing:
        def accept(self) -> None:
            raise OSError(24, "Too many open files")

        def fileno(self) -> int:
            return listening.fileno()

    monkeypatch.setattr(rpc_server, "ACCEPT_PAUSE_S", 60.0)
    harness.do(lambda: setattr(harness.server, "_socket", Failing()))
    with harness.connect() as sock:
        while not harness.reports:
            time.sleep(0.001)
        time.sleep(0.1)
        assert len(harness.reports) == 1  # it does not spin
        harness.do(lambda: setattr(harness.server, "_socket", listening))
        harness.now += rpc_server.ACCEPT_PAUSE_S
        harness.do(lambda: None)
        sock.sendall(request(text="x"))
        assert answers(sock, 1)[0]["id"] == 1


ATTACK = """
import contextlib, socket, sys, threading, time
path, first = sys.argv[1], int(sys.argv[2])
def request(method):
    return b'{"jsonrpc":"2.0","id":1,"method":"%s"}' % method
payloads = [
    b"garbage", b"[" * 5000, b'{"a":"' + b"x" * (80 << 10), request(b"big") * 300,
    b'{"jsonrpc":"2.0","method":"echo","params":{"text":""}}' * 1500, b"{}" * 30_000,
    request(b"later") * 50, b'{"a":1', b"", b'{"a":"' + b"\\\\" * 60_000, b"[]" * 10_000,
]
end = time.monotonic() + 3
def attack(number):
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.settimeout(0.2)
            sock.sendall(payloads[number % len(payloads)])
            if number % 3:
                sock.recv(100)
threads = [threading.Thread(target=attack, args=(first + n,)) for n in range(50)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_two_hundred_hostile_clients(harness: Harness) -> None:
    """Honest ones are served all the while; memory and descriptors stay flat."""
    call(harness.path, "echo", {"text": "x"})
    before = len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    attackers = [
        subprocess.Popen([sys.executable, "-c", ATTACK, harness.path, str(50 * number)])
        for number in range(4)
    ]
    waits = []
    while any(attacker.poll() is None for attacker in attackers):
        started = time.monotonic()
        assert call(harness.path, "echo", {"text": "x"}, 30)["text"] == "x"
        waits.append(time.monotonic() - started)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [attacker.returncode for attacker in attackers] == [0] * 4
    assert waits
    assert peak < 64 << 20
    assert harness.longest_turn_s < 0.5
    assert harness.clients() <= rpc_server.MAX_CLIENTS
    for deferred in harness.deferred:
        if deferred._answer is None:
            harness.do(deferred.resolve)
    harness.wait_for_clients(0)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_waiting_clients_are_bounded(harness: Harness) -> None:
    """Who left no longer counts; who waits beyond the bound is told so at once."""
    for _ in range(2 * rpc_server.MAX_WAITING):
        with harness.connect() as sock:
            sock.sendall(request("later"))
    while len(harness.deferred) < 2 * rpc_server.MAX_WAITING:
        time.sleep(0.001)
    crowd = [harness.connect() for _ in range(rpc_server.MAX_WAITING)]
    for sock in crowd:
        sock.sendall(request("later"))
    with harness.connect() as late:
        harness.do(lambda: None)
        late.sendall(request("later"))
        assert answers(late, 1)[0]["error"]["data"] == {"exit": Exit.BUSY}
    assert call(harness.path, "echo", {"text": "x"})
    for deferred in list(harness.deferred):
        harness.do(deferred.resolve)
    for sock in crowd:
        assert answers(sock, 1)[0]["result"] is None
        sock.close()


# the listening socket ------------------------------------------------------------------------


def test_a_dead_daemons_socket_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "control.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with pytest.raises(NoAnswerError, match="no daemon listens there"):
        call(path, "echo")
    with selectors.DefaultSelector() as selector:
        Server(path, {}, selector).close()
    assert not os.path.exists(path)


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.write_text("precious")
    with selectors.DefaultSelector() as selector, pytest.raises(UbiError, match="is in the way"):
        Server(str(path), {}, selector)
    assert path.read_text() == "precious"


def test_paths_longer_than_an_address(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    harness = Harness(folder / "control.sock")
    try:
        assert call(harness.path, "echo", {"text": "x"})["text"] == "x"
    finally:
        harness.end()
    assert os.listdir(folder) == []


# the client against hostile servers ----------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (b"", "went away before it answered"),
        (b'{"id":', "in the middle of its answer"),
        (b"garbage", "makes no sense"),
        (b"[1]", "makes no sense"),
        (b'{"id":1,"error":"x"}', "makes no sense"),
        (b"[" * 100, "makes no sense"),
        (b'{"id":1,"error":{"code":-1,"message":"no","data":{"exit":"x"}}}', "^no$"),
        (b'{"id":1,"error":{"code":-1,"message":"no","data":{"exit":77}}}', "^no$"),
        (b'{"id":1,"error":{"code":-1,"message":"no","data":{"exit":[]}}}', "^no$"),
    ],
)
def test_client_survives_any_server(tmp_path: Path, says: bytes, words: str) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = server.accept()
                    with sock:
                        sock.recv(1000)
                        sock.sendall(says)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UbiError, match=words) as caught:
            call(path, "echo", timeout_s=20)
        assert caught.value.code == Exit.FAILED
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_client_gives_up_in_time(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(0)
        for _ in range(2):  # the first waits for an answer, the second for a place in the queue
            started = time.monotonic()
            with pytest.raises(NoAnswerError, match=r"within 0\.2 s") as caught:
                call(path, "echo", timeout_s=0.2)
            assert time.monotonic() - started < 5
            assert caught.value.code == Exit.TIMED_OUT

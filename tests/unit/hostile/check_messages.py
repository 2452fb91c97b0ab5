"""Both ends of the control socket, each with a peer that sends anything.

The server calls a handler only for what Python's own JSON parser finds in the stream, in order,
answers every request that is one, and stays up. The client returns a result or raises UbiError.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import socket
import sys
import threading
from types import SimpleNamespace
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from unit.hostile import report

from ublk_ubi import rpc
from ublk_ubi.errors import UbiError
from ublk_ubi.rpc_server import NoParams, Server

# This build has no data plane, which the daemon's module imports.
sys.modules["ublk_ubi._device"] = SimpleNamespace(DataPlane=None)  # type: ignore[assignment]
from ublk_ubi.daemon import StopParams  # noqa: E402

last = report.Last()
FOLDER = sys.argv[2]
METHODS = ("status", "stop")
SPACE = " \t\r\n"

IDS = st.one_of(
    st.none(), st.integers(), st.text(max_size=8), st.floats(allow_nan=False), st.just([1]),
    st.just("x" * 300), st.integers(min_value=1 << 63, max_value=1 << 200),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)
PARAMS = st.one_of(
    st.just({}), st.just({"force": True}), st.just({"force": False}),
    st.fixed_dictionaries({"force": JSON}), JSON,
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request: right, nearly right, or of another kind."""
    request: dict[str, Any] = {"jsonrpc": "2.0", "id": 7, "method": "stop"}
    request["params"] = {"force": True}
    changed = draw(st.sampled_from(["nothing", "nothing", "id", "method", "params", "more", "two"]))
    if changed in ("id", "two"):
        request["id"] = draw(IDS)
    if changed in ("method", "two"):
        request["method"] = draw(st.sampled_from(["status", "status", "halt", "", "sta\0tus", 1]))
    if changed in ("params", "two"):
        request["params"] = draw(PARAMS)
    if changed == "more":
        request[draw(st.sampled_from(["jsonrpc", "id", "method", "params", "x"]))] = draw(JSON)
    if draw(st.integers(0, 3)) == 0:
        request.pop(draw(st.sampled_from(sorted(request))))
    return json.dumps(request, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    """What a client sends, and where its pieces are cut."""
    stream = draw(st.sampled_from([b"", b"\n", b" "])).join(
        draw(st.lists(st.one_of(requests(), requests(), JSON.map(json.dumps).map(str.encode)),
                      min_size=1, max_size=4)))
    way = draw(st.sampled_from(
        ["whole", "whole", "cut", "put", "latin", "deep", "long", "noise"]))
    at = draw(st.integers(0, len(stream)))
    if way == "cut":
        stream = stream[:at]
    elif way == "put":
        stream = stream[:at] + draw(st.binary(min_size=1, max_size=6)) + stream[at + 2 :]
    elif way == "latin":
        stream = stream.replace(draw(st.sampled_from([b"a", b"s", b"7"])), b"\xe9")
    elif way == "deep":
        count = draw(st.sampled_from([20_000, 40, 8]))
        nest = b'{"method":"status","params":' + b"[" * count + b"]" * count + b"}"
        stream = draw(st.sampled_from([nest, stream[:at] + nest, b"[" * count])) + stream[at:]
    elif way == "long":
        stream = stream[:at] + b"1" * 70_000 + stream[at:]
    elif way == "noise":
        stream = draw(st.binary(max_size=200))
    return stream, sorted(draw(st.lists(st.integers(0, len(stream)), max_size=4)))


def is_request(value: object) -> bool:
    """Whether it is one as JSON-RPC has it."""
    if not isinstance(value, dict) or not isinstance(value.get("method"), str):
        return False
    name = value.get("id")
    named = name is None or (isinstance(name, (str, int, float)) and not isinstance(name, bool))
    return value.get("jsonrpc", "2.0") == "2.0" and named and len(json.dumps(name)) <= 256


def calls_in(stream: bytes) -> list[tuple[str, object]]:
    """The calls that a stream asks for, up to where Python's own parser stops."""
    text = stream.decode(errors="surrogateescape")
    decoder, at, found = json.JSONDecoder(), 0, []
    while True:
        while at < len(text) and text[at] in SPACE:
            at += 1
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return found
        if not is_request(value) or value["method"] not in METHODS:
            continue
        params = value.get("params")
        if params is None:  # absent or null, as some clients have it
            params = {}
        if value["method"] == "status" and params == {}:
            found.append(("status", None))
        elif params == {} or (isinstance(params, dict) and set(params) == {"force"}):
            force = params.get("force", False)
            if value["method"] == "stop" and isinstance(force, bool):
                found.append(("stop", force))


class Served:
    """The daemon's server without the daemon, driven by hand."""

    def __init__(self) -> None:
        self.path = os.path.join(FOLDER, "control.sock")
        self.selector = selectors.DefaultSelector()
        self.calls: list[tuple[str, object]] = []
        self.reports: list[str] = []
        self.server = Server(
            self.path, {"status": (NoParams, self.status), "stop": (StopParams, self.stop)},
            self.selector, report=self.reports.append,
        )

    def status(self, _params: NoParams) -> dict[str, object]:
        self.calls.append(("status", None))
        return {"name": "x", "stripes": {"total": 1}}

    def stop(self, params: StopParams) -> dict[str, bool]:
        self.calls.append(("stop", params.force))
        if params.force:
            raise UbiError("it is open")
        return {"stopped": True}

    def turn(self) -> bool:
        """One turn of the loop; whether there was anything to do."""
        self.server.tick()
        ready = self.selector.select(0)
        for key, mask in ready:
            key.data(mask)
        return bool(ready)

    def settle(self) -> None:
        for _ in range(1000):
            if not self.turn():
                return
        raise AssertionError("the server is busy for ever")

    def converse(self, pieces: list[bytes]) -> bytes:
        """Send the pieces one by one, then hang up; all that came back."""
        answer = b""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self.path)
            sock.setblocking(False)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for piece in pieces:
                    sock.sendall(piece)
                    self.settle()
                sock.shutdown(socket.SHUT_WR)
            self.settle()
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                while data := sock.recv(1 << 16):
                    answer += data
        self.settle()
        return answer


def answers(data: bytes) -> list[dict[str, Any]]:
    """One JSON object a line, each a result or an error with words."""
    found = [json.loads(line) for line in data.decode().splitlines()]
    for answer in found:
        assert answer["jsonrpc"] == "2.0"
        assert "id" in answer
        assert ("result" in answer) != ("error" in answer)
        if "error" in answer:
            assert answer["error"]["message"]
            assert answer["error"]["code"] < 0
    return found


def server_is_sound(case: tuple[bytes, list[int]]) -> None:
    last.note(case)
    served = the_server
    stream, cuts = case
    served.calls.clear()
    edges = [0, *cuts, len(stream)]
    data = served.converse([stream[a:b] for a, b in itertools.pairwise(edges) if a < b])
    wanted = calls_in(stream)
    assert served.calls == wanted[: len(served.calls)], f"{served.calls}, not {wanted}"
    assert not served.reports
    for answer in answers(data):
        report.counts["result" if "result" in answer else str(answer["error"]["code"])] += 1
    report.counts["calls"] += len(served.calls)
    report.counts["all calls made"] += served.calls == wanted
    assert len(served.server._clients) == 0


def sound_streams_lose_nothing(texts: list[bytes]) -> None:
    """As long as it is JSON, nothing that is wrong with one request harms the next."""
    last.note(texts)
    served = the_server
    served.calls.clear()
    stream = b"".join(texts)
    data = served.converse([stream])
    plain = all(_is_strict(text) for text in texts)
    found = answers(data)
    if plain:
        assert served.calls == calls_in(stream)
        owed = [text for text in texts if not _is_notification(text)]
        assert len(found) == len(owed), f"{len(found)} answers, {texts}"


def _is_strict(text: bytes) -> bool:
    """JSON as RFC 8259 has it: no NaN, nothing beyond UTF-8."""
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError):
        return False
    return True


def _is_notification(text: bytes) -> bool:
    """Carried out, and not answered: a request without an id that is one in every other way."""
    value = json.loads(text)
    return is_request(value) and "id" not in value


RESPONSES = st.one_of(
    st.binary(max_size=100), JSON.map(lambda r: json.dumps({"id": 1, "result": r}).encode()),
    st.builds(lambda r, e: json.dumps(
        {"jsonrpc": "2.0", "id": 1} | ({"result": r} if e is None else {"error": e})).encode(),
        JSON, st.none() | JSON | st.fixed_dictionaries(
            {"code": JSON, "message": JSON}, optional={"data": JSON})),
    JSON.map(json.dumps).map(str.encode),
    st.integers(0, 3000).map(lambda size: b'{"result":"' + b"x" * size * 1024),
)


class Peer:
    """A server that answers every connection with the same bytes, whatever it is asked."""

    def __init__(self) -> None:
        self.path = os.path.join(FOLDER, "peer.sock")
        self.response = b""
        self.reads = True
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(8)
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            sock, _ = self.listener.accept()
            with sock, contextlib.suppress(OSError):
                if self.reads:
                    sock.recv(1 << 16)
                sock.sendall(self.response)


def client_is_sound(response: bytes, reads: bool) -> None:
    last.note(response)
    the_peer.response, the_peer.reads = response, reads
    try:
        rpc.call(the_peer.path, "status", timeout_s=5.0)
    except UbiError as error:
        assert error.message
        assert "within" not in error.message, "nothing here takes so long"
        report.counts["client: error"] += 1
    else:
        report.counts["client: result"] += 1


if __name__ == "__main__":
    the_server = Served()
    codes = {"-32700", "-32600", "-32601", "-32602", "-32000"}
    for number in report.rounds({"calls", "result"} | codes):
        report.profile(350, number)(given(streams())(server_is_sound))()
    report.profile(100)(given(st.lists(requests(), min_size=1, max_size=5))(
        sound_streams_lose_nothing))()
    the_server.server.close()
    the_peer = Peer()
    for number in report.rounds({"client: error", "client: result"}):
        report.profile(150, number)(given(RESPONSES, st.booleans())(client_is_sound))()
    report.finish()

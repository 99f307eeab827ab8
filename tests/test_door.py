"""The door: what a connection may cost, and what is answered before any handler sees a request."""

import asyncio
import gc
import json
import resource
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from aiohttp import WSCloseCode, WSMsgType, web
from support import SECRET, FaultyStorage, Server, logged, make_settings, serve, started, text_of
from tools import PATIENCE, until

from bemore.api import HTTP_ERRORS
from bemore.care import FIRST, Signal
from bemore.counsellor import Emotion
from bemore.demo import Demo
from bemore.door import MAX_HEADER_BYTES, SPARE_CONNECTIONS, Connection, Door, FrameWatch
from bemore.storage import CREATE_SESSION, NewTurn
from bemore_voice import FRAMES_AT_ONCE, make_storage

HOST = b"Host: 127.0.0.1\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
VERSION = b"Sec-WebSocket-Version: 13\r\n"
KEY = b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
HANDSHAKE = b"GET /ws/session/s HTTP/1.1\r\n" + HOST + UPGRADE + VERSION + KEY + b"\r\n"


class Peer:
    """A client that may send anything."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The status, the headers and the body of the next answer."""
        async with asyncio.timeout(PATIENCE):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            status, *lines = head.rstrip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return int(status.split()[1]), headers, body

    async def refused(self) -> tuple[int, str]:
        """The status and code of the next answer, which has what every refusal has."""
        status, headers, body = await self.answer()
        refusal = json.loads(body)
        assert (status, refusal["error"]) == HTTP_ERRORS[refusal["code"]]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["server"] == "BeMore voice"
        return status, refusal["code"]

    async def frame(self) -> tuple[int, bytes]:
        """The opcode and the payload of the next frame, but for the server's own pings."""
        async with asyncio.timeout(PATIENCE):
            while True:
                first, length = await self.reader.readexactly(2)
                if length == 126:
                    length = int.from_bytes(await self.reader.readexactly(2), "big")
                payload = await self.reader.readexactly(length)
                if first & 0xF != WSMsgType.PING:
                    return first & 0xF, payload

    async def close_code(self) -> int:
        while (found := await self.frame())[0] != WSMsgType.CLOSE:
            pass
        return int.from_bytes(found[1][:2], "big")

    async def gone(self) -> bytes:
        """What comes until the server ends the connection."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read()


@asynccontextmanager
async def knock(address: tuple[str, int], data: bytes = b"") -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(data)
    try:
        yield Peer(reader, writer)
    finally:
        writer.close()


@asynccontextmanager
async def upgraded(server: Server) -> AsyncIterator[Peer]:
    async with knock(server.address, HANDSHAKE) as peer:
        assert (await peer.answer())[0] == 101
        yield peer


def frame(payload: bytes, opcode: int = WSMsgType.TEXT, *, fin: bool = True, masked: bool = True) -> bytes:
    """A frame of fewer than 126 bytes; the mask is of zeros, so that the payload reads as it is."""
    return bytes([fin << 7 | opcode, masked << 7 | len(payload)]) + bytes(4 * masked) + payload


def errors() -> list[str]:
    return [line for line in logged if line.startswith("ERROR")]


def connections_of(server: Server) -> list[Connection]:
    return [each for each in door_of(server).connections if isinstance(each, Connection)]


def door_of(server: Server) -> Door:
    assert isinstance(server.runner.server, Door)
    return server.runner.server


PING = frame(b'{"type": "ping"}')


# What is said


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /ws/session/hush?token=hush HTTP/1.1\r\n" + HOST + b"hush header\r\n\r\n",
        b"GET /hush\x01?token=hush HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /\xff\xfehush HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET http://hush:99999999/ HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /health?token=hush HTTP/hush\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + HOST + b"hush: a\0b\r\n\r\n",
        b"hush hush hush\r\n\r\n",
        b"\x16\x03\x01hush",
        b"GET /" + b"hush" * 3000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"hush" * 3000 + b"\r\n\r\n",
        b"POST /api/sessions HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nhush\r\n",
    ],
)
async def test_what_is_no_http_is_answered_in_our_words_alone(server: Server, request_: bytes) -> None:
    async with knock(server.address, request_) as peer:
        status, headers, body = await peer.answer()
        assert (status, json.loads(body)["code"]) == (400, "invalid_request")
        everything = f"{headers}{body.decode()}".lower()
        assert not any(word in everything for word in ("hush", "python", "aiohttp"))
    async with knock(server.address, request_) as peer:
        assert await peer.refused() == (400, "invalid_request")
    assert not errors()


async def test_a_body_that_nobody_reads_may_be_written_in_any_way(server: Server) -> None:
    head = b"POST /api/sessions HTTP/1.1\r\n" + HOST
    async with knock(server.address, head + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nhush") as peer:
        assert (await peer.answer())[0] == 201
    assert not errors()


async def test_a_client_that_leaves_in_its_request_is_no_error(server: Server) -> None:
    head = b"POST /api/sessions HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\nhush"
    async with knock(server.address, head) as peer:
        await until(lambda: door_of(server).requests_count)
        peer.writer.transport.abort()
    await until(lambda: not door_of(server).connections)
    assert not errors()


async def test_a_mistake_of_ours_behind_the_upgrade_sends_no_http_into_the_socket(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bool:
        raise RuntimeError

    monkeypatch.setattr("bemore_voice.take_message", broken)
    async with upgraded(server) as peer:
        peer.send(PING)
        assert await peer.gone() == b""


async def test_subprotocols_are_never_logged(server: Server) -> None:
    async with server.connect(protocols=["hush-token", "bearer"]) as client:
        await client.silent()
        assert client.ws.protocol is None
    assert not any("hush" in line or "bearer" in line for line in logged)


@pytest.mark.parametrize("token", [b"\xff\xfe.a.b", "가.나.다".encode(), b"\xff"])
async def test_a_token_that_is_not_ascii_is_a_bad_token(tmp_path: Path, token: bytes) -> None:
    async with serve(make_settings(f"sqlite:///{tmp_path}/a.db", JWT_SECRET_KEY=SECRET), Demo()) as server:
        head = b"GET /ws/session/s HTTP/1.1\r\n" + HOST + UPGRADE + VERSION + KEY
        async with knock(server.address, head + b"Authorization: Bearer " + token + b"\r\n\r\n") as peer:
            assert await peer.refused() == (401, "invalid_token")
        quoted = b"".join(b"%%%02X" % byte for byte in token)
        async with knock(server.address, head.replace(b" HTTP", b"?token=" + quoted + b" HTTP") + b"\r\n") as peer:
            assert await peer.refused() == (401, "invalid_token")
    assert not errors()


@pytest.mark.parametrize(
    "lines",
    [
        VERSION,
        VERSION + KEY.replace(b"M", b"\xff"),
        VERSION + KEY.replace(b"M", "가".encode()),
        VERSION + KEY.replace(b"==", b""),
        VERSION + b"Sec-WebSocket-Key: MDEy\r\n",
        VERSION + b"Sec-WebSocket-Key: \r\n",
        b"Sec-WebSocket-Version: 12\r\n" + KEY,
        b"Sec-WebSocket-Version: \xff\r\n" + KEY,
        KEY,
    ],
)
async def test_a_bad_handshake_is_told_to_upgrade(server: Server, lines: bytes) -> None:
    async with knock(server.address, b"GET /ws/session/s HTTP/1.1\r\n" + HOST + UPGRADE + lines + b"\r\n") as peer:
        assert await peer.refused() == (426, "upgrade_required")
    assert not errors()
    assert not list(await server.storage.fetch("SELECT * FROM sessions"))


@pytest.mark.parametrize("value", [b"hush", b"caf\xe9"])
@pytest.mark.parametrize("path", [b"/health", b"/nowhere", b"/ws/session/s"])
async def test_an_expectation_that_nobody_meets_is_refused(server: Server, path: bytes, value: bytes) -> None:
    async with knock(
        server.address, b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"Expect: " + value + b"\r\n\r\n"
    ) as peer:
        assert await peer.refused() == (417, "expectation_failed")
    assert not any("hush" in line for line in logged)


async def test_head_of_a_socket_does_not_open_one(server: Server) -> None:
    async with knock(server.address, HANDSHAKE.replace(b"GET", b"HEAD")) as peer:
        async with asyncio.timeout(PATIENCE):
            assert b" 405 " in await peer.reader.readline()
    assert not list(await server.storage.fetch("SELECT * FROM sessions"))


async def test_a_client_that_leaves_during_the_handshake_is_no_error(tmp_path: Path) -> None:
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def wait(sql: str) -> None:
        if sql == CREATE_SESSION:
            arrived.set()
            await go_on.wait()

    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    storage = FaultyStorage(make_storage(settings))
    async with serve(settings, Demo(), storage) as server:
        storage.wait = wait
        async with knock(server.address, HANDSHAKE) as peer:
            await arrived.wait()
            peer.writer.transport.abort()
        await until(lambda: door_of(server).count == 0)
        go_on.set()
        await until(lambda: not door_of(server).connections)
        assert not server.sessions
    assert not errors()


async def test_a_plea_does_not_wait_behind_a_handshake_for_a_database_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore_voice.CREATION_SECONDS", 0.1)
    hanging, healed = asyncio.Event(), asyncio.Event()

    async def wait(_: str) -> None:
        hanging.set()
        await healed.wait()

    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    storage = FaultyStorage(make_storage(settings))
    async with serve(settings, Demo(), storage) as server:
        storage.wait = wait
        async with server.connect("s") as client:  # the database never answers meanwhile
            assert hanging.is_set()
            await client.ask("이제 정말 죽고 싶어요")
            frames = [await client.frame(), await client.frame()]
            assert text_of(frames) == FIRST[Signal.EXPLICIT]
            assert storage.statements.count(CREATE_SESSION) >= 1
            healed.set()
            assert (await client.reply())[-1]["type"] == "ai_stream_complete"
            await client.ask("들어 주셔서 고마워요")
            assert (await client.reply())[-1]["type"] == "ai_stream_complete"
        assert len(await server.rows("s")) == 2


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux sets the limits of another process")
async def test_a_process_that_runs_out_of_files_says_so_once_and_goes_on(tmp_path: Path) -> None:
    async with started(tmp_path) as program, AsyncExitStack() as stack:
        client = await stack.enter_async_context(program.connect())
        await client.silent()
        files = len(list(Path(f"/proc/{program.process.pid}/fd").iterdir()))  # noqa: ASYNC240 - not a disk
        resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (files + 3, files + 3))
        async with AsyncExitStack() as crowd:
            for _ in range(10):
                await crowd.enter_async_context(knock(("127.0.0.1", program.port)))
            await program.wait_for("out of system resource")
            await client.ask("파일이 모자라도 듣고 있나요")
            assert (await client.reply())[-1]["type"] == "ai_stream_complete"
        async with program.connect("another") as other:  # as soon as there is room
            await other.silent()
        await stack.aclose()
        program.process.terminate()
        assert await program.end() == 0
    assert sum(" ERROR " in line for line in program.log.splitlines()) == 1, program.log


# Frames


async def test_a_frame_without_a_mask_closes_the_socket_behind_what_came_before(server: Server) -> None:
    async with upgraded(server) as peer:
        peer.send(PING + frame(b'{"type": "ping"}', masked=False) + PING)
        assert json.loads((await peer.frame())[1])["type"] == "pong"
        opcode, payload = await peer.frame()
        assert (opcode, int.from_bytes(payload[:2], "big")) == (WSMsgType.CLOSE, WSCloseCode.PROTOCOL_ERROR)
    assert not errors()


@pytest.mark.parametrize("piece", [b"", b" "])
async def test_every_fragment_of_a_message_counts_as_a_frame(server: Server, piece: bytes) -> None:
    rest = frame(piece, WSMsgType.CONTINUATION, fin=False)
    async with upgraded(server) as peer:
        peer.send(frame(piece, fin=False) + rest * (FRAMES_AT_ONCE - 1))
        peer.send(frame(b'{"type": "ping"}', WSMsgType.CONTINUATION))
        assert await peer.close_code() == WSCloseCode.POLICY_VIOLATION
    assert not errors()


async def test_a_message_in_a_few_fragments_is_heard(server: Server) -> None:
    async with upgraded(server) as peer:
        peer.send(frame(b'{"type":', fin=False) + frame(b"", WSMsgType.PONG))
        peer.send(frame(b'"ping"}', WSMsgType.CONTINUATION))
        assert json.loads((await peer.frame())[1])["type"] == "pong"


class Parser:
    """Takes what a watch passes on."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.taken.append(data)
        return False, b""


def long_frame(size: int) -> bytes:
    extended = bytes([0x82, 0xFE]) + size.to_bytes(2, "big") if size < 65536 else b"\x82\xff" + size.to_bytes(8, "big")
    return extended + bytes(4 + size)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100, 1_000_000])
async def test_frames_are_counted_however_they_are_cut(step: int) -> None:
    frames = [frame(b""), PING, long_frame(126), frame(b"x" * 125), long_frame(70_000), frame(b"", WSMsgType.PONG)]
    counted: list[int] = []
    refused: list[WSCloseCode] = []
    parser = Parser()

    lengths: list[int] = []
    paused: list[bool] = []

    def take(opcode: int, length: int, _: float) -> bool:
        counted.append(opcode)
        lengths.append(length)
        return True

    watch = FrameWatch(take, refused.append, lambda: paused.append(True))
    watch.parser = parser  # type: ignore[assignment]
    sent = b"".join(frames)
    for start in range(0, len(sent), step):
        watch.feed_data(sent[start : start + step])
    assert counted == [
        WSMsgType.TEXT,
        WSMsgType.TEXT,
        WSMsgType.BINARY,
        WSMsgType.TEXT,
        WSMsgType.BINARY,
        WSMsgType.PONG,
    ]
    assert lengths[2:5] == [126, 125, 70_000]
    assert not refused
    good = len(sent)
    for byte in frame(b"ab", masked=False):
        watch.feed_data(bytes([byte]))
    assert refused == [WSCloseCode.PROTOCOL_ERROR]
    assert b"".join(parser.taken)[:good] == sent


# Connections


async def hold(server: Server, count: int, data: bytes, stack: AsyncExitStack) -> list[Peer]:
    """Open connections that send something and no more, and wait until the server has it."""
    before = door_of(server).count
    peers = [await stack.enter_async_context(knock(server.address, data)) for _ in range(count)]
    await until(lambda: door_of(server).count == before + count)
    return peers


HALF = b"GET /health HTTP/1.1\r\n" + HOST + b"X: a"


async def test_every_connection_counts_from_its_acceptance(tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_CONNECTIONS=3)
    async with serve(settings, Demo()) as server, AsyncExitStack() as stack:
        await hold(server, 1, b"", stack)
        await hold(server, 1, HALF, stack)
        async with knock(server.address, b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n") as kept_alive:
            assert (await kept_alive.answer())[0] == 200
            async with knock(server.address, HANDSHAKE) as peer:
                status, headers, body = await peer.answer()
                assert (status, json.loads(body)["code"]) == (503, "too_many_connections")
                assert int(headers["retry-after"]) > 0
                assert await peer.gone() == b""
            assert not list(await server.storage.fetch("SELECT * FROM sessions"))
        await until(lambda: door_of(server).count == 2)
        async with upgraded(server) as peer:
            peer.send(PING)
            assert json.loads((await peer.frame())[1])["type"] == "pong"


async def test_a_full_server_tells_a_load_balancer_that_it_is_well_and_lets_go_of_it(tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_CONNECTIONS=1)
    async with serve(settings, Demo()) as server, server.connect() as client:
        async with knock(server.address, b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n") as peer:
            status, headers, _ = await peer.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert await peer.gone() == b""
        await client.silent()


async def test_far_beyond_the_limit_connections_are_closed_unheard(tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_CONNECTIONS=1)
    async with serve(settings, Demo()) as server, AsyncExitStack() as stack:
        await hold(server, 1 + SPARE_CONNECTIONS, b"", stack)
        async with knock(server.address) as peer:
            assert await peer.gone() == b""
        assert door_of(server).count == 1 + SPARE_CONNECTIONS


async def bytes_held(server: Server, data: bytes) -> float:
    """What a connection holds that has sent something and no more, with the client's end of it."""
    count = 20
    async with AsyncExitStack() as stack:
        await hold(server, 1, data, stack)  # what is made once for all
        tracemalloc.start()
        try:
            await hold(server, count, data, stack)
            await until(lambda: all(each._header_bytes == len(data) for each in connections_of(server)))
            held = sum(line.size for line in tracemalloc.take_snapshot().statistics("filename"))
        finally:
            tracemalloc.stop()
    await until(lambda: door_of(server).count == 0)
    return held / count


FIELDS = {
    "a few long lines": b"X-%d: " + b"a" * 8000,
    "many lines": b"X-%d: " + b"a" * 120,
    "wide characters": b"X-%d: " + "😥".encode() * 30,
    "long names": b"X-%d" + b"a" * 4000 + b": a",
}


@pytest.mark.parametrize("kind", FIELDS)
async def test_a_header_that_never_ends_is_refused_before_it_takes_much_memory(server: Server, kind: str) -> None:
    lines = b"".join(FIELDS[kind] % number + b"\r\n" for number in range(300))
    head = b"GET /health HTTP/1.1\r\n" + HOST + lines
    held = await bytes_held(server, head[:MAX_HEADER_BYTES]) - await bytes_held(server, b"")
    assert held < 80 * 1024
    async with knock(server.address, head[: 2 * MAX_HEADER_BYTES]) as peer:
        assert await peer.refused() == (400, "invalid_request")


@asynccontextmanager
async def held(folder: Path) -> AsyncIterator[tuple[Server, asyncio.Event, asyncio.Event]]:
    """A server whose statements tell that they have arrived, and wait until they may go on."""
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def wait(_: str) -> None:
        arrived.set()
        await go_on.wait()

    settings = make_settings(f"sqlite:///{folder}/a.db")
    storage = FaultyStorage(make_storage(settings))
    async with serve(settings, Demo(), storage) as server:
        storage.wait = wait
        yield server, arrived, go_on


async def test_a_header_behind_another_request_has_its_limit_too(tmp_path: Path) -> None:
    async with held(tmp_path) as (server, arrived, go_on):
        async with knock(server.address, b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n") as peer:
            await arrived.wait()
            peer.send(b"GET /health HTTP/1.1\r\n" + b"X: " + (b"a" * 4000 + b"\r\nX: ") * 5)
            peer.send(b"a\r\n\r\n")
            go_on.set()
            assert (await peer.answer())[0] == 200
            assert await peer.refused() == (400, "invalid_request")
            assert await peer.gone() == b""


async def test_requests_that_wait_behind_another_share_one_limit(tmp_path: Path) -> None:
    async with held(tmp_path) as (server, arrived, go_on):
        request_ = b"GET /health HTTP/1.1\r\n" + HOST + b"X: %s\r\n\r\n"
        async with knock(server.address, request_ % b"a") as peer:
            await arrived.wait()
            peer.send(request_ % b"a" * 50)
            for _ in range(20):
                peer.send(request_ % (b"a" * 4000))
            go_on.set()
            answers = [(await peer.answer())[0]]
            while answers[-1] == 200:
                answers.append((await peer.answer())[0])
            assert answers[-1] == 400
            assert 51 <= len(answers) < 60
            assert await peer.gone() == b""
    assert not errors()


async def test_what_comes_in_heaps_before_a_handshake_is_answered_is_cut_off(tmp_path: Path) -> None:
    async with held(tmp_path) as (server, arrived, go_on):
        async with knock(server.address, HANDSHAKE) as peer:
            await arrived.wait()
            peer.send(b"a" * (MAX_HEADER_BYTES + 8192))
            await until(lambda: door_of(server).count == 0)
            go_on.set()
    assert not errors()


# Time


async def test_the_second_header_of_a_connection_has_its_time_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bemore_voice.HEADER_SECONDS", 0.3)
    async with serve(make_settings(f"sqlite:///{tmp_path}/a.db"), Demo()) as server:
        request_ = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
        async with knock(server.address, request_) as idle, knock(server.address, request_) as slow:
            assert (await idle.answer())[0] == (await slow.answer())[0] == 200
            slow.send(HALF)
            assert await slow.gone() == b""
            idle.send(request_)  # between two requests only the keep-alive's time counts
            assert (await idle.answer())[0] == 200


async def test_a_reader_that_never_takes_its_answer_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bemore_voice.REQUEST_SECONDS", 0.5)
    async with serve(make_settings(f"sqlite:///{tmp_path}/a.db"), Demo()) as server, server.connect("나") as talking:
        await server.storage.create_session("s")
        for number in range(200):
            await server.storage.add_turn("s", NewTurn("가" * 2000, "답" * 16_000, Emotion.SAD, number))
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(server.address)
            # Of one page the kernel would take all.
            reader.sendall((b"GET /api/sessions/s/conversations?limit=200 HTTP/1.1\r\n" + HOST + b"\r\n") * 20)
            await until(lambda: door_of(server).count == 2)
            await until(lambda: door_of(server).count == 1)
        await talking.silent()
    assert not errors()


async def test_a_reader_of_small_answers_that_takes_none_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits aiohttp's buffer is answered as far as a handler can see."""
    monkeypatch.setattr("bemore_voice.REQUEST_SECONDS", 0.5)
    async with serve(make_settings(f"sqlite:///{tmp_path}/a.db"), Demo()) as server:
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(server.address)
            reader.setblocking(False)
            request_ = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
            await until(lambda: door_of(server).count == 1)
            while door_of(server).count:
                with suppress(OSError):
                    reader.send(request_)
                await asyncio.sleep(0)
    assert not errors()


async def test_a_reader_that_stops_in_the_middle_of_its_answer_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the request's time is over: what it does not take is held in memory."""
    monkeypatch.setattr("bemore_voice.STALL_SECONDS", 0.5)
    async with serve(make_settings(f"sqlite:///{tmp_path}/a.db"), Demo()) as server:
        await server.storage.create_session("s")
        for number in range(50):
            await server.storage.add_turn("s", NewTurn("가", "답" * 16_000, Emotion.SAD, number))
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(server.address)
            reader.sendall((b"GET /api/sessions/s/conversations HTTP/1.1\r\n" + HOST + b"\r\n") * 20)
            await until(lambda: door_of(server).count == 1)
            await until(lambda: not door_of(server).count)
    assert not errors()


async def test_a_page_holds_half_a_megabyte_of_turns_and_the_newest_in_any_case(server: Server) -> None:
    await server.storage.create_session("s")
    for number in range(60):
        await server.storage.add_turn("s", NewTurn(f"{number}", "답" * 16_000, None, number))
    url, read, before = f"{server.url}/api/sessions/s/conversations?limit=200", 0, 2**53
    while read < 60:  # pages follow one another without a gap
        async with server.http.get(f"{url}&before={before}") as response:
            page = await response.read()
        turns = json.loads(page)["conversations"]
        assert len(page) < 0.6 * 1024 * 1024
        assert [int(turn["user_message"]) for turn in turns] == list(range(60 - read - len(turns), 60 - read))
        read, before = read + len(turns), turns[0]["id"]


async def test_an_answer_that_was_sent_is_not_held_while_the_connection_is_kept(server: Server) -> None:
    await server.storage.create_session("s")
    for number in range(20):
        await server.storage.add_turn("s", NewTurn(f"{number}", "답" * 16_000, None, number))
    async with server.http.get(f"{server.url}/api/sessions/s/conversations") as response:
        assert len(await response.read()) > 400_000
    gc.collect()
    answers = [each for each in gc.get_objects() if isinstance(each, web.Response)]
    assert not any(each.body for each in answers)


async def test_a_socket_has_no_such_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bemore_voice.HEADER_SECONDS", 0.2)
    monkeypatch.setattr("bemore_voice.REQUEST_SECONDS", 0.2)
    async with serve(make_settings(f"sqlite:///{tmp_path}/a.db"), Demo()) as server, server.connect() as client:
        async with knock(server.address, HALF) as slow:
            assert await slow.gone() == b""  # later than the socket's time would have been
        await client.silent()

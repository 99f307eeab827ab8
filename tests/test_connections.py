"""How many connections there may be, how long a first header may take, and what is logged about clients."""

import asyncio
import json
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from support import Server, logged, make_settings, serve, started
from tools import PATIENCE, until

from bemore.connections import SPARE_CONNECTIONS, SURPLUS, LimitedRunner, LimitedServer
from bemore.demo import Demo
from bemore.log import quiet_libraries
from bemore_voice import create_app, make_runner, make_storage

REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
HALF_REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a"


class Peer:
    """A client that may send anything."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the headers and the body of the next answer."""
        async with asyncio.timeout(PATIENCE):
            status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return int(status.split()[1]), headers, body

    async def rest(self) -> bytes:
        """Return what comes until the server ends the connection."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read()


@asynccontextmanager
async def dial(address: tuple[str, int], data: bytes = b"") -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(data)
    try:
        yield Peer(reader, writer)
    finally:
        writer.close()


class Limited:
    """A small application behind a LimitedServer; GET / tells whether its connection is over the limit."""

    def __init__(self, server: LimitedServer, address: tuple[str, int]) -> None:
        self.server = server
        self.address = address

    async def hold(self, stack: AsyncExitStack, count: int, data: bytes = b"") -> list[Peer]:
        """Open connections and wait until the server has accepted them."""
        before = self.server.count
        peers = [await stack.enter_async_context(dial(self.address, data)) for _ in range(count)]
        await until(lambda: self.server.count == before + count)
        return peers


async def tell_surplus(request: web.Request) -> web.Response:
    return web.Response(text=str(request[SURPLUS]))


@asynccontextmanager
async def limited(max_connections: int = 100, header_seconds: float = PATIENCE) -> AsyncIterator[Limited]:
    app = web.Application()
    app.router.add_get("/", tell_surplus)
    runner = LimitedRunner(
        app, max_connections=max_connections, header_seconds=header_seconds, shutdown_timeout=1, access_log=None
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        assert runner.server is not None
        yield Limited(runner.server, runner.addresses[0][:2])
    finally:
        await runner.cleanup()


# Count


async def test_a_connection_counts_from_acceptance_to_its_end() -> None:
    async with limited(max_connections=2) as running, AsyncExitStack() as stack:
        silent, _ = await running.hold(stack, 2)
        async with dial(running.address, REQUEST) as third:
            assert (await third.answer())[2] == b"True"
        silent.writer.close()
        await until(lambda: running.server.count == 1)
        async with dial(running.address, REQUEST * 2) as third:
            assert [(await third.answer())[2] for _ in range(2)] == [b"False"] * 2


async def test_far_over_the_limit_connections_are_cut() -> None:
    async with limited(max_connections=1) as running, AsyncExitStack() as stack:
        await running.hold(stack, 1 + SPARE_CONNECTIONS)
        async with dial(running.address, REQUEST) as peer:
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await peer.answer()
        await until(lambda: running.server.count == 1 + SPARE_CONNECTIONS)


async def test_a_cleanup_closes_connections_and_stops_timers() -> None:
    async with AsyncExitStack() as stack:
        async with limited() as running:
            idle, kept = await running.hold(stack, 1), await running.hold(stack, 1, REQUEST)
            assert (await kept[0].answer())[0] == 200
        assert [await peer.rest() for peer in (*idle, *kept)] == [b"", b""]
        await until(lambda: running.server.count == 0)


def server_of(server: Server) -> LimitedServer:
    assert isinstance(server.runner.server, LimitedServer)
    return server.runner.server


async def test_a_full_server_refuses_all_but_probes_and_closes(tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", MAX_CONNECTIONS=1)
    async with serve(settings, Demo()) as server, server.connect() as client:
        for path, status in ((b"/", 503), (b"/api/sessions", 503), (b"/ws/session/new", 503), (b"/health", 200)):
            async with dial(server.address, REQUEST.replace(b"/", path, 1)) as peer:
                found, headers, body = await peer.answer()
                assert (found, headers["connection"]) == (status, "close")
                assert await peer.rest() == b""
            if status == 503:
                assert json.loads(body)["code"] == "too_many_connections"
                assert int(headers["retry-after"]) > 0
            await until(lambda: server_of(server).count == 1)
        assert [row[0] for row in await server.storage.fetch("SELECT session_id FROM sessions")] == ["가"]
        await client.silent()


# Time


@pytest.mark.parametrize("sent", [b"", HALF_REQUEST])
async def test_a_first_header_that_takes_too_long_is_cut(sent: bytes) -> None:
    async with limited(header_seconds=0.3) as running:
        async with dial(running.address, REQUEST) as asked, dial(running.address, sent) as slow:
            assert (await asked.answer())[0] == 200
            assert await slow.rest() == b""
            # The time of the connection that has asked ended before that.
            asked.writer.write(REQUEST)
            assert (await asked.answer())[0] == 200


async def test_a_websocket_outlives_the_time_for_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bemore_voice.HEADER_SECONDS", 0.3)
    async with serve(make_settings(f"sqlite:///{tmp_path}/a.db"), Demo()) as server, server.connect() as client:
        async with dial(server.address, HALF_REQUEST) as slow:
            assert await slow.rest() == b""
        await client.silent()


# Log


def errors() -> list[str]:
    return [line for line in logged if line.startswith("ERROR")]


NO_HTTP = [
    b"GET /ws/session/hush?token=hush HTTP/1.1\r\nHost: a\r\nhush header\r\n\r\n",
    b"GET /hush\x01?token=hush HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\xff\xfehush HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://hush:99999999/ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /health?token=hush HTTP/hush\r\n\r\n",
    b"hush hush hush\r\n\r\n",
    b"\x16\x03\x01hush",
    b"GET /" + b"hush" * 3000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"hush" * 3000 + b"\r\n\r\n",
    b"POST /api/sessions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nhush\r\n",
]


@pytest.mark.parametrize("request_", NO_HTTP)
async def test_a_request_that_is_no_http_is_refused_and_not_logged(server: Server, request_: bytes) -> None:
    quiet_libraries()
    async with dial(server.address, request_) as peer:
        assert (await peer.answer())[0] == 400
    assert not any("hush" in line for line in logged)
    assert not errors()


async def test_a_client_that_leaves_in_its_request_is_not_logged(server: Server) -> None:
    quiet_libraries()
    head = b"POST /api/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\nhush"
    async with dial(server.address, head) as peer:
        await until(lambda: server_of(server).requests_count)
        peer.writer.transport.abort()
    await until(lambda: not server_of(server).connections)
    assert not errors()


async def test_subprotocols_are_not_logged(server: Server) -> None:
    quiet_libraries()
    async with server.connect(protocols=["hush-token", "bearer"]) as client:
        await client.silent()
        assert client.ws.protocol is None
    assert not any("hush" in line or "bearer" in line for line in logged)


async def test_a_mistake_behind_the_upgrade_writes_no_http_into_the_websocket(tmp_path: Path) -> None:
    quiet_libraries()

    async def broken(request: web.Request) -> web.StreamResponse:
        await web.WebSocketResponse().prepare(request)
        raise RuntimeError("hush")

    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    app = create_app(settings, make_storage(settings), Demo())
    app.router.add_get("/broken", broken)
    runner = make_runner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        handshake = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        handshake += b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
        async with dial(runner.addresses[0][:2], REQUEST.replace(b"/", b"/broken", 1)[:-2] + handshake) as peer:
            assert (await peer.answer())[0] == 101
            assert await peer.rest() == b""
    finally:
        await runner.cleanup()
    assert len(errors()) == 1
    assert "RuntimeError in broken" in errors()[0]
    assert "hush" not in errors()[0]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux sets the limits of another process")
async def test_a_process_without_free_files_says_so_once_and_goes_on(tmp_path: Path) -> None:
    async with started(tmp_path) as program, AsyncExitStack() as stack:
        client = await stack.enter_async_context(program.connect())
        await client.silent()
        files = len(list(Path(f"/proc/{program.process.pid}/fd").iterdir()))  # noqa: ASYNC240 - not a disk
        resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (files + 3, files + 3))
        async with AsyncExitStack() as crowd:
            for _ in range(10):
                await crowd.enter_async_context(dial(("127.0.0.1", program.port)))
            await program.wait_for("out of system resource")
            await client.ask("파일이 모자라도 듣고 있나요")
            assert (await client.reply())[-1]["type"] == "ai_stream_complete"
        # As soon as there is room, connections are accepted again.
        async with program.connect("another") as other:
            await other.silent()
        await stack.aclose()
        program.process.terminate()
        assert await program.end() == 0
    assert sum("ERROR" in line for line in program.log.splitlines()) == 1, program.log

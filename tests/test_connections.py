"""How many connections there may be, how long a first header may take, and what is logged about clients."""

import asyncio
import json
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from support import RawPeer, Server, Serving, handshake, logged, make_settings, started
from tools import PATIENCE, until

from bemore.connections import SPARE_CONNECTIONS, SURPLUS, LimitedRunner, LimitedServer
from bemore.demo import Demo
from bemore.log import quiet_libraries
from bemore_voice import Limits, create_app, make_runner, make_storage

REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
HALF_REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a"


class Limited:
    """A small application behind a LimitedServer; GET / tells whether its connection is over the limit."""

    def __init__(self, server: LimitedServer, address: tuple[str, int]) -> None:
        self.server = server
        self.address = address

    async def dial(self, data: bytes = b"") -> RawPeer:
        peer = await RawPeer.connect(self.address)
        peer.send(data)
        return peer

    async def hold(self, count: int) -> list[RawPeer]:
        """Open connections that send nothing, and wait until the server has accepted them."""
        before = self.server.count
        peers = [await self.dial() for _ in range(count)]
        await until(lambda: self.server.count == before + count)
        return peers


async def tell_surplus(request: web.Request) -> web.Response:
    return web.Response(text=str(request[SURPLUS]))


@asynccontextmanager
async def limited(max_connections: int = 100, header_seconds: float = PATIENCE) -> AsyncIterator[Limited]:
    app = web.Application()
    app.router.add_get("/", tell_surplus)
    runner = LimitedRunner(
        app,
        max_connections=max_connections,
        header_seconds=header_seconds,
        shutdown_timeout=2 * PATIENCE,
        access_log=None,
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
    async with limited(max_connections=2) as running:
        silent, _ = await running.hold(2)
        third = await running.dial(REQUEST)
        assert (await third.answer())[2] == b"True"
        silent.abort()
        await until(lambda: running.server.count == 2)
        # The third was over the limit when it was accepted; a new one in the place of the first is not.
        third.send(REQUEST)
        assert (await third.answer())[2] == b"True"
        third.abort()
        await until(lambda: running.server.count == 1)
        assert (await (await running.dial(REQUEST)).answer())[2] == b"False"


async def test_below_the_limit_every_request_is_served() -> None:
    async with limited(max_connections=1) as running:
        peer = await running.dial(REQUEST * 2)
        assert [(await peer.answer())[2] for _ in range(2)] == [b"False"] * 2


async def test_far_over_the_limit_connections_are_cut() -> None:
    async with limited(max_connections=1) as running:
        await running.hold(1 + SPARE_CONNECTIONS)
        peer = await running.dial(REQUEST)
        assert await peer.end() == b""
        await until(lambda: running.server.count == 1 + SPARE_CONNECTIONS)


async def test_a_cleanup_closes_idle_and_kept_connections() -> None:
    # Handlers have longer than that, but none is at work.
    async with asyncio.timeout(PATIENCE), limited() as running:
        peers = [*await running.hold(1), await running.dial(REQUEST)]
        assert (await peers[1].answer())[0] == 200
    assert [await peer.end() for peer in peers] == [b"", b""]
    assert running.server.count == 0


def server_of(server: Server) -> LimitedServer:
    assert isinstance(server.runner.server, LimitedServer)
    return server.runner.server


async def test_a_full_server_refuses_all_but_probes_and_closes(serving: Serving) -> None:
    async with serving(MAX_CONNECTIONS=1) as server, server.connect() as client:
        for path, status in ((b"/", 503), (b"/ws/session/new", 503), (b"/health", 200), (b"/livez", 200)):
            async with server.knock(REQUEST.replace(b"/", path, 1)) as peer:
                found, headers, body = await peer.answer()
                assert (found, headers["connection"]) == (status, "close")
                assert await peer.end() == b""
            if status == 503:
                assert json.loads(body)["code"] == "too_many_connections"
                assert int(headers["retry-after"]) > 0
            await until(lambda: server_of(server).count == 1)
        await client.silent()


# Time


@pytest.mark.parametrize("sent", [b"", HALF_REQUEST])
async def test_a_first_header_that_takes_too_long_is_cut(sent: bytes) -> None:
    async with limited(header_seconds=0.3) as running:
        asked, slow = await running.dial(REQUEST), await running.dial(sent)
        assert (await asked.answer())[0] == 200
        assert await slow.end() == b""
        # The connection that has asked was accepted earlier, and is not cut.
        asked.send(REQUEST)
        assert (await asked.answer())[0] == 200


async def test_a_websocket_outlives_the_time_for_its_header(serving: Serving) -> None:
    async with serving(limits=Limits(header_seconds=0.3)) as server, server.connect() as client:
        async with server.knock(HALF_REQUEST) as slow:
            assert await slow.end() == b""
        await client.silent()


# Log


@pytest.fixture
def quiet() -> None:
    quiet_libraries()


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


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("request_", NO_HTTP)
async def test_a_request_that_is_no_http_is_refused_and_not_logged(server: Server, request_: bytes) -> None:
    async with server.knock(request_) as peer:
        assert (await peer.answer())[0] == 400
    assert not any("hush" in line for line in logged)
    assert not errors()


@pytest.mark.usefixtures("quiet")
async def test_a_client_that_leaves_in_its_request_is_not_logged(server: Server) -> None:
    head = b"POST /api/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\nhush"
    async with server.knock(head) as peer:
        await until(lambda: server_of(server).requests_count)
        peer.abort()
        await until(lambda: not server_of(server).connections)
    assert not errors()


@pytest.mark.usefixtures("quiet")
async def test_subprotocols_are_not_logged(server: Server) -> None:
    async with server.connect(protocols=["hush-token", "bearer"]) as client:
        await client.silent()
        assert client.ws.protocol is None
    assert not any("hush" in line or "bearer" in line for line in logged)


@pytest.mark.usefixtures("quiet")
async def test_a_bug_behind_the_upgrade_writes_no_http() -> None:
    """Bytes of HTTP would break the WebSocket's frames."""

    async def broken(request: web.Request) -> web.StreamResponse:
        await web.WebSocketResponse().prepare(request)
        raise RuntimeError("hush")

    settings = make_settings()
    app = create_app(settings, make_storage(settings), Demo())
    app.router.add_get("/broken", broken)
    runner = make_runner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        peer = await RawPeer.connect(runner.addresses[0][:2])
        peer.send(handshake("/broken"))
        assert (await peer.answer())[0] == 101
        assert await peer.end() == b""
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
        crowd = [await RawPeer.connect(("127.0.0.1", program.port)) for _ in range(10)]
        await program.wait_for("out of system resource")
        await client.ask("파일이 모자라도 듣고 있나요")
        assert (await client.reply())[-1]["type"] == "ai_stream_complete"
        for peer in crowd:
            peer.abort()
        # As soon as there is room, connections are accepted again.
        async with program.connect("another") as other:
            await other.silent()
        await stack.aclose()
        program.process.terminate()
        assert await program.end() == 0
    assert sum("level=ERROR" in line for line in program.log.splitlines()) == 1, program.log

"""This server behind a real nginx, by the very blocks that docs/deployment.md and docs/frontend.md show."""

import asyncio
import contextlib
import getpass
import io
import itertools
import os
import re
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSCloseCode, web
from aiohttp.test_utils import unused_port
from documents import block_with, blocks, text_of_file
from standin import GeminiStandIn, event
from support import (
    CANARY,
    ENDS,
    SECRET,
    Frontend,
    Program,
    is_listening,
    kinds_of,
    logged,
    started,
    text_of,
    token_for,
)
from tools import PATIENCE, program_of, until

DEPLOYMENT, FRONTEND = text_of_file("docs/deployment.md"), text_of_file("docs/frontend.md")
PEOPLE = 20
REPLY = "네, 듣고 있어요."

# What Debian's nginx.conf says around the block, but for one process in the foreground with its files in one folder.
AROUND = """
daemon off;
user {user};
pid {folder}/nginx.pid;
worker_processes 2;
events {{ worker_connections 512; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{block}
}}
"""


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fullchain.pem and privkey.pem for 127.0.0.1, as certbot names them."""
    folder = tmp_path_factory.mktemp("certificate")
    names = ("-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem")
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=test")
    command = (program_of("openssl"), "req", "-x509", *kind, "-addext", "subjectAltName=IP:127.0.0.1", *names)
    subprocess.run(command, check=True, capture_output=True)
    return folder


def write_conf(folder: Path, block: str, certificate: Path, replacements: dict[str, str]) -> Path:
    """Write nginx.conf with a block of the documents: what must differ here is replaced, each exactly once."""
    live = re.findall(r"/etc/letsencrypt/live/[\w.]+", block)
    assert len(live) == 2
    block = block.replace(live[0], str(certificate))
    for shown, here in {"/var/log/nginx/voice.log": f"{folder}/error.log", **replacements}.items():
        assert block.count(shown) == 1, shown
        block = block.replace(shown, here)
    conf = folder / "nginx.conf"
    conf.write_text(AROUND.format(folder=folder, user=getpass.getuser(), block=block))
    return conf


class Site:
    """What nginx serves at an address, and the people who visit it."""

    def __init__(self, replicas: list[Program], port: int, certificate: Path) -> None:
        self.replicas = replicas
        self.port, self.plain_port = port, unused_port()
        self.url = f"https://127.0.0.1:{port}"
        self.plain_url = f"http://127.0.0.1:{self.plain_port}"
        self._tls = ssl.create_default_context(cafile=certificate / "fullchain.pem")
        self.http = self.visitor("127.0.0.1")
        self._people: list[Person] = []

    def visitor(self, address: str) -> aiohttp.ClientSession:
        """Return an HTTP client that comes from an address."""
        connector = aiohttp.TCPConnector(ssl=self._tls, local_addr=(address, 0))
        return aiohttp.ClientSession(connector=connector)

    async def new_session(self) -> str:
        async with self.http.post(f"{self.url}/api/sessions") as response:
            assert response.status == 201
            return str((await response.json())["session_id"])

    async def people(self, number: int = PEOPLE) -> list["Person"]:
        people = [Person(self, await self.new_session()) for _ in range(number)]
        self._people += people
        await asyncio.gather(*(person.connect() for person in people))
        return people

    async def aclose(self) -> None:
        await asyncio.gather(*(person.close() for person in self._people))
        await self.http.close()


@contextlib.asynccontextmanager
async def running_nginx(folder: Path, conf: Path, port: int) -> AsyncIterator[None]:
    # What goes wrong before the block's own log is open stands in start.log.
    command = (program_of("nginx"), "-p", folder, "-c", conf, "-e", folder / "start.log")
    process = await asyncio.create_subprocess_exec(*command)
    try:

        async def is_ready() -> bool:
            assert process.returncode is None, logs_of(folder)
            return await is_listening(port)

        await eventually(is_ready)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
        logged.extend(logs_of(folder))


def logs_of(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.glob("*.log")]


async def eventually(happened: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what no event tells of, and what can only be asked for."""
    async with asyncio.timeout(PATIENCE):
        while not await happened():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("document", [DEPLOYMENT, FRONTEND], ids=["deployment", "frontend"])
def test_nginx_accepts_the_block_as_it_stands(document: str, certificate: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may listen on ports 80 and 443")
    [block] = blocks(document, "nginx")
    command = (program_of("nginx"), "-t", "-p", tmp_path, "-c", write_conf(tmp_path, block, certificate, {}))
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stderr


# Two replicas on one Postgres


class Halves:
    """A model that says the first half of its reply at once, and the second when the test lets it."""

    def __init__(self, gemini: GeminiStandIn) -> None:
        gemini.default = self.answer
        self.mute: set[str] = set()  # messages for which there is no first half either
        self.asked: list[str] = []
        self._let: set[str] = set()
        self._all = False
        self._changed = asyncio.Condition()

    async def let(self, *messages: str) -> None:
        """Let the replies to some messages end, or all that there are and will be."""
        async with self._changed:
            self._let.update(messages)
            self._all |= not messages
            self._changed.notify_all()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        message = (await request.json())["contents"][-1]["parts"][0]["text"]
        self.asked.append(message)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if message not in self.mute:
            await response.write(event("네, "))
        async with self._changed:
            await self._changed.wait_for(lambda: self._all or message in self._let)
        if message in self.mute:
            await response.write(event("네, "))
        await response.write(event("듣고 있어요.") + event("", "STOP"))
        return response


TwoReplicas = Callable[..., contextlib.AbstractAsyncContextManager[Site]]
timestamps = itertools.count(1_800_000_000_000)


class Person(Frontend):
    """A person's page that follows the page's rule: reconnect, look up what was lost, ask once more."""

    # The page waits for 20 s, so that what a killed process sent to its database is there or never will be.
    RECOVERY_SECONDS = 0.5

    def __init__(self, site: Site, session_id: str) -> None:
        super().__init__(site.http, f"{site.url}/ws/session/{session_id}")
        self.site = site
        self.session_id = session_id
        self.codes: list[int | None] = []  # with which sockets were closed
        self.asked_again = 0
        self.looked_up = 0
        self.request: dict[str, Any] = {}

    async def connect(self) -> None:
        async def opens() -> bool:
            try:
                await self.open()
            except aiohttp.ClientError:  # nginx' 502 too
                return False
            return True

        await eventually(opens)

    async def ask(self, message: object = CANARY, **fields: object) -> None:
        self.request = {"message": message, "timestamp": next(timestamps), **fields}
        await super().ask(**self.request)

    async def next_frame(self, patience: float = PATIENCE) -> dict[str, Any] | None:
        """Return the next frame that was not seen yet; None where the connection is lost."""
        try:
            return await self.frame(patience)
        except ConnectionError:
            self.codes.append(self.ws.close_code)
            return None

    async def answer(self, frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the frames of the answer, after those that came; what was looked up in the same form."""
        while not frames or frames[-1]["type"] not in ENDS:
            frame = await self.next_frame()
            while frame is None:
                await self.connect()
                try:
                    frame = await self.next_frame(self.RECOVERY_SECONDS)
                except TimeoutError:
                    if (stored := await self.stored()) is not None:
                        self.looked_up += 1
                        chunk = {"type": "ai_stream_chunk", "data": {"chunk": stored}}
                        return [{"type": "ai_stream_begin"}, chunk, {"type": "ai_stream_complete"}]
                    frames, self.asked_again = [], self.asked_again + 1
                    await super().ask(**self.request)
                    frame = await self.next_frame()
            frames.append(frame)
        return frames

    async def turns(self) -> list[dict[str, Any]]:
        url = f"{self.site.url}/api/sessions/{self.session_id}/conversations"
        async with self.site.http.get(url) as response:
            assert response.status == 200
            return list((await response.json())["conversations"])

    async def stored(self) -> str | None:
        found = [turn for turn in await self.turns() if turn["timestamp"] == self.request["timestamp"]]
        return found[0]["ai_response"] if found else None


def values_for(postgres_url: str, gemini: GeminiStandIn) -> dict[str, object]:
    return {
        "DATABASE_URL": postgres_url,
        "GEMINI_API_KEY": "k",
        "GEMINI_BASE_URL": gemini.url,
        "TRUST_PROXY": 1,
        "STREAM_CHUNK_INTERVAL_MS": 0,
    }


@pytest.fixture
def two_replicas(tmp_path: Path, postgres_url: str, gemini: GeminiStandIn, certificate: Path) -> TwoReplicas:
    """Start two replicas behind nginx, by the block of docs/deployment.md."""

    @contextlib.asynccontextmanager
    async def start(**more: object) -> AsyncIterator[Site]:
        values = {**values_for(postgres_url, gemini), **more}
        async with started(tmp_path, **values) as left, started(tmp_path, **values) as right:
            site = Site([left, right], unused_port(), certificate)
            replacements = {
                "10.0.0.1:8000": f"127.0.0.1:{left.port}",
                "10.0.0.2:8000": f"127.0.0.1:{right.port}",
                "listen 443 ssl;": f"listen 127.0.0.1:{site.port} ssl;",
                "listen 80;": f"listen 127.0.0.1:{site.plain_port};",
            }
            [block] = blocks(DEPLOYMENT, "nginx")
            conf = write_conf(tmp_path, block, certificate, replacements)
            async with running_nginx(tmp_path, conf, site.port):
                async with contextlib.aclosing(site):
                    yield site

    return start


async def begin_to_talk(people: list[Person], model: Halves) -> list[list[dict[str, Any]]]:
    """Let all ask, and hear the first half of the reply where the model says it."""

    async def ask(number: int, person: Person) -> list[dict[str, Any]]:
        await person.ask(message := f"{CANARY} {number}")
        return [] if message in model.mute else await person.begun()

    halves = await asyncio.gather(*(ask(number, person) for number, person in enumerate(people)))
    await until(lambda: len(model.asked) == len(people))
    return list(halves)


def check_whole(answers: list[list[dict[str, Any]]]) -> None:
    for answer in answers:
        assert kinds_of(answer)[-1] == "complete", answer
        assert "interrupted" not in answer[-1]
        assert text_of(answer) == REPLY


async def test_stopped_replica_loses_no_reply(gemini: GeminiStandIn, two_replicas: TwoReplicas) -> None:
    model = Halves(gemini)
    async with two_replicas() as site:
        people = await site.people()
        halves = await begin_to_talk(people, model)
        stopped = site.replicas[0]
        stopped.process.send_signal(signal.SIGTERM)

        async def is_draining() -> bool:
            return not await is_listening(stopped.port)

        await eventually(is_draining)
        await model.let()
        check_whole(await asyncio.gather(*(person.answer(half) for person, half in zip(people, halves, strict=True))))

        async def after_the_end(person: Person) -> None:
            if person.codes:
                await person.connect()
            await person.ask("이어서 하는 말이에요")

        # Those of the stopped replica hear its goodbye through nginx; to the others a ping is the sign that they stay.
        reading = [asyncio.create_task(person.next_frame()) for person in people]
        assert await stopped.end() == 0
        for person, task in zip(people, reading, strict=True):
            if not task.done():
                with contextlib.suppress(ConnectionError):
                    await person.send("ping")
            await task
        closed = [person for person in people if person.codes]
        assert 0 < len(closed) < PEOPLE
        assert all(person.codes == [WSCloseCode.GOING_AWAY] for person in closed)
        await asyncio.gather(*(after_the_end(person) for person in people))
        check_whole(await asyncio.gather(*(person.answer([]) for person in people)))
        assert not any(person.asked_again for person in people)
        assert len(model.asked) == 2 * PEOPLE
        assert len(gemini.requests[-1]["body"]["contents"]) == 3  # what was said on the stopped replica is known
        for number, person in enumerate(people):
            turns = [(turn["user_message"], turn["ai_response"]) for turn in await person.turns()]
            assert turns == [(f"{CANARY} {number}", REPLY), ("이어서 하는 말이에요", REPLY)]


async def test_killed_replica_costs_no_answer(tmp_path: Path, gemini: GeminiStandIn, two_replicas: TwoReplicas) -> None:
    model = Halves(gemini)
    async with two_replicas() as site:
        model.mute = {f"{CANARY} {number}" for number in range(13, PEOPLE)}  # their replies have not begun
        people = await site.people()
        away, there = people[:6], people[6:]
        halves = await begin_to_talk(people, model)
        for person in away:  # their replies end, and are stored, while they are on their way back
            await person.cut()
            await model.let(person.request["message"])

            async def is_stored(person: Person = person) -> bool:
                return await person.stored() is not None

            await eventually(is_stored)
        killed = site.replicas[0].process
        killed.kill()
        await killed.wait()
        await model.let()
        check_whole(await asyncio.gather(*(person.answer(half) for person, half in zip(people, halves, strict=True))))
        assert not any(person.asked_again for person in away)
        assert all(person.asked_again == len(person.codes) for person in there)
        asked_again = sum(person.asked_again for person in there)
        # Those away whom the other replica serves got from it what it had kept.
        assert 0 < asked_again + sum(person.looked_up for person in away) < PEOPLE
        assert len(model.asked) == PEOPLE + asked_again
        for number, person in enumerate(people):
            turns = [(turn["user_message"], turn["ai_response"]) for turn in await person.turns()]
            assert turns == [(f"{CANARY} {number}", REPLY)]
        logs = logs_of(tmp_path)
        assert not any(person.session_id in log for log in logs for person in people)


async def test_erasing_reaches_the_replica_that_streams(gemini: GeminiStandIn, two_replicas: TwoReplicas) -> None:
    model = Halves(gemini)
    async with two_replicas() as site:
        people = await site.people()
        await begin_to_talk(people, model)

        async def erase(person: Person) -> None:
            async with site.http.delete(f"{site.url}/api/sessions/{person.session_id}") as response:
                assert response.status == 204

        async def ending(person: Person) -> None:
            frame = await person.next_frame()
            assert frame is not None
            assert (frame["type"], frame["interrupted"]) == ("ai_stream_complete", True)
            assert await person.next_frame() is None

        await asyncio.gather(*map(erase, people), *map(ending, people))
        assert {code for person in people for code in person.codes} == {WSCloseCode.OK}


async def test_client_cannot_forge_its_address_or_scheme(gemini: GeminiStandIn, two_replicas: TwoReplicas) -> None:
    async with two_replicas(MAX_NEW_SESSIONS_PER_MINUTE=3) as site:
        insecure = site.url.replace("https:", "http:")

        async def ask_for_session(http: aiohttp.ClientSession, **headers: str) -> int:
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            async with http.post(f"{site.url}/api/sessions", headers=headers) as response:
                return response.status

        here = site.http
        assert await ask_for_session(here, Origin=insecure, X_Forwarded_Proto="http") == 403
        assert await ask_for_session(here, Origin=site.url, X_Forwarded_Proto="http") == 201
        assert await ask_for_session(here, X_Forwarded_For="203.0.113.1") == 201
        assert await ask_for_session(here, X_Forwarded_For="203.0.113.2, 203.0.113.3") == 201
        assert await ask_for_session(here, X_Forwarded_For="203.0.113.4") == 429
        async with site.visitor("127.0.0.2") as there:
            assert await ask_for_session(there, X_Forwarded_For="127.0.0.1") == 201


async def test_headers_of_the_handshake_get_through(gemini: GeminiStandIn, two_replicas: TwoReplicas) -> None:
    tokens = {"JWT_SECRET_KEY": SECRET, "REQUIRE_SESSION_TOKEN": 1}
    async with two_replicas(**tokens) as site:
        async with site.http.post(f"{site.url}/api/sessions") as response:
            made = await response.json()
        url, token = f"{site.url}{made['websocket_path']}", made["token"]
        bearer = {"Authorization": f"Bearer {token}"}
        async with site.http.get(url) as response:
            assert (response.status, (await response.json())["code"]) == (401, "invalid_token")
        async with site.http.get(url, headers=bearer) as response:
            assert (response.status, (await response.json())["code"]) == (426, "upgrade_required")
        # As Firefox says it; aiohttp says Upgrade alone.
        options: list[dict[str, Any]] = [
            {"headers": bearer | {"Connection": "keep-alive, Upgrade"}},
            {"headers": {"Origin": site.url}, "params": {"token": token}},
        ]
        for option in options:
            client = await Frontend(site.http, url, **option).open()
            await client.silent()
            await client.ask(CANARY)
            assert text_of(await client.reply()) == REPLY
            await client.close()
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await site.http.ws_connect(url, headers=bearer | {"Origin": "https://elsewhere.example"})
        assert refused.value.status == 403
        async with site.http.get(site.url) as page:
            assert page.status == 200
            assert "script-src" in page.headers["Content-Security-Policy"]
        async with site.http.get(f"{site.plain_url}/a?b=1", allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (301, "https://127.0.0.1/a?b=1")


# The public frontend, with its Node backend beside this server

FRONTEND_ORIGIN = "https://frontend.example"
PATHS_OF_NODE = [
    "POST /api/session/start",
    "GET /api/session/{id}",
    "POST /api/session/{id}/pause",
    "POST /api/session/{id}/resume",
    "POST /api/session/{id}/tick",
    "POST /api/session/batch-tick",
    "POST /api/session/devices/check",
    "GET /api/session/stats/summary",
    "POST /api/session/{id}/end",
    "GET /api/session/{id}/report",
    "GET /api/session/{id}/summary",
    "GET /api/session/{id}/report/pdf",
    "GET /api/session/{id}/report/summary",
    "GET /api/session/{id}/report/csv?kind=vad",
    "POST /api/session/{id}/feedback",
    "POST /api/stt/transcribe",
    "GET /api/monitoring/error-stats",
    "GET /api/monitoring/health",
    "GET /api/dashboard/summary",
    "GET /api/user/preferences",
    "PUT /api/user/preferences",
    "POST /api/emotion",
    "POST /api/auth/login",
    "POST /api/auth/refresh",
    "GET /api/auth/me",
    "GET /health",
]


def headers_of_the_frontend(**more: str) -> dict[str, str]:
    """Return what its HTTP client adds to every call."""
    return {
        "Origin": FRONTEND_ORIGIN,
        "X-Request-ID": "req_1763000000000_1a2b3c4d",
        "X-Frontend-Version": "1.2.0",
        "X-Device-ID": "device_1a2b3c4d",
        "X-Timestamp": "1763000000000",
        "X-CSRF-Token": "csrf",
        **more,
    }


class Node:
    """A stub of the frontend's backend, which keeps the calls and the sockets that reach it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, str]]] = []
        self.sockets: list[str] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade") == "websocket":
            self.sockets.append(request.path)
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            async for message in socket:
                await socket.send_str(message.data)
            return socket
        await request.read()
        self.calls.append((f"{request.method} {request.path_qs}", dict(request.headers)))
        return web.json_response({"success": True, "data": {}})


@contextlib.asynccontextmanager
async def running_node() -> AsyncIterator[tuple[Node, int]]:
    node = Node()
    app = web.Application(client_max_size=2**25)
    app.router.add_route("*", "/{path:.*}", node.answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield node, runner.addresses[0][1]
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def frontend_site(folder: Path, certificate: Path, **more: object) -> AsyncIterator[tuple[Site, Node]]:
    """Run what docs/frontend.md describes: its settings, its block, and a stub of Node."""
    settings = dict(line.split("=", 1) for line in block_with(FRONTEND, "AUTO_CREATE_SESSIONS=1").split())
    assert settings["ALLOWED_ORIGINS"] == FRONTEND_ORIGIN
    async with running_node() as (node, node_port), started(folder, **{**settings, "PORT": 0, **more}) as voice:
        site = Site([voice], unused_port(), certificate)
        [block] = blocks(FRONTEND, "nginx")
        replacements = {
            "127.0.0.1:8000": f"127.0.0.1:{node_port}",
            f"127.0.0.1:{settings['PORT']}": f"127.0.0.1:{voice.port}",
            "listen 443 ssl;": f"listen 127.0.0.1:{site.port} ssl;",
        }
        conf = write_conf(folder, block, certificate, replacements)
        async with running_nginx(folder, conf, site.port), contextlib.aclosing(site):
            yield site, node


async def test_calls_of_the_frontend_reach_node(tmp_path: Path, certificate: Path) -> None:
    session_id = "sess_1763000000000_1a2b3c4d"
    headers = headers_of_the_frontend(Authorization="Bearer of-the-login")
    async with frontend_site(tmp_path, certificate) as (site, node):
        calls = [path.replace("{id}", session_id) for path in PATHS_OF_NODE]
        for method, path in map(str.split, calls):
            # Audio is larger than the megabyte that nginx takes by default.
            body = None if method == "GET" else io.BytesIO(bytes(2**21 if "transcribe" in path else 2))
            async with site.http.request(method, site.url + path, headers=headers, data=body) as response:
                assert response.status == 200
        assert [call for call, _ in node.calls] == calls
        assert all(headers.items() <= came.items() for _, came in node.calls)
        for path in (f"/ws/landmarks/{session_id}", f"/ws/voice/{session_id}"):
            async with site.http.ws_connect(site.url + path, origin=FRONTEND_ORIGIN) as socket:
                await socket.send_str('{"type":"ping"}')
                assert await socket.receive_str(timeout=PATIENCE) == '{"type":"ping"}'
        assert len(node.sockets) == 2


async def test_talk_of_the_frontend_reaches_this_server(tmp_path: Path, certificate: Path) -> None:
    """It asks as the frontend does, then reads and erases by the calls that docs/frontend.md gives its two buttons."""
    session_id = "sess_1763000000000_1a2b3c4d"
    tokens = {"JWT_SECRET_KEY": SECRET, "REQUIRE_SESSION_TOKEN": 1}
    async with frontend_site(tmp_path, certificate, **tokens) as (site, node):
        talk = f"{site.url}/api/sessions/{session_id}"
        token = token_for(session_id, iat=int(time.time()))
        options = {"params": {"token": token}, "origin": FRONTEND_ORIGIN}
        client = await Frontend(site.http, f"{site.url}/ws/session/{session_id}", **options).open()
        for text in ('{"type":"ping"}', '{"type":"ping"}'):
            await client.ws.send_str(text)
            assert (await client.frame())["type"] == "pong"
        await client.ask(emotion="anxious", timestamp=1_763_000_000_000)
        assert kinds_of(await client.reply())[-1] == "complete"
        await client.ask(emotion=None)
        assert kinds_of(await client.reply())[-1] == "complete"

        wanted = "authorization,x-client-version,x-csrf-token,x-device-id,x-request-id,x-timestamp"
        preflight = {"Origin": FRONTEND_ORIGIN, "Access-Control-Request-Headers": wanted}
        preflight["Access-Control-Request-Method"] = "DELETE"
        async with site.http.options(talk, headers=preflight) as response:
            assert response.ok
            assert response.headers["Access-Control-Allow-Origin"] == FRONTEND_ORIGIN
            assert response.headers["Access-Control-Allow-Credentials"] == "true"
            assert set(wanted.split(",")) <= set(response.headers["Access-Control-Allow-Headers"].lower().split(","))
        headers = headers_of_the_frontend(Authorization=f"Bearer {token}")
        async with site.http.get(f"{talk}/conversations?limit=200", headers=headers) as response:
            page = (await response.json())["conversations"]
            assert [turn["user_message"] for turn in page] == [CANARY, CANARY]
        async with site.http.get(f"{talk}/conversations?limit=200&before={page[0]['id']}", headers=headers) as response:
            assert (await response.json())["conversations"] == []
        login = headers_of_the_frontend(Authorization="Bearer of-the-login")
        async with site.http.get(f"{talk}/conversations", headers=login) as response:
            assert response.status == 401
        async with site.http.delete(talk, headers=headers) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == FRONTEND_ORIGIN
        assert (node.calls, node.sockets) == ([], [])
        assert not any(session_id in log for log in logs_of(tmp_path))

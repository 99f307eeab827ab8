"""Two replicas on one Postgres behind a real nginx, by the very block that docs/deployment.md shows."""

import asyncio
import contextlib
import getpass
import itertools
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSCloseCode, web
from aiohttp.test_utils import unused_port
from standin import GeminiStandIn, event
from support import CANARY, ENDS, SECRET, Frontend, Program, hear, is_listening, kinds_of, logged, started, text_of
from tools import PATIENCE, until

DEPLOYMENT = Path(__file__).parent.parent / "docs" / "deployment.md"
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


def block_of_the_documents(replacements: dict[str, str]) -> str:
    """The block, with what must differ here replaced: each exactly once."""
    found = re.search(r"```nginx\n(.*?)```", DEPLOYMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    block = found[1]
    for shown, here in replacements.items():
        assert block.count(shown) == 1, shown
        block = block.replace(shown, here)
    return block


class Site:
    """Replicas, and the address at which nginx answers for them."""

    def __init__(self, replicas: list[Program], port: int) -> None:
        self.replicas = replicas
        self.url = f"http://127.0.0.1:{port}"
        self.address = ("127.0.0.1", port)
        self.http = aiohttp.ClientSession()
        self._people: list[Person] = []

    async def new_session(self) -> str:
        async with self.http.post(f"{self.url}/api/sessions") as response:
            assert response.status == 201
            return str((await response.json())["session_id"])

    async def people(self, number: int = PEOPLE) -> list["Person"]:
        people = [Person(self, await self.new_session()) for _ in range(number)]
        self._people += people
        await asyncio.gather(*(person.connect() for person in people))
        return people

    async def close(self) -> None:
        await asyncio.gather(*(person.client.ws.close() for person in self._people if person.client is not None))
        await self.http.close()


@contextlib.asynccontextmanager
async def behind_nginx(folder: Path, *replicas: Program) -> AsyncIterator[Site]:
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        assert not os.environ.get("CI"), "nginx is missing"
        pytest.skip("nginx is not installed")
    site = Site(list(replicas), unused_port())
    block = block_of_the_documents(
        {
            "10.0.0.1:8000": f"127.0.0.1:{replicas[0].port}",
            "10.0.0.2:8000": f"127.0.0.1:{replicas[1].port}",
            "listen 443 ssl;": f"listen 127.0.0.1:{site.address[1]};",
            "/var/log/nginx/voice.log": f"{folder}/error.log",
        }
    )
    conf = folder / "nginx.conf"
    conf.write_text(AROUND.format(folder=folder, user=getpass.getuser(), block=block))
    start_log = folder / "start.log"  # of what goes wrong before the block's own log is open
    process = await asyncio.create_subprocess_exec(program, "-p", folder, "-c", conf, "-e", start_log)
    try:

        async def is_ready() -> bool:
            assert process.returncode is None, logs_of(folder)
            return await is_listening(site.address[1])

        await eventually(is_ready)
        yield site
    finally:
        await site.close()
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


timestamps = itertools.count(1_800_000_000_000)


class Person:
    """Somebody at a page, who follows its rule: reconnect, drop what was seen, look up what was lost, ask once more."""

    # The page waits for 20 s, so that what a killed process sent to its database is there or never will be.
    RECOVERY_SECONDS = 0.5

    def __init__(self, site: Site, session_id: str) -> None:
        self.site = site
        self.session_id = session_id
        self.client: Frontend | None = None
        self.last_seq = 0
        self.codes: list[int | None] = []  # with which sockets were closed
        self.asked_again = 0
        self.looked_up = 0
        self.request: dict[str, Any] = {}

    async def connect(self) -> None:
        url = f"{self.site.url}/ws/session/{self.session_id}"
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(aiohttp.ClientError):  # nginx' 502 too
                    self.client = await Frontend(self.site.http, url).open()
                    return
                await asyncio.sleep(0.05)

    async def ask(self, message: str) -> None:
        hear(message)
        self.request = {"message": message, "timestamp": next(timestamps)}
        await self.send()

    async def send(self) -> None:
        assert self.client is not None
        await self.client.send("request_ai_response", self.request)

    async def leave(self) -> None:
        assert self.client is not None
        await self.client.cut()

    async def next_frame(self, patience: float = PATIENCE) -> dict[str, Any] | None:
        """The next frame that was not seen yet; None where the connection is lost."""
        assert self.client is not None
        while True:
            message = await self.client.ws.receive(timeout=patience)
            if message.type is not aiohttp.WSMsgType.TEXT:
                self.codes.append(self.client.ws.close_code)
                return None
            frame: dict[str, Any] = message.json()
            if (seq := frame.get("seq")) is None:
                return frame
            if seq > self.last_seq:
                self.last_seq = seq
                return frame

    async def begun(self) -> list[dict[str, Any]]:
        """The frames up to the first half of the reply."""
        frames = [await self.next_frame(), await self.next_frame()]
        known = [frame for frame in frames if frame is not None]
        assert kinds_of(known) == ["begin", "chunk"]
        return known

    async def answer(self, frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The frames of the answer, after those that came; what the page says by itself in the same form."""
        returned, asked_again = False, False
        while not frames or frames[-1]["type"] not in ENDS:
            try:
                frame = await self.next_frame(self.RECOVERY_SECONDS if returned else PATIENCE)
            except TimeoutError:
                assert returned, "no answer"
                returned = False
                if (stored := await self.stored()) is not None:
                    self.looked_up += 1
                    chunk = {"type": "ai_stream_chunk", "data": {"chunk": stored}}
                    return [{"type": "ai_stream_begin"}, chunk, {"type": "ai_stream_complete"}]
                if asked_again:
                    return [*frames, {"type": "ai_stream_error", "code": "lost"}]
                frames, asked_again = [], True
                self.asked_again += 1
                await self.send()
                continue
            if returned := frame is None:
                await self.connect()
            elif frame is not None:
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


@contextlib.asynccontextmanager
async def two_replicas(folder: Path, postgres_url: str, gemini: GeminiStandIn, **more: object) -> AsyncIterator[Site]:
    values = {**values_for(postgres_url, gemini), **more}
    async with started(folder, **values) as left, started(folder, **values) as right:
        async with behind_nginx(folder, left, right) as site:
            yield site


async def begin_to_talk(people: list[Person], model: Halves) -> list[list[dict[str, Any]]]:
    """Let everybody ask, and hear the first half of the reply where the model says it."""

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


async def test_a_replica_that_is_stopped_loses_no_reply(
    tmp_path: Path, gemini: GeminiStandIn, postgres_url: str
) -> None:
    model = Halves(gemini)
    async with two_replicas(tmp_path, postgres_url, gemini) as site:
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
            assert person.client is not None
            if not task.done():
                with contextlib.suppress(ConnectionError):
                    await person.client.send("ping")
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


async def test_a_replica_that_is_killed_costs_nobody_an_answer(
    tmp_path: Path, gemini: GeminiStandIn, postgres_url: str
) -> None:
    model = Halves(gemini)
    async with two_replicas(tmp_path, postgres_url, gemini) as site:
        model.mute = {f"{CANARY} {number}" for number in range(13, PEOPLE)}  # their replies have not begun
        people = await site.people()
        away, there = people[:6], people[6:]
        halves = await begin_to_talk(people, model)
        for person in away:  # their replies end, and are stored, while they are on their way back
            await person.leave()
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


async def test_a_request_that_two_killed_replicas_lost_ends_in_a_clear_error(
    tmp_path: Path, gemini: GeminiStandIn, postgres_url: str
) -> None:
    model = Halves(gemini)
    values = values_for(postgres_url, gemini)
    async with two_replicas(tmp_path, postgres_url, gemini) as site:
        model.mute = {f"{CANARY} {number}" for number in range(2)}
        people = await site.people(4)
        halves = await begin_to_talk(people, model)
        answering = [asyncio.create_task(person.answer(half)) for person, half in zip(people, halves, strict=True)]

        async def replace_both() -> None:
            for program in site.replicas:
                program.process.kill()
                await program.process.wait()
            async with site.http.get(f"{site.url}/health") as response:
                assert response.status == 502
            ports = [program.port for program in site.replicas]
            again = [await stack.enter_async_context(started(tmp_path, **values, PORT=port)) for port in ports]
            site.replicas = again

        async with contextlib.AsyncExitStack() as stack:
            await replace_both()
            await until(lambda: len(model.asked) == 8)
            await replace_both()
            answers = await asyncio.gather(*answering)
            assert [answer[-1].get("code") for answer in answers] == ["lost"] * 4
            await model.let()
            for person in people:
                assert await person.turns() == []
                await person.ask("이어서 하는 말이에요")  # as the sentence asks for
            check_whole(await asyncio.gather(*(person.answer([]) for person in people)))


async def test_a_conversation_is_erased_where_its_reply_streams(
    tmp_path: Path, gemini: GeminiStandIn, postgres_url: str
) -> None:
    model = Halves(gemini)
    async with two_replicas(tmp_path, postgres_url, gemini) as site:
        people = await site.people()
        await begin_to_talk(people, model)
        for person in people:
            async with site.http.delete(f"{site.url}/api/sessions/{person.session_id}") as response:
                assert response.status == 204
        for answer in await asyncio.gather(*(person.answer([]) for person in people)):
            assert kinds_of(answer) == ["complete"]
            assert answer[0]["interrupted"]


async def test_what_a_client_says_of_address_and_scheme_does_not_count(
    tmp_path: Path, gemini: GeminiStandIn, postgres_url: str
) -> None:
    async with two_replicas(tmp_path, postgres_url, gemini, MAX_NEW_SESSIONS_PER_MINUTE=3) as site:
        secure = site.url.replace("http:", "https:")

        async def ask_for_session(http: aiohttp.ClientSession, **headers: str) -> int:
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            async with http.post(f"{site.url}/api/sessions", headers=headers) as response:
                return response.status

        here = site.http
        assert await ask_for_session(here, Origin=secure, X_Forwarded_Proto="https") == 403
        assert await ask_for_session(here, Origin=site.url, X_Forwarded_Proto="https") == 201
        assert await ask_for_session(here, X_Forwarded_For="203.0.113.1") == 201
        assert await ask_for_session(here, X_Forwarded_For="203.0.113.2, 203.0.113.3") == 201
        assert await ask_for_session(here, X_Forwarded_For="203.0.113.4") == 429
        elsewhere = aiohttp.TCPConnector(local_addr=("127.0.0.2", 0))
        async with aiohttp.ClientSession(connector=elsewhere) as there:
            assert await ask_for_session(there, X_Forwarded_For="127.0.0.1") == 201


async def test_the_headers_of_the_handshake_get_through(
    tmp_path: Path, gemini: GeminiStandIn, postgres_url: str
) -> None:
    tokens = {"JWT_SECRET_KEY": SECRET, "REQUIRE_SESSION_TOKEN": 1}
    async with two_replicas(tmp_path, postgres_url, gemini, **tokens) as site:
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
            assert "script-src 'sha256-" in page.headers["Content-Security-Policy"]

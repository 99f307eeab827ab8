"""What the tests are built from: a running server, a client with a time limit, two stand-ins for the model."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import aiohttp
import jwt
from aiohttp import web
from tools import PATIENCE

from bemore.counsellor import Counsellor, Notice, Prompt, Say
from bemore.settings import Settings, read_settings
from bemore.storage import Storage, Unavailable
from bemore_voice import SESSIONS, Session, Sessions, create_app, make_runner, make_storage

# What people say in the tests, for as long as one runs: conftest.py looks for it in every log line and, after erasing,
# in every table and file. Shorter words are found by chance.
CANARY = "카나리아는 새벽마다 나만 아는 노래를 부릅니다"
SHORTEST_SAID = 5
said: set[str] = set()
logged: list[str] = []

MODULE = Path(__file__).parent.parent / "bemore_voice.py"
COMMAND = (sys.executable, str(MODULE))
ENDS = ("ai_stream_complete", "ai_stream_error")


def hear(text: object) -> None:
    if isinstance(text, str) and len(text.strip()) >= SHORTEST_SAID:
        said.add(text.strip())


def make_settings(database_url: str = "sqlite:///:memory:", **values: object) -> Settings:
    """Settings of a test: no pacing and a demo counsellor unless it says otherwise."""
    base = {"DATABASE_URL": database_url, "PORT": "0", "DEMO_MODE": "1", "STREAM_CHUNK_INTERVAL_MS": "0"}
    return read_settings({**base, **{name: str(value) for name, value in values.items()}})


SECRET = "0123456789abcdef0123456789abcdef"


def token_for(session_id: object, secret: str | None = SECRET, algorithm: str = "HS256", **claims: object) -> str:
    """A token as the server issues it, but for what a test makes wrong with it."""
    return jwt.encode({"sub": session_id, "exp": int(time.time()) + 60, **claims}, secret or "", algorithm=algorithm)


class FaultyStorage(Storage):
    """A storage between which and the server a test puts a fault: a failure, or a wait before each statement."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.description = inner.description
        self.fault: Unavailable | None = None
        self.broken: set[object] = set()  # sessions for which the database does not answer
        self.wait: Callable[[str], Awaitable[None]] | None = None
        self.statements: list[str] = []

    async def __aenter__(self) -> Self:
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.inner.__aexit__()

    async def _run(self, sql: str, values: Sequence[object], *, create: bool) -> Sequence[Any]:
        self.statements.append(sql)
        if self.wait is not None:
            await self.wait(sql)
        if self.fault is not None or self.broken.intersection(values[:1]):
            raise self.fault or Unavailable("database: test")
        return await self.inner.fetch(sql, *values, create=create)

    def hang(self) -> asyncio.Event:
        """Let no statement through until the event is set that is returned."""
        free = asyncio.Event()

        async def wait(_: str) -> None:
            await free.wait()

        self.wait = wait
        return free

    def fail(self) -> None:
        self.fault = Unavailable("database: test")

    def heal(self) -> None:
        self.fault = None


class Talk:
    """One reply of the scripted counsellor, said word by word by the test."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.closed = asyncio.Event()
        self.prompt: Prompt | None = None
        self._words: asyncio.Queue[str | Notice | BaseException | None] = asyncio.Queue()

    def say(self, *words: str) -> Self:
        for word in words:
            hear(word)
            self._words.put_nowait(word)
        return self

    def notice(self) -> Self:
        """Tell the server that the person is in danger."""
        self._words.put_nowait(Notice.RISK)
        return self

    def end(self) -> Self:
        self._words.put_nowait(None)
        return self

    def fail(self, error: BaseException) -> Self:
        self._words.put_nowait(error)
        return self

    async def tell(self, prompt: Prompt, say: Say) -> None:
        self.prompt = prompt
        self.asked.set()
        try:
            while (word := await self._words.get()) is not None:
                if isinstance(word, BaseException):
                    raise word
                say(word)
        finally:
            self.closed.set()


class ScriptedCounsellor(Counsellor):
    """A counsellor whose replies the test holds in its hand; unscripted ones say the message back in two words."""

    name = "scripted"

    def __init__(self) -> None:
        self.talks: deque[Talk] = deque()
        self.prompts: list[Prompt] = []

    def expect(self) -> Talk:
        """Script the next reply that has no script yet."""
        self.talks.append(Talk())
        return self.talks[-1]

    async def reply(self, prompt: Prompt, say: Say) -> None:
        self.prompts.append(prompt)
        talk = self.talks.popleft() if self.talks else Talk().say("들은 말: ", prompt.message).end()
        await talk.tell(prompt, say)


class Client:
    """A socket that fails a test rather than wait for ever."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws

    async def send(self, kind: str, data: object = None, **beside: object) -> None:
        await self.ws.send_str(json.dumps({"type": kind, "data": data, **beside}))

    async def ask(self, message: object = CANARY, **fields: object) -> None:
        hear(message)
        await self.send("request_ai_response", {"message": message, **fields})

    async def frame(self) -> dict[str, Any]:
        message = await self.ws.receive(timeout=PATIENCE)
        assert message.type is aiohttp.WSMsgType.TEXT, message
        frame: dict[str, Any] = json.loads(message.data)
        return frame

    async def reply(self) -> list[dict[str, Any]]:
        """The frames up to the end of one reply."""
        frames = [await self.frame()]
        while frames[-1]["type"] not in ENDS:
            frames.append(await self.frame())
        return frames

    async def silent(self) -> None:
        """Check that nothing has been sent: the next frame is the answer to a ping."""
        await self.send("ping")
        assert (await self.frame())["type"] == "pong"

    async def closed(self) -> int | None:
        """Read to the end, and return the close code."""
        while not self.ws.closed:
            await self.ws.receive(timeout=PATIENCE)
        return self.ws.close_code

    async def cut(self) -> None:
        """Break the connection without a close frame."""
        self.ws.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        await self.ws.close()


async def send_together(client: Client, *frames: tuple[str, object]) -> None:
    """Send frames in one packet."""
    messages = [json.dumps({"type": kind, "data": data}).encode() for kind, data in frames]
    packets = b""
    for message in messages:  # masked by zeros: a client's frames must have a mask, of any kind
        size = bytes([0x80 | len(message)]) if len(message) < 126 else b"\xfe" + len(message).to_bytes(2, "big")
        packets += b"\x81" + size + bytes(4) + message
    os.write(client.ws.get_extra_info("socket").fileno(), packets)


def text_of(frames: list[dict[str, Any]]) -> str:
    return "".join(frame["data"]["chunk"] for frame in frames if frame["type"] == "ai_stream_chunk")


def kinds_of(frames: list[dict[str, Any]]) -> list[str]:
    return [frame["type"].removeprefix("ai_stream_") for frame in frames]


class Server:
    """The application on a free port, with what a test wants to look at."""

    def __init__(self, runner: web.AppRunner, storage: Storage, http: aiohttp.ClientSession) -> None:
        self.runner = runner
        self.storage = storage
        self.http = http
        host, port = runner.addresses[0][:2]
        self.address = (host, port)
        self.url = f"http://{host}:{port}"

    @asynccontextmanager
    async def connect(self, session_id: str = "가", **options: Any) -> AsyncIterator[Client]:
        async with self.http.ws_connect(f"{self.url}/ws/session/{session_id}", **options) as ws:
            yield Client(ws)

    def session(self, session_id: str = "가") -> Session:
        return self.runner.app[SESSIONS].get(session_id)

    @property
    def sessions(self) -> Sessions:
        return self.runner.app[SESSIONS]

    async def rows(self, session_id: str = "가") -> list[tuple[Any, ...]]:
        """What is stored: message, reply, emotion and timestamp of each turn."""
        return [
            tuple(row)
            for row in await self.storage.fetch(
                "SELECT user_message, ai_response, emotion, timestamp FROM conversations"
                " WHERE session_id = $1 ORDER BY id",
                session_id,
            )
        ]


@asynccontextmanager
async def serve(
    settings: Settings, counsellor: Counsellor, storage: Storage | None = None, port: int = 0, **options: Any
) -> AsyncIterator[Server]:
    storage = storage or make_storage(settings)
    runner = make_runner(create_app(settings, storage, counsellor, **options))
    try:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        async with aiohttp.ClientSession() as http:
            yield Server(runner, storage, http)
    finally:
        await runner.cleanup()


class Wire:
    """A connection that a test can freeze, cut and heal: a TCP proxy to one address."""

    def __init__(self, open_target: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]) -> None:
        self._open_target = open_target
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.down = False
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()

    def strand(self) -> None:
        """Freeze the connections there are for good, and let new ones through."""
        self._flowing.clear()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            writer.transport.abort()
            return
        try:
            target_reader, target_writer = await self._open_target()
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, target_writer}
        flowing = self._flowing
        try:
            await asyncio.gather(self._pump(reader, target_writer, flowing), self._pump(target_reader, writer, flowing))
        finally:
            self._writers -= {writer, target_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flowing: asyncio.Event) -> None:
        try:
            while data := await reader.read(65536):
                await flowing.wait()
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()

    def freeze(self) -> None:
        """Let nothing through, in either direction, and tell nobody: a phone that has left the network."""
        self._flowing.clear()

    def cut(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            writer.transport.abort()
        self._flowing.set()


# The program as it is started


class Program:
    """The module in a process of its own, in a folder of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log = ""
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def wait_for(self, pattern: str) -> re.Match[str]:
        assert self.process.stderr is not None
        while not (match := re.search(pattern, self.log)):
            line = await asyncio.wait_for(self.process.stderr.readline(), PATIENCE)
            assert line, self.log
            self.log += line.decode()
        return match

    async def end(self) -> int:
        """Read the rest of the log, and return the exit status."""
        assert self.process.stderr is not None
        self.log += (await asyncio.wait_for(self.process.stderr.read(), PATIENCE)).decode()
        return await asyncio.wait_for(self.process.wait(), PATIENCE)

    @asynccontextmanager
    async def connect(self, session_id: str = "s") -> AsyncIterator[Client]:
        url = f"ws://127.0.0.1:{self.port}/ws/session/{session_id}"
        async with aiohttp.ClientSession() as http, http.ws_connect(url) as ws:
            yield Client(ws)


@asynccontextmanager
async def start(folder: Path, command: Sequence[str] = COMMAND, /, **values: object) -> AsyncIterator[Program]:
    environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    environment |= {name: str(value) for name, value in values.items()}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env=environment, stderr=asyncio.subprocess.PIPE, start_new_session=True
    )
    program = Program(process)
    try:
        yield program
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):  # killed a moment ago
                os.killpg(process.pid, signal.SIGKILL)  # with what the command may have started
        logged.extend([program.log, (await process.communicate())[1].decode()])


@asynccontextmanager
async def started(folder: Path, command: Sequence[str] = COMMAND, /, **values: object) -> AsyncIterator[Program]:
    async with start(folder, command, **{"PORT": 0, **values}) as program:
        match = await program.wait_for(r"BeMore voice \S+ on http://[\d.]+:(\d+), .*")
        program.port = int(match[1])
        yield program

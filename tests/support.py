"""What tests and bench/ are built from: a running server, two kinds of client, faults that prove that they happened."""

import asyncio
import base64
import json
import os
import re
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar, cast
from urllib.parse import quote

import aiohttp
import jwt
from aiohttp import WSMsgType, web
from tools import PATIENCE, until
from yarl import URL

from bemore.client import Client
from bemore.counsellor import Counsellor, Notice, Prompt, Say
from bemore.settings import Settings, read_settings
from bemore.storage import Storage, Unavailable
from bemore_voice import SESSIONS, Limits, Sessions, create_app, make_counsellor, make_runner, make_storage

# What people say in the tests, for as long as one runs: conftest.py looks for it in every log line and, after erasing,
# in every table and file. Shorter words are found by chance.
CANARY = "카나리아는 새벽마다 나만 아는 노래를 부릅니다"
SHORTEST_SAID = 5
said: set[str] = set()
logged: list[str] = []

MODULE = Path(__file__).parent.parent / "bemore_voice.py"
COMMAND = (sys.executable, str(MODULE))
ENDS = ("ai_stream_complete", "ai_stream_error")

# Where a time is the promise, its limit is multiplied by this: a busy machine sets it to 3 or more.
TIME_SCALE = float(os.environ.get("TIME_SCALE", "1"))

Found = TypeVar("Found")
Frame = dict[str, Any]
Sent = tuple[str, object]  # a frame's type and data


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
    """A storage between which and the server a test puts a fault: a failure, or a wait before each statement.

    A fault that no statement met fails the test: at heal(), or at the end.
    """

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.description = inner.description
        self.fault: Unavailable | None = None
        self.broken: set[object] = set()  # sessions for which the database does not answer
        self.wait: Callable[[str], Awaitable[None]] | None = None
        self.statements: list[str] = []
        self.failed = 0  # statements that met a fault
        self._unmet = ""
        self._lost: list[str] = []

    async def __aenter__(self) -> Self:
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.inner.__aexit__()
        self._check_met()

    async def _run(self, sql: str, values: Sequence[object], *, create: bool) -> Sequence[Any]:
        self.statements.append(sql)
        if self.wait is not None:
            await self.wait(sql)
        if self.fault is not None or self.broken.intersection(values[:1]):
            self.failed += 1
            self._unmet = ""
            raise self.fault or Unavailable("database: test")
        rows = await self.inner.fetch(sql, *values, create=create)
        if self._lost and self._lost[-1] in sql:
            self._lost.pop()
            self.failed += 1
            self._unmet = "lose_answers" if self._lost else ""
            raise Unavailable("database: test")
        return rows

    def hang(self) -> asyncio.Event:
        """Let no statement through until the event is set that is returned."""
        free = asyncio.Event()
        self._unmet = "hang"

        async def wait(_: str) -> None:
            if not free.is_set():
                self._unmet = ""
            await free.wait()

        self.wait = wait
        return free

    def fail(self) -> None:
        """Let every statement fail until heal()."""
        self.fault = Unavailable("database: test")
        self._unmet = "fail"

    def heal(self) -> None:
        self.fault = None
        self._check_met()

    def lose_answers(self, words: str, times: int) -> None:
        """Commit so many of the statements with these words, and fail before the server hears of it."""
        self._lost = [words] * times
        self._unmet = "lose_answers"

    def _check_met(self) -> None:
        assert not self._unmet, f"no statement met the fault: {self._unmet}"


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

    async def heard(self) -> None:
        """Wait until the server has been told all that was said so far."""
        await self._words.join()

    def notice(self, notice: Notice = Notice.SELF) -> Self:
        """Tell the server that the person is in danger, or a danger to others."""
        self._words.put_nowait(notice)
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
                self._words.task_done()
        finally:
            self.closed.set()


class ScriptedCounsellor(Counsellor):
    """A counsellor whose replies the test holds in its hand; unscripted ones say the message back in two words."""

    name = "scripted"
    kind = "gemini"

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


# Clients


class Frontend:
    """A client that keeps the documented rule: it ignores a frame whose seq it has seen, also after a reconnect.

    It fails a test rather than wait for ever. `frames` are all that it has taken, but for pongs.
    """

    def __init__(self, http: aiohttp.ClientSession, url: str, **options: Any) -> None:
        self.frames: list[Frame] = []
        self._http, self._url, self._options = http, url, options
        self._ws: aiohttp.ClientWebSocketResponse | None = None
        self._abandoned: list[aiohttp.ClientWebSocketResponse | None] = []
        self._seen: set[int] = set()
        self._last_seq = 0  # on this connection

    @property
    def ws(self) -> aiohttp.ClientWebSocketResponse:
        assert self._ws is not None, "not connected"
        return self._ws

    @property
    def is_open(self) -> bool:
        return self._ws is not None and not self._ws.closed

    async def open(self) -> Self:
        """Connect, once more where it was connected before."""
        self._ws = await self._http.ws_connect(self._url, **self._options)
        self._last_seq = 0
        return self

    async def reconnect(self, address: tuple[str, int]) -> None:
        """Connect to the same session at another address; the connection before stays as it is."""
        self._abandoned.append(self._ws)
        self._url = str(URL(self._url).with_host(address[0]).with_port(address[1]))
        await self.open()

    async def close(self) -> None:
        if self._ws is not None:
            await self._ws.close()

    async def cut(self) -> None:
        """Break the connection without a close frame."""
        self.ws.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        await self.ws.close()

    async def send(self, kind: str, data: object = None, **beside: object) -> None:
        await self.ws.send_str(json.dumps({"type": kind, "data": data, **beside}, ensure_ascii=False))

    async def send_together(self, *frames: Sent) -> None:
        """Send frames in one packet."""
        texts = [json.dumps({"type": kind, "data": data}, ensure_ascii=False) for kind, data in frames]
        packet = b"".join(masked(text.encode()) for text in texts)
        os.write(self.ws.get_extra_info("socket").fileno(), packet)

    async def ask(self, message: object = CANARY, **fields: object) -> None:
        hear(message)
        await self.send("request_ai_response", {"message": message, **fields})

    async def cancel(self) -> None:
        await self.send("cancel_ai_response")

    async def frame(self, patience: float = PATIENCE) -> Frame:
        """Return the next frame that was not seen; raise ConnectionError where the connection ends."""
        while True:
            message = await self.ws.receive(timeout=patience)
            if message.type is not WSMsgType.TEXT:
                raise ConnectionError(f"{message.type.name}, closed by {self.ws.close_code}")
            frame: Frame = json.loads(message.data)
            if self._is_new(frame):
                if frame["type"] != "pong":
                    self.frames.append(frame)
                return frame

    def _is_new(self, frame: Frame) -> bool:
        if (seq := frame.get("seq")) is None:
            return True
        assert seq > self._last_seq, "seq grows on each connection"
        self._last_seq = seq
        is_new = seq not in self._seen
        self._seen.add(seq)
        return is_new

    async def reply(self) -> list[Frame]:
        """Return the frames up to the end of one reply."""
        frames = [await self.frame()]
        while frames[-1]["type"] not in ENDS:
            frames.append(await self.frame())
        return frames

    async def begun(self) -> list[Frame]:
        """Return the begin of a reply and its first chunk."""
        frames = [await self.frame(), await self.frame()]
        assert kinds_of(frames) == ["begin", "chunk"]
        return frames

    async def silent(self) -> None:
        """Check that nothing has been sent: the next frame is the answer to a ping."""
        await self.send("ping")
        assert (await self.frame())["type"] == "pong"

    async def settle(self) -> None:
        """Read until the server has acted on all that was sent: to the answer to a ping."""
        await self.send("ping")
        while (await self.frame())["type"] != "pong":
            pass

    async def closed(self) -> int | None:
        """Read to the end, and return the close code."""
        while not self.ws.closed:
            await self.ws.receive(timeout=PATIENCE)
        return self.ws.close_code


def masked(payload: bytes, opcode: int = WSMsgType.TEXT, *, fin: bool = True, mask: bool = True) -> bytes:
    """Return a frame as a client sends it; a mask of zeros leaves the payload as it is."""
    size, extended = len(payload), b""
    if size >= 126:
        size, extended = (126, size.to_bytes(2, "big")) if size < 65536 else (127, size.to_bytes(8, "big"))
    return bytes([fin << 7 | opcode, mask << 7 | size]) + extended + bytes(4 * mask) + payload


def unmasked(buffer: bytes, start: int) -> tuple[int, bytes, int] | None:
    """Return opcode, payload and end of the frame at `start`, as a server sends it; None where it is not whole."""
    head = start + 2
    if len(buffer) < head:
        return None
    size = buffer[start + 1]
    if size >= 126:
        head += 2 if size == 126 else 8
        if len(buffer) < head:
            return None
        size = int.from_bytes(buffer[start + 2 : head], "big")
    if len(buffer) < head + size:
        return None
    return buffer[start] & 0xF, buffer[head : head + size], head + size


def handshake(path: str, **headers: str) -> bytes:
    """Return the header of a request for a WebSocket; `headers` replace or add some."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = {"Host": "127.0.0.1", "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    lines |= {"Sec-WebSocket-Key": key, **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"GET {quote(path, safe='/?=&%')} HTTP/1.1\r\n{head}\r\n".encode()


class RawPeer(asyncio.Protocol):
    """A TCP client that writes what it likes: half a header, a frame without a mask, or nothing at all.

    It reads HTTP answers until one is 101, and frames of a WebSocket from then on; a subclass may take these itself.
    """

    def __init__(self) -> None:
        self.buffer = b""  # what has come, and was not read yet
        self.upgraded = False
        self.gone = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._news = asyncio.Event()
        self._frames: deque[tuple[int, bytes]] = deque()

    @classmethod
    async def connect(cls, address: tuple[str, int], *, receive_bytes: int = 0) -> Self:
        """Connect; the kernel takes no more than `receive_bytes` for a peer that does not read, where it is set."""
        loop, connection = asyncio.get_running_loop(), socket.socket()
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.setblocking(False)
        await loop.sock_connect(connection, address)
        _, peer = await loop.create_connection(cls, sock=connection)
        return peer

    async def open(self, path: str, **headers: str) -> None:
        """Upgrade to a WebSocket; raise ConnectionError where the server refuses."""
        self.send(handshake(path, **headers))
        status, _, body = await self.answer()
        if status != 101:
            raise ConnectionError(f"{status} {body.decode()}")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports, which bench/ uses, have its methods and not its class.
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.gone.set()
        self._news.set()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def drain(self) -> None:
        """Wait until the server has taken what was sent, but for a little."""
        await self._writable.wait()
        if self.gone.is_set():
            raise ConnectionError("the server has ended the connection")

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.upgraded:
            self._read_frames()
        self._news.set()

    def _read_frames(self) -> None:
        end = 0
        while (found := unmasked(self.buffer, end)) is not None:
            opcode, payload, end = found
            self.take(opcode, payload)
        self.buffer = self.buffer[end:]

    def take(self, opcode: int, payload: bytes) -> None:
        """Keep a frame until frame() returns it."""
        self._frames.append((opcode, payload))

    def send(self, data: bytes) -> None:
        self.transport.write(data)

    def say(self, kind: str, data: object = None) -> None:
        """Send a frame as a frontend does."""
        self.send(masked(json.dumps({"type": kind, "data": data}, ensure_ascii=False).encode()))

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the next answer."""
        return await self._until(self._find_answer)

    def _find_answer(self) -> tuple[int, dict[str, str], bytes] | None:
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(headers.get("content-length", "0"))
        if len(rest) < size:
            return None
        self.buffer = rest[size:]
        status = int(first.split()[1])
        if status == 101:
            self.upgraded = True
            self._read_frames()
        return status, headers, rest[:size]

    async def frame(self) -> tuple[int, bytes]:
        """Return opcode and payload of the next frame, but for the server's own pings."""
        while (frame := await self._until(lambda: self._frames.popleft() if self._frames else None))[
            0
        ] == WSMsgType.PING:
            pass
        return frame

    async def close_code(self) -> int:
        """Read to the server's close frame, and return its code."""
        while (frame := await self.frame())[0] != WSMsgType.CLOSE:
            pass
        return int.from_bytes(frame[1][:2], "big")

    async def end(self) -> bytes:
        """Wait until the server ends the connection, and return what was not read."""
        async with asyncio.timeout(PATIENCE):
            await self.gone.wait()
        return self.buffer

    async def _until(self, find: Callable[[], Found | None]) -> Found:
        async with asyncio.timeout(PATIENCE):
            while (found := find()) is None:
                if self.gone.is_set():
                    raise ConnectionError("the server has ended the connection")
                self._news.clear()
                await self._news.wait()
        return found

    def abort(self) -> None:
        self.transport.abort()


def text_of(frames: list[Frame]) -> str:
    return "".join(frame["data"]["chunk"] for frame in frames if frame["type"] == "ai_stream_chunk")


def kinds_of(frames: list[Frame]) -> list[str]:
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
    async def connect(self, session_id: str = "가", **options: Any) -> AsyncIterator[Frontend]:
        client = self.frontend(session_id, **options)
        await client.open()
        try:
            yield client
        finally:
            await client.close()

    def frontend(self, session_id: str = "가", **options: Any) -> Frontend:
        """Return a client that is not connected yet."""
        return Frontend(self.http, f"{self.url}/ws/session/{session_id}", **options)

    @asynccontextmanager
    async def knock(self, data: bytes = b"") -> AsyncIterator[RawPeer]:
        """Connect a raw peer, which has sent this."""
        peer = await RawPeer.connect(self.address)
        peer.send(data)
        try:
            yield peer
        finally:
            peer.abort()

    @property
    def faults(self) -> FaultyStorage:
        """Return the storage as that into which a test puts faults."""
        assert isinstance(self.storage, FaultyStorage)
        return self.storage

    @property
    def sessions(self) -> Sessions:
        return self.runner.app[SESSIONS]

    # What a test waits for, and no frame tells

    async def until_idle(self, session_id: str = "가") -> None:
        """Wait until nothing of the session is answered, sent or stored."""
        await until(lambda: (session := self.sessions.find(session_id)) is None or session.idle)

    def clients(self, session_id: str = "가") -> set[Client]:
        """Return the server's ends of the session's sockets."""
        session = self.sessions.find(session_id)
        return session.clients if session is not None else set()

    async def until_left(self, session_id: str = "가") -> None:
        """Wait until the session has no sockets."""
        await until(lambda: not self.clients(session_id))

    async def until_forgotten(self) -> None:
        """Wait until no session is kept in memory."""
        await until(lambda: not len(self.sessions))

    @asynccontextmanager
    async def stopping(self) -> AsyncIterator[None]:
        """Stop the server as on SIGTERM; in the block no new connection is let in."""
        ending = asyncio.create_task(self.runner.cleanup())
        await until(lambda: self.sessions.draining)
        try:
            yield
        finally:
            await ending

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
    settings: Settings,
    counsellor: Counsellor,
    storage: Storage | None = None,
    port: int = 0,
    send_bytes: int = 0,
    **options: Any,
) -> AsyncIterator[Server]:
    """Run a server; the kernel takes no more than `send_bytes` for a client that does not read, where it is set."""
    storage = storage or make_storage(settings)
    runner = make_runner(create_app(settings, storage, counsellor, **options))
    listener = socket.create_server(("127.0.0.1", port))
    if send_bytes:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    try:
        await runner.setup()
        await web.SockSite(runner, listener).start()
        async with aiohttp.ClientSession() as http:
            yield Server(runner, storage, http)
    finally:
        await runner.cleanup()
        listener.close()


class Serving:
    """Starts servers for a test: ``async with serving(BARGE_IN=1) as server``.

    Settings are written in capitals; a database's URL stands in place of a SQLite file. Without a counsellor the
    settings choose one. A test puts faults into `server.faults`.
    """

    def __init__(self, folder: Path, counsellor: Counsellor | None = None, **values: object) -> None:
        self._url = f"sqlite:///{folder}/test.db"
        self._counsellor = counsellor
        self._values = {"MAX_AI_REQUESTS_PER_MINUTE": 6000, "AUTO_CREATE_SESSIONS": 1, **values}

    def __call__(
        self,
        url: str = "",
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        port: int = 0,
        send_bytes: int = 0,
        **values: object,
    ) -> AbstractAsyncContextManager[Server]:
        settings = make_settings(url or self._url, **{**self._values, **values})
        counsellor = self._counsellor or make_counsellor(settings)
        storage = FaultyStorage(make_storage(settings))
        options: dict[str, Any] = {"limits": limits, "clock": clock, "monotonic": monotonic}
        return serve(settings, counsellor, storage, port, send_bytes, **options)


class Wire:
    """A connection that a test can freeze, cut and heal: a TCP proxy to one address."""

    def __init__(self, open_target: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]) -> None:
        self._open_target = open_target
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._stranded: list[asyncio.Event] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.down = False
        self.refused = 0  # connections, while it was down
        self.withheld = 0  # pieces of data, while it was frozen
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
        self._stranded.append(self._flowing)
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            self.refused += 1
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
                self.withheld += not flowing.is_set()
                await flowing.wait()
                writer.write(data)
        except OSError:
            pass
        finally:
            await flowing.wait()
            writer.close()

    def freeze(self) -> None:
        """Let nothing through, in either direction, and close nothing: a phone that has left the network."""
        self._flowing.clear()

    def cut(self) -> int:
        """Reset all connections; return how many."""
        for writer in self._writers:
            writer.transport.abort()
        for flowing in (*self._stranded, self._flowing):
            flowing.set()
        return len(self._writers) // 2


def wire_to_postgres(url: str) -> Wire:
    """Return a wire to the Postgres whose local socket a URL names."""
    folder = url.partition("host=")[2]
    return Wire(lambda: asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432"))


async def is_listening(port: int) -> bool:
    """Tell whether a port takes connections; a listener that closes resets those that were not accepted yet."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return False
    writer.close()
    return True


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
    async def connect(self, session_id: str = "s") -> AsyncIterator[Frontend]:
        async with aiohttp.ClientSession() as http:
            client = Frontend(http, f"{self.url}/ws/session/{session_id}")
            await client.open()
            yield client
            await client.close()


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

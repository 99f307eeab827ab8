"""One client that means harm, in one of several ways, as fast as it can.

    python bench/attacker.py PORT NAME [DATABASE_URL]

NAME is one of ATTACKS. Prints "ready", attacks from a line on stdin to the next, and then prints one line of JSON: how
many frames or requests it has sent, on how many connections. Where the server closes a socket it comes back at once.
"""

import asyncio
import functools
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable

from load import handshake, masked
from standin import ENDLESS, SPEECHLESS, run

BAD_FRAMES_A_SECOND = 3_600
CONNECTIONS = 100  # that stop in the middle of a header, or never read
ENDLESS_AT_ONCE = 8
TOKENS = 10  # of a session, before its requests are refused
PAGES = 20  # asked for in one breath, and never read
LOCK_SECONDS = 4
PAUSE_SECONDS = 0.05  # after a refused connection
LOOK_SECONDS = 0.2  # between two looks at a connection that is only held
POLITENESS = 10  # of the processor it takes what the people leave: what they feel is the server's, not its client's
TEXT, CLOSE = 1, 8  # opcodes
ESTABLISHED = 1  # in the kernel's tcp_info


def frame(kind: str, **data: str) -> bytes:
    return masked(TEXT, json.dumps({"type": kind, "data": data}, ensure_ascii=False).encode())


CANCEL = frame("cancel_ai_response")
PING = frame("ping")
BAD = masked(TEXT, b"x")
LONG = frame("request_ai_response", message="요즘 잠이 잘 안 와요 " * 142 + "그래요네")  # 2,000 characters
SHORT = frame("request_ai_response", message="네")
PLEA = frame("request_ai_response", message="죽고 싶어요")


class Socket:
    """A WebSocket of the attacker's: it writes what it likes, and reads whether it was answered or closed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.closing = False  # by the server
        self.ended = asyncio.Event()
        self.reading = asyncio.create_task(self.read())

    async def read(self) -> None:
        try:
            while True:
                first, length = await self.reader.readexactly(2)
                if length >= 126:
                    length = int.from_bytes(await self.reader.readexactly(2 if length == 126 else 8))
                payload = await self.reader.readexactly(length)
                self.closing |= first & 15 == CLOSE
                if self.closing or b"ai_stream_complete" in payload or b"ai_stream_error" in payload:
                    self.ended.set()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.closing = True
            self.ended.set()

    async def write(self, block: bytes) -> None:
        self.writer.write(block)
        await self.writer.drain()
        await asyncio.sleep(0)

    async def answered(self) -> None:
        await self.ended.wait()
        if not self.closing:
            self.ended.clear()

    def abort(self) -> None:
        self.reading.cancel()
        self.writer.transport.abort()


class Attacker:
    def __init__(self, port: int, name: str, database_url: str) -> None:
        self.port = port
        self.session = f"attacker-{name.replace(' ', '-')}-{time.time_ns()}"
        self.database_url = database_url
        self.sent = self.connections = 0

    async def open(self, session: str) -> Socket:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(handshake(f"/ws/session/{session}", self.port))
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            head = b""
        if not head.startswith(b"HTTP/1.1 101"):
            writer.transport.abort()
            raise ConnectionError(head.decode())
        self.connections += 1
        return Socket(reader, writer)

    async def again_and_again(self, attack: Callable[[Socket], Awaitable[None]]) -> None:
        """Attack on one socket after the other, until an attack raises StopAsyncIteration."""
        while True:
            try:
                socket = await self.open(self.session)
            except ConnectionError:
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            try:
                await attack(socket)
            except ConnectionError:
                pass
            except StopAsyncIteration:
                return
            finally:
                socket.abort()

    async def flood(
        self, *frames: bytes, per_second: float = 0, answered: bool = False, stubborn: bool = False
    ) -> None:
        """Write these frames over and over: as fast as it can, at a rate, or as fast as they are answered.

        Where it is stubborn it goes on after the server's close frame, until the connection is gone.
        """
        block, began = b"".join(frames), time.perf_counter()

        async def attack(socket: Socket) -> None:
            while not socket.reading.done() and (stubborn or not socket.closing):
                await socket.write(block)
                self.sent += len(frames)
                if answered:
                    await socket.answered()
                if per_second:
                    await asyncio.sleep(self.sent / per_second - (time.perf_counter() - began))

        await self.again_and_again(attack)

    async def ask_past_the_rate(self) -> None:
        """Take all tokens by requests that are cancelled at once, and go on as fast as the refusals come."""

        async def spend(socket: Socket) -> None:
            for _ in range(TOKENS):
                await socket.write(SHORT + CANCEL)
                await socket.answered()
            raise StopAsyncIteration

        await self.again_and_again(spend)
        await self.flood(SHORT, answered=True)

    async def ask_for_the_endless(self, word: str) -> None:
        """Ask, on several sessions at once and as often as each may, for replies that the model never ends."""

        async def spend(session: str) -> None:
            socket = await self.open(session)
            try:
                for _ in range(TOKENS):
                    await socket.write(frame("request_ai_response", message=word))
                    self.sent += 1
                    await socket.answered()
            finally:
                socket.abort()

        async def go_on(number: int) -> None:
            for times in itertools.count():
                try:
                    await spend(f"{self.session}-{number}-{times}")
                except ConnectionError:
                    await asyncio.sleep(PAUSE_SECONDS)

        await asyncio.gather(*map(go_on, range(ENDLESS_AT_ONCE)))

    # HTTP

    async def hold(self, request: bytes) -> None:
        """Write a request on many connections, and read none of what comes; open one anew where it is closed."""

        async def go_on() -> None:
            while True:
                try:
                    self.connections += 1
                    await self.write_and_hold(request)
                except ConnectionError:
                    await asyncio.sleep(PAUSE_SECONDS)

        await asyncio.gather(*(go_on() for _ in range(CONNECTIONS)))

    async def write_and_hold(self, request: bytes) -> None:
        """Hold a connection until the server ends it."""
        loop = asyncio.get_running_loop()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            await loop.sock_connect(connection, ("127.0.0.1", self.port))
            await loop.sock_sendall(connection, request)
            self.sent += 1
            while not ended(connection):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(LOOK_SECONDS)

    async def stop_in_the_header(self) -> None:
        await self.hold(handshake(f"/ws/session/{self.session}", self.port)[:-40])

    async def never_read(self) -> None:
        """Fill a session with the longest of replies, and ask for all it said."""

        async def fill(socket: Socket) -> None:
            for _ in range(TOKENS):
                await socket.write(frame("request_ai_response", message=ENDLESS))
                await socket.answered()
            raise StopAsyncIteration

        await self.again_and_again(fill)
        path = f"/api/sessions/{self.session}/conversations?limit=200"
        await self.hold(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n\r\n".encode() * PAGES)

    # Postgres

    async def lock(self) -> None:
        """Lock the table of turns for everybody else, once."""
        import asyncpg

        connection = await asyncpg.connect(self.database_url)
        self.connections += 1
        try:
            async with connection.transaction():
                await connection.execute("LOCK TABLE conversations IN ACCESS EXCLUSIVE MODE")
                await asyncio.sleep(LOCK_SECONDS)
        finally:
            await connection.close()

    async def lock_and_cancel(self) -> None:
        await asyncio.gather(self.lock(), self.flood(SHORT, CANCEL))


def ended(connection: socket.socket) -> bool:
    """Tell whether the server has closed or reset a connection, without reading from it."""
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != ESTABLISHED


ATTACKS: dict[str, Callable[[Attacker], Awaitable[None]]] = {
    "2,000 characters and a cancel": lambda attacker: attacker.flood(LONG, CANCEL),
    "the same, after the close frame too": lambda attacker: attacker.flood(LONG, CANCEL, stubborn=True),
    "pings": lambda attacker: attacker.flood(PING),
    "3,600 bad frames a second": lambda attacker: attacker.flood(BAD, per_second=BAD_FRAMES_A_SECOND),
    "requests past the rate": lambda attacker: attacker.ask_past_the_rate(),
    "pleas for help": lambda attacker: attacker.flood(PLEA),
    "a model that never ends": lambda attacker: attacker.ask_for_the_endless(ENDLESS),
    "a model that says nothing, for ever": lambda attacker: attacker.ask_for_the_endless(SPEECHLESS),
    "100 unfinished headers": lambda attacker: attacker.stop_in_the_header(),
    "100 readers that never read": lambda attacker: attacker.never_read(),
    "requests and cancels": lambda attacker: attacker.flood(SHORT, CANCEL),
}
ON_POSTGRES: dict[str, Callable[[Attacker], Awaitable[None]]] = {
    "conversations locked for 4 s": lambda attacker: attacker.lock(),
    "locked, and requests and cancels": lambda attacker: attacker.lock_and_cancel(),
}


async def main(port: int, name: str, database_url: str) -> None:
    os.nice(POLITENESS)
    loop, attacker = asyncio.get_running_loop(), Attacker(port, name, database_url)
    read_line = functools.partial(loop.run_in_executor, None, sys.stdin.readline)
    print("ready", flush=True)
    await read_line()
    attack = asyncio.ensure_future({**ATTACKS, **ON_POSTGRES}[name](attacker))
    await read_line()
    attack.cancel()
    failed = await asyncio.gather(attack, return_exceptions=True)
    if isinstance(failed[0], Exception):
        raise failed[0]
    print(json.dumps({"sent": attacker.sent, "connections": attacker.connections}), flush=True)


if __name__ == "__main__":
    run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else ""))

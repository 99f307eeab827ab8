"""One client that means harm, in one of several ways, as fast as it can.

    python bench/attacker.py PORT NAME

NAME is one of ATTACKS. Prints "ready", attacks from a line on stdin to the next, and then prints one line of JSON: how
many frames it has sent, on how many connections. It comes back at once where the server closes its socket.
"""

import asyncio
import contextlib
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable

import processes  # noqa: F401 - makes the tests' modules importable
from aiohttp import WSMsgType
from model import ENDLESS, SPEECHLESS, run
from support import RawPeer, masked

BAD_FRAMES_A_SECOND = 3_600
SESSIONS_AT_ONCE = 8
TOKENS = 10  # of a session, before its requests are refused
PAUSE_SECONDS = 0.05  # after a refused connection
POLITENESS = 10  # nice(10): the attacker takes the CPU that the others leave


def frame(kind: str, **data: str) -> bytes:
    return masked(json.dumps({"type": kind, "data": data}, ensure_ascii=False).encode())


CANCEL = frame("cancel_ai_response")
LONG = frame("request_ai_response", message="요즘 잠이 잘 안 와요 " * 142 + "그래요네")  # 2,000 characters
SHORT = frame("request_ai_response", message="네")
RISK = frame("request_ai_response", message="죽고 싶어요")


class Peer(RawPeer):
    """Reads no more of a reply than that it has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = asyncio.Event()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.ended.set()

    def take(self, opcode: int, payload: bytes) -> None:
        if opcode == WSMsgType.CLOSE:
            self.abort()
        if opcode == WSMsgType.CLOSE or b"ai_stream_complete" in payload or b"ai_stream_error" in payload:
            self.ended.set()

    async def answered(self) -> None:
        await self.ended.wait()
        self.ended.clear()


class Attacker:
    def __init__(self, port: int, name: str) -> None:
        self.address = ("127.0.0.1", port)
        self.session = f"attacker-{name.replace(' ', '-')}-{time.time_ns()}"
        self.sent = self.connections = 0

    async def again_and_again(self, session: str, attack: Callable[[Peer], Awaitable[None]]) -> None:
        """Attack on one connection after the other."""
        while True:
            peer = await Peer.connect(self.address)
            with contextlib.suppress(ConnectionError):
                await peer.open(f"/ws/session/{session}")
                self.connections += 1
                await attack(peer)
            peer.abort()
            await asyncio.sleep(PAUSE_SECONDS)

    async def write(self, peer: Peer, *frames: bytes) -> None:
        peer.send(b"".join(frames))
        self.sent += len(frames)
        await peer.drain()
        await asyncio.sleep(0)

    async def flood(self, *frames: bytes, per_second: float = 0, answered: bool = False) -> None:
        """Write these frames over and over: as fast as it can, at a rate, or as fast as they are answered."""
        began = time.perf_counter()

        async def attack(peer: Peer) -> None:
            while True:
                await self.write(peer, *frames)
                if answered:
                    await peer.answered()
                if per_second:
                    await asyncio.sleep(self.sent / per_second - (time.perf_counter() - began))

        await self.again_and_again(self.session, attack)

    async def ask(self, word: str) -> None:
        """Ask on several sessions at once, each as often as it may, for replies that the model never ends."""

        async def attack(number: int) -> None:
            for times in itertools.count():

                async def spend(peer: Peer) -> None:
                    for _ in range(TOKENS):
                        await self.write(peer, frame("request_ai_response", message=word))
                        await peer.answered()
                    raise StopAsyncIteration

                with contextlib.suppress(StopAsyncIteration):
                    await self.again_and_again(f"{self.session}-{number}-{times}", spend)

        await asyncio.gather(*map(attack, range(SESSIONS_AT_ONCE)))


ATTACKS: dict[str, Callable[[Attacker], Awaitable[None]]] = {
    "2,000 characters and a cancel": lambda attacker: attacker.flood(LONG, CANCEL),
    "pings": lambda attacker: attacker.flood(frame("ping")),
    "3,600 bad frames a second": lambda attacker: attacker.flood(masked(b"x"), per_second=BAD_FRAMES_A_SECOND),
    "requests beyond the rate": lambda attacker: attacker.flood(SHORT, answered=True),
    "risk signals": lambda attacker: attacker.flood(RISK),
    "a model that never ends": lambda attacker: attacker.ask(ENDLESS),
    "a model that says nothing": lambda attacker: attacker.ask(SPEECHLESS),
}


async def main(port: int, name: str) -> None:
    os.nice(POLITENESS)
    loop, attacker = asyncio.get_running_loop(), Attacker(port, name)
    read_line = functools.partial(loop.run_in_executor, None, sys.stdin.readline)
    print("ready", flush=True)
    await read_line()
    attack = asyncio.ensure_future(ATTACKS[name](attacker))
    await read_line()
    attack.cancel()
    (failed,) = await asyncio.gather(attack, return_exceptions=True)
    if isinstance(failed, Exception):
        raise failed
    print(json.dumps({"sent": attacker.sent, "connections": attacker.connections}), flush=True)


if __name__ == "__main__":
    run(main(int(sys.argv[1]), sys.argv[2]))

"""People who talk: WebSocket clients in a process of their own, which cost little.

    python bench/load.py PORT[,PORT...] LOAD

LOAD is JSON, such as {"sessions": 50, "replies": 1, "chunks": 20, "first_ms": 300, "gap_ms": 50, "spread_s": 2}.
Each person opens a socket, then asks and waits for the whole reply, as often as the load says. With "together" all ask
in one moment, and again when the last has its reply; with "warm" one person was answered before. The frames are kept as
they come, and checked at the end, character for character. Prints one line of JSON: for every reply the milliseconds to
its first chunk and to its end, less the model's own, the largest gap between two chunks, and the number of its chunks.
"""

import asyncio
import gc
import itertools
import json
import sys
import time
from dataclasses import dataclass
from typing import Any, TypeVar

import processes  # noqa: F401 - makes the tests' modules importable
from aiohttp import WSMsgType
from model import reply_text, run
from support import RawPeer, masked

ASK = {"type": "request_ai_response", "data": {"message": "요즘 잠이 잘 안 와요", "emotion": "anxious"}}
ASK_FRAME = masked(json.dumps(ASK).encode())
Load = dict[str, Any]


@dataclass
class Heard:
    """A reply as it came: `times` are those of its frames, by the clock of `asked`."""

    asked: float
    times: list[float]
    frames: list[bytes]


class Person(RawPeer):
    def __init__(self) -> None:
        super().__init__()
        self.ended: asyncio.Future[None] | None = None
        self.heard = Heard(0, [], [])

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self.ended is not None and not self.ended.done():
            self.ended.set_exception(ConnectionError("the server hung up"))

    def take(self, opcode: int, payload: bytes) -> None:
        if opcode == WSMsgType.TEXT:
            self.hear(payload, time.perf_counter())  # uvloop's own clock counts whole milliseconds
        elif opcode == WSMsgType.PING:
            self.send(masked(payload, WSMsgType.PONG))

    def hear(self, payload: bytes, now: float) -> None:
        self.heard.frames.append(payload)
        self.heard.times.append(now)
        if b"ai_stream_complete" in payload or b"ai_stream_error" in payload:
            assert self.ended is not None
            self.ended.set_result(None)

    def ask(self) -> None:
        """Ask once; `ended` is done when the reply is."""
        self.ended = asyncio.get_running_loop().create_future()
        self.heard = Heard(time.perf_counter(), [], [])
        self.send(ASK_FRAME)

    async def reply(self) -> Heard:
        assert self.ended is not None
        await self.ended
        return self.heard


Kind = TypeVar("Kind", bound=Person)


async def connect(session: str, port: int, kind: type[Kind]) -> Kind:
    person = await kind.connect(("127.0.0.1", port))
    await person.open(f"/ws/session/{session}")
    return person


def checked(heard: Heard, load: Load) -> dict[str, float]:
    """Check a reply character for character, and return what it took beyond the model's own time."""
    frames = [json.loads(frame) for frame in heard.frames]
    assert frames[0]["type"] == "ai_stream_begin", frames[0]
    assert frames[-1]["type"] == "ai_stream_complete", frames[-1]
    chunks = [frame["data"]["chunk"] for frame in frames[1:-1]]
    assert "".join(chunks) == reply_text(load["chunks"])
    own_ms = load["first_ms"] + load["gap_ms"] * (load["chunks"] - 1)
    return {
        "first": (heard.times[1] - heard.asked) * 1000 - load["first_ms"],
        "total": (heard.times[-1] - heard.asked) * 1000 - own_ms,
        "gap": max(((b - a) * 1000 for a, b in itertools.pairwise(heard.times[1:-1])), default=0.0),
        "frames": len(chunks),
    }


async def talk(person: Person, replies: int, wait: float) -> list[Heard]:
    """Ask again as soon as the last reply is whole."""
    await asyncio.sleep(wait)
    heard = []
    for _ in range(replies):
        person.ask()
        heard.append(await person.reply())
    return heard


async def talk_one_by_one(people: list[Person], load: Load) -> list[Heard]:
    """Let each talk by itself, the first at once and the last after "spread_s"."""
    step = load.get("spread_s", 0) / len(people)
    talks = await asyncio.gather(*(talk(person, load["replies"], step * at) for at, person in enumerate(people)))
    return [heard for each in talks for heard in each]


async def talk_together(people: list[Person], load: Load) -> list[Heard]:
    """Let all ask in one moment, again and again."""
    heard = []
    for _ in range(load["replies"]):
        for person in people:
            person.ask()
        heard += [await person.reply() for person in people]
    return heard


def moment_ms(heard: list[Heard], sessions: int) -> float:
    """Return how far apart those who asked together did, at most, in milliseconds."""
    moments = [[each.asked for each in heard[at : at + sessions]] for at in range(0, len(heard), sessions)]
    return max((max(times) - min(times)) * 1000 for times in moments)


async def main(ports: list[int], load: Load) -> None:
    """Open all sockets, over all ports in turn; then say so, wait for a line on stdin, and talk."""
    gc.disable()  # its pauses would be taken for the server's
    loop = asyncio.get_running_loop()
    for port in ports if load.get("warm") and load["replies"] else []:
        first = await connect("bench-warm", port, Person)
        checked((await talk(first, 1, 0))[0], load)
        first.abort()
    people = [await connect(f"bench-{at}", ports[at % len(ports)], Person) for at in range(load["sessions"])]
    print("open", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    if load["replies"]:
        began = time.perf_counter()
        heard = await (talk_together if load.get("together") else talk_one_by_one)(people, load)
        result: dict[str, object] = {"seconds": time.perf_counter() - began}
        if load.get("together"):
            result["moment_ms"] = moment_ms(heard, len(people))
        result["replies"] = [checked(each, load) for each in heard]
        print(json.dumps(result), flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)
    for person in people:
        person.abort()


if __name__ == "__main__":
    run(main([int(port) for port in sys.argv[1].split(",")], json.loads(sys.argv[2])))

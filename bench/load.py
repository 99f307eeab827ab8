"""People who talk: WebSocket clients in a process of their own, as cheap as they can be.

    python bench/load.py PORT[,PORT...] LOAD

LOAD is JSON, such as {"sessions": 50, "replies": 1, "chunks": 20, "first_ms": 300, "gap_ms": 50, "spread_s": 2}.
Each opens a socket, then asks and waits for the whole reply, as often as it is told; with "together" all ask in one
moment, and once more in one moment when the last has its reply; with "warm" somebody else was answered before. The
frames are kept as they come, and checked at the end, character for character. Prints one line of JSON: for every reply
the milliseconds to its first chunk and to its end, less the model's own, the largest gap between two chunks, and how
many frames held its chunks.
"""

import asyncio
import base64
import gc
import itertools
import json
import os
import sys
import time

from standin import reply_text, run

ASK = json.dumps({"type": "request_ai_response", "data": {"message": "요즘 잠이 잘 안 와요", "emotion": "anxious"}})


def masked(opcode: int, payload: bytes) -> bytes:
    """Return a frame as a client must send it; a mask of zeros leaves the payload as it is."""
    length = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2)
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


ASK_FRAME = masked(1, ASK.encode())


def handshake(path: str, port: int) -> bytes:
    key = base64.b64encode(os.urandom(16)).decode()
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


class Person(asyncio.Protocol):
    def __init__(self, path: str, port: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.path, self.port = path, port
        self.buffer = b""
        self.opened = self.loop.create_future()
        self.ended: asyncio.Future[None] | None = None
        self.asked = 0.0
        self.frames: list[bytes] = []
        self.times: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.transport.write(handshake(self.path, self.port))

    def connection_lost(self, error: Exception | None) -> None:
        for waiting in (self.opened, self.ended):
            if waiting is not None and not waiting.done():
                waiting.set_exception(ConnectionError(f"the server hung up ({error})"))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.opened.done():
            head, found, self.buffer = self.buffer.partition(b"\r\n\r\n")
            if not found:
                self.buffer = head
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self.opened.set_exception(ConnectionError(head.decode()))
                return
            self.opened.set_result(None)
        now = time.perf_counter()  # uvloop's clock counts whole milliseconds
        while len(self.buffer) >= 2:
            length, start = self.buffer[1], 2
            if length == 126:
                length, start = int.from_bytes(self.buffer[2:4]), 4
            if len(self.buffer) < start + length or (start == 4 and len(self.buffer) < 4):
                return
            opcode, payload = self.buffer[0] & 15, self.buffer[start : start + length]
            self.buffer = self.buffer[start + length :]
            if opcode == 1:
                self.take(payload, now)
            elif opcode == 9:
                self.transport.write(masked(10, payload))

    def take(self, payload: bytes, now: float) -> None:
        self.frames.append(payload)
        self.times.append(now)
        if b"ai_stream_complete" in payload or b"ai_stream_error" in payload:
            assert self.ended is not None
            self.ended.set_result(None)

    def ask(self) -> None:
        """Ask once; `ended` is done when the reply is."""
        self.frames, self.times, self.ended = [], [], self.loop.create_future()
        self.asked = time.perf_counter()
        self.transport.write(ASK_FRAME)

    async def reply(self) -> dict[str, object]:
        """Wait for the reply's end; return its times and its frames, which are still to be checked."""
        assert self.ended is not None
        await self.ended
        return {"asked": self.asked, "times": self.times, "frames": self.frames}


def checked(reply: dict[str, object], load: dict[str, float]) -> dict[str, float]:
    """Check a reply character for character, and return what it took beyond the model's own time."""
    frames = [json.loads(frame) for frame in reply["frames"]]  # type: ignore[attr-defined]
    kinds = [frame["type"] for frame in frames]
    assert kinds[0] == "ai_stream_begin", frames[0]
    assert kinds[-1] == "ai_stream_complete", frames[-1]
    chunks = [frame["data"]["chunk"] for frame in frames[1:-1]]
    assert "".join(chunks) == reply_text(int(load["chunks"]))
    times, asked = reply["times"], reply["asked"]
    own_ms = load["first_ms"] + load["gap_ms"] * (load["chunks"] - 1)
    return {
        "first": (times[1] - asked) * 1000 - load["first_ms"],  # type: ignore[index, operator]
        "total": (times[-1] - asked) * 1000 - own_ms,  # type: ignore[index, operator]
        "gap": max((b - a) * 1000 for a, b in itertools.pairwise(times[1:-1])) if len(chunks) > 1 else 0.0,  # type: ignore[index]
        "frames": len(chunks),
    }


async def talk(person: Person, load: dict[str, float], wait: float) -> list[dict[str, object]]:
    """Ask again as soon as the last reply is whole."""
    await asyncio.sleep(wait)
    replies = []
    for _ in range(int(load["replies"])):
        person.ask()
        replies.append(await person.reply())
    return replies


async def talk_one_by_one(people: list[Person], load: dict[str, float]) -> list[dict[str, object]]:
    """Let each talk by itself, the first at once and the last after "spread_s"."""
    step = load.get("spread_s", 0) / len(people)
    async with asyncio.TaskGroup() as tasks:
        talks = [tasks.create_task(talk(person, load, step * at)) for at, person in enumerate(people)]
    return [reply for talk in talks for reply in talk.result()]


async def talk_together(people: list[Person], load: dict[str, float]) -> list[dict[str, object]]:
    """Let all ask in one moment, again and again."""
    replies = []
    for _ in range(int(load["replies"])):
        for person in people:
            person.ask()
        replies += [await person.reply() for person in people]
    return replies


def moment_ms(replies: list[dict[str, object]], sessions: int) -> float:
    """Return how far apart those who asked together did, at most, in milliseconds."""
    asked = [[reply["asked"] for reply in replies[at : at + sessions]] for at in range(0, len(replies), sessions)]
    return max((max(times) - min(times)) * 1000 for times in asked)  # type: ignore[operator, type-var]


async def connect(session: str, port: int, kind: type[Person] = Person) -> Person:
    _, person = await asyncio.get_running_loop().create_connection(
        lambda: kind(f"/ws/session/{session}", port), "127.0.0.1", port
    )
    await person.opened
    return person


async def main(ports: list[int], load: dict[str, float]) -> None:
    """Open all sockets, over all ports in turn; then say so, wait for a line on stdin, and talk."""
    gc.disable()  # its pauses would be taken for the server's
    loop, people = asyncio.get_running_loop(), []
    for port in ports if load.get("warm") and load["replies"] else []:
        somebody = await connect(f"bench-{load.get('name', '')}-warm", port)
        checked((await talk(somebody, {**load, "replies": 1}, 0))[0], load)
        somebody.transport.abort()
    for number in range(int(load["sessions"])):
        person = await connect(f"bench-{load.get('name', '')}-{number}", ports[number % len(ports)])
        people.append(person)
    print("open", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    if load["replies"]:
        began = time.perf_counter()
        replies = await (talk_together if load.get("together") else talk_one_by_one)(people, load)
        result: dict[str, object] = {"seconds": time.perf_counter() - began}
        if load.get("together"):
            result["moment_ms"] = moment_ms(replies, len(people))
        result["replies"] = [checked(reply, load) for reply in replies]
        print(json.dumps(result), flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)
    for person in people:
        person.transport.abort()


if __name__ == "__main__":
    run(main([int(port) for port in sys.argv[1].split(",")], json.loads(sys.argv[2])))

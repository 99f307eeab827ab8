"""People who talk now and then, and measure what an attack does to them.

    python bench/others.py PORT NAME SECONDS MODEL

MODEL is the stand-in's reply as chunks-first_ms-gap_ms. Each asks, hears the reply, thinks, and asks again, and pings
all the while. Prints one line of JSON: the milliseconds to each first word, less the model's own, and to each pong, and
how many requests were asked, unanswered, answered by an error, or by another text than the model's.
"""

import asyncio
import collections
import json
import random
import sys
import time

from load import Heard, Person, connect
from model import reply_text, run
from support import masked

PEOPLE = 50
PATIENCE_SECONDS = 20  # after which a request counts as unanswered
THINKING_SECONDS = 2  # on average, between a reply and the next request: a bucket's ten tokens last half a minute
PING_SECONDS = 0.5  # a frontend's are thirty times as rare; so there are enough to measure
PING = masked(b'{"type": "ping"}')


class Talker(Person):
    def __init__(self) -> None:
        super().__init__()
        self.pings: collections.deque[float] = collections.deque()
        self.pongs: list[float] = []  # milliseconds

    def hear(self, payload: bytes, now: float) -> None:
        if b'"pong"' in payload:
            self.pongs.append((now - self.pings.popleft()) * 1000)
        elif self.ended is not None and not self.ended.done():
            super().hear(payload, now)

    async def ping(self) -> None:
        while not self.transport.is_closing():
            self.pings.append(time.perf_counter())
            self.send(PING)
            await asyncio.sleep(random.uniform(0.5, 1.5) * PING_SECONDS)


class Others:
    def __init__(self, model: str) -> None:
        chunks, first_ms, _ = map(int, model.split("-"))
        self.text, self.first_ms = reply_text(chunks), first_ms
        self.first: list[float] = []  # milliseconds
        self.counts: collections.Counter[str] = collections.Counter()

    async def talk(self, person: Talker, until: float) -> None:
        """Ask now and then, until that moment; give up after a lost connection or a request without an answer."""
        await asyncio.sleep(random.uniform(0, min(THINKING_SECONDS, (until - time.perf_counter()) / 2)))
        pinging = asyncio.create_task(person.ping())
        while time.perf_counter() < until:
            self.counts["asked"] += 1
            person.ask()
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    self.judge(await person.reply())
            except (TimeoutError, ConnectionError):
                self.counts["unanswered"] += 1
                break
            thinking = random.uniform(0.5, 1.5) * THINKING_SECONDS
            await asyncio.sleep(max(0, min(thinking, until - time.perf_counter())))
        pinging.cancel()

    def judge(self, heard: Heard) -> None:
        frames = [json.loads(frame) for frame in heard.frames]
        chunks = [frame["data"]["chunk"] for frame in frames if frame["type"] == "ai_stream_chunk"]
        if frames[-1]["type"] == "ai_stream_error":
            self.counts["errors"] += 1
        elif "".join(chunks) != self.text:
            self.counts["wrong"] += 1
        else:
            self.first.append((heard.times[1] - heard.asked) * 1000 - self.first_ms)


async def main(port: int, name: str, seconds: float, model: str) -> None:
    loop, others = asyncio.get_running_loop(), Others(model)
    people = [await connect(f"others-{name}-{number}", port, Talker) for number in range(PEOPLE)]
    print("open", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    until = time.perf_counter() + seconds
    await asyncio.gather(*(others.talk(person, until) for person in people))
    pongs = [pong for person in people for pong in person.pongs]
    print(json.dumps({"first": others.first, "pong": pongs, **others.counts}), flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    for person in people:
        person.abort()


if __name__ == "__main__":
    run(main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]))

"""No server at all: aiohttp's client reads the stand-in's replies, which is what any server has to pay at least.

    python bench/floor.py GEMINI_PORT LOAD

LOAD is that of load.py, and so is what it prints.
"""

import asyncio
import itertools
import json
import sys

import aiohttp
from standin import reply_text

Replies = list[dict[str, float]]


class Reader:
    def __init__(self, http: aiohttp.ClientSession, port: int, load: dict[str, float]) -> None:
        self.http = http
        self.load = load
        path = f"{int(load['chunks'])}-{int(load['first_ms'])}-{int(load['gap_ms'])}"
        self.url = f"http://127.0.0.1:{port}/{path}/models/bench:streamGenerateContent?alt=sse"

    async def read(self) -> dict[str, float]:
        load, loop, times, texts = self.load, asyncio.get_running_loop(), [], []
        asked = loop.time()
        async with self.http.post(self.url, json={"contents": []}) as response:
            async for line in response.content:
                if line.startswith(b"data:"):
                    event = json.loads(line[5:])
                    texts.append(event["candidates"][0]["content"]["parts"][0]["text"])
                    times.append(loop.time())
        assert "".join(texts) == reply_text(int(load["chunks"]))
        own_ms = load["first_ms"] + load["gap_ms"] * (load["chunks"] - 1)
        return {
            "first": (times[0] - asked) * 1000 - load["first_ms"],
            "total": (loop.time() - asked) * 1000 - own_ms,
            "gap": max((b - a) * 1000 for a, b in itertools.pairwise(times)) if len(times) > 1 else 0.0,
            "frames": len(texts),
        }

    async def read_again_and_again(self, wait: float) -> Replies:
        await asyncio.sleep(wait)
        return [await self.read() for _ in range(int(self.load["replies"]))]

    async def one_by_one(self) -> Replies:
        step, sessions = self.load.get("spread_s", 0) / self.load["sessions"], int(self.load["sessions"])
        each = await asyncio.gather(*(self.read_again_and_again(step * number) for number in range(sessions)))
        return [reply for replies in each for reply in replies]

    async def together(self) -> Replies:
        replies: Replies = []
        for _ in range(int(self.load["replies"])):
            replies += await asyncio.gather(*(self.read() for _ in range(int(self.load["sessions"]))))
        return replies


async def main(port: int, load: dict[str, float]) -> None:
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        reader = Reader(http, port, load)
        print("open", flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)
        began = loop.time()
        replies = await (reader.together if load.get("together") else reader.one_by_one)()
        print(json.dumps({"seconds": loop.time() - began, "replies": replies}), flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), json.loads(sys.argv[2])))

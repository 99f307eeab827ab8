"""No server at all: aiohttp's client reads the model, which is what any server in Python has to pay at least.

    python bench/floor.py GEMINI_PORT LOAD

LOAD is that of load.py, and so is what it prints.
"""

import asyncio
import itertools
import json
import sys
from typing import Any

import aiohttp
from model import reply_text

Replies = list[dict[str, float]]
Load = dict[str, Any]


async def read(http: aiohttp.ClientSession, url: str, load: Load) -> dict[str, float]:
    loop, times, texts = asyncio.get_running_loop(), [], []
    asked = loop.time()
    async with http.post(url, json={"contents": []}) as response:
        async for line in response.content:
            if line.startswith(b"data:"):
                event = json.loads(line[5:])
                texts.append(event["candidates"][0]["content"]["parts"][0]["text"])
                times.append(loop.time())
    assert "".join(texts) == reply_text(load["chunks"])
    own_ms = load["first_ms"] + load["gap_ms"] * (load["chunks"] - 1)
    return {
        "first": (times[0] - asked) * 1000 - load["first_ms"],
        "total": (loop.time() - asked) * 1000 - own_ms,
        "gap": max(((b - a) * 1000 for a, b in itertools.pairwise(times)), default=0.0),
        "frames": len(texts),
    }


async def read_all(http: aiohttp.ClientSession, url: str, load: Load) -> Replies:
    step, sessions = load.get("spread_s", 0) / load["sessions"], load["sessions"]

    async def one_by_one(wait: float) -> Replies:
        await asyncio.sleep(wait)
        return [await read(http, url, load) for _ in range(load["replies"])]

    if not load.get("together"):
        each = await asyncio.gather(*(one_by_one(step * number) for number in range(sessions)))
        return [reply for replies in each for reply in replies]
    replies: Replies = []
    for _ in range(load["replies"]):
        replies += await asyncio.gather(*(read(http, url, load) for _ in range(sessions)))
    return replies


async def main(port: int, load: Load) -> None:
    loop = asyncio.get_running_loop()
    path = f"{load['chunks']}-{load['first_ms']}-{load['gap_ms']}"
    url = f"http://127.0.0.1:{port}/{path}/models/bench:streamGenerateContent?alt=sse"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        print("open", flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)
        began = loop.time()
        replies = await read_all(http, url, load)
        print(json.dumps({"seconds": loop.time() - began, "replies": replies}), flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), json.loads(sys.argv[2])))

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


async def talk(http: aiohttp.ClientSession, url: str, load: dict[str, float], wait: float) -> list[dict[str, float]]:
    loop, replies = asyncio.get_running_loop(), []
    await asyncio.sleep(wait)
    for _ in range(int(load["replies"])):
        asked, times, texts = loop.time(), [], []
        async with http.post(url, json={"contents": []}) as response:
            async for line in response.content:
                if line.startswith(b"data:"):
                    event = json.loads(line[5:])
                    texts.append(event["candidates"][0]["content"]["parts"][0]["text"])
                    times.append(loop.time())
        assert "".join(texts) == reply_text(int(load["chunks"]))
        own_ms = load["first_ms"] + load["gap_ms"] * (load["chunks"] - 1)
        first, total = (times[0] - asked) * 1000 - load["first_ms"], (loop.time() - asked) * 1000 - own_ms
        gap = max((b - a) * 1000 for a, b in itertools.pairwise(times)) if len(times) > 1 else 0.0
        replies.append({"first": first, "total": total, "gap": gap, "frames": len(texts)})
    return replies


async def main(port: int, load: dict[str, float]) -> None:
    loop = asyncio.get_running_loop()
    path = f"{int(load['chunks'])}-{int(load['first_ms'])}-{int(load['gap_ms'])}"
    url = f"http://127.0.0.1:{port}/{path}/models/bench:streamGenerateContent?alt=sse"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        print("open", flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)
        step, began = load.get("spread_s", 0) / load["sessions"], loop.time()
        async with asyncio.TaskGroup() as tasks:
            talks = [tasks.create_task(talk(http, url, load, step * number)) for number in range(int(load["sessions"]))]
        replies = [reply for task in talks for reply in task.result()]
        print(json.dumps({"seconds": loop.time() - began, "replies": replies}), flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), json.loads(sys.argv[2])))

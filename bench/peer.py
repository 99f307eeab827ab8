"""The peer: what a good developer would write today with FastAPI, uvicorn on uvloop and Google's own client.

    PORT=8001 GEMINI_BASE_URL=http://127.0.0.1:9000/... python bench/peer.py

It speaks the same protocol and does the same work on the same tables: a token, the last ten turns, a streamed reply,
one insert, then the completion. It has no resume, no pacing, no limits, no care: what those cost is this server's to
bear.
"""

import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiosqlite
import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from google import genai
from google.genai import types

sys.path.insert(0, str(Path(__file__).parent.parent))
from bemore.storage import ADD_TURN, CREATE_SESSION, HISTORY, SQLITE_SPELLINGS, TAKE_TOKEN
from bemore_voice import parse_utterance, system_prompt

database: aiosqlite.Connection


def named(*values: object) -> dict[str, object]:
    return {str(number): value for number, value in enumerate(values, start=1)}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    global database
    schema = (Path(__file__).parent.parent / "schema.sql").read_text(encoding="utf-8")
    for postgres, sqlite in SQLITE_SPELLINGS.items():
        schema = schema.replace(postgres, sqlite)
    database = await aiosqlite.connect("peer.db", isolation_level=None)
    await database.executescript("PRAGMA journal_mode = WAL; PRAGMA foreign_keys = ON;\n" + schema)
    options = types.HttpOptions(base_url=os.environ["GEMINI_BASE_URL"], api_version="v1beta")
    app.state.model = genai.Client(api_key="bench", http_options=options).aio.models
    yield
    await database.close()


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.websocket("/ws/session/{session_id}")
async def talk(socket: WebSocket, session_id: str) -> None:
    await socket.accept()
    await database.execute_fetchall(CREATE_SESSION, named(session_id))
    try:
        while True:
            frame = json.loads(await socket.receive_text())
            if frame["type"] == "request_ai_response":
                await answer(socket, session_id, frame["data"])
    except WebSocketDisconnect:
        pass


async def answer(socket: WebSocket, session_id: str, data: Any) -> None:
    async def send(kind: str, **fields: object) -> None:
        text = json.dumps({"type": kind, "data": fields, "seq": time.time_ns() // 1000}, ensure_ascii=False)
        await socket.send_text(text)

    utterance = parse_utterance(data, int(time.time() * 1000))
    refill = 60_000_000 // 6000
    now_us = int(time.time() * 1_000_000)
    assert await database.execute_fetchall(TAKE_TOKEN, named(session_id, now_us, refill, refill * 6000))
    turns = list(await database.execute_fetchall(HISTORY, named(session_id, 10)))
    contents: list[types.Content] = []
    for turn in reversed(turns):
        contents.append(types.Content(role="user", parts=[types.Part(text=turn[1])]))
        contents.append(types.Content(role="model", parts=[types.Part(text=turn[2])]))
    contents.append(types.Content(role="user", parts=[types.Part(text=utterance.message)]))
    config = types.GenerateContentConfig(
        system_instruction=system_prompt(utterance.emotion),
        max_output_tokens=200,
        thinking_config=types.ThinkingConfig(thinking_level=types.ThinkingLevel.MINIMAL),
    )
    said = []
    stream = await app.state.model.generate_content_stream(
        model="gemini-3.5-flash-lite", contents=contents, config=config
    )
    async for event in stream:
        if event.text:
            if not said:
                await send("ai_stream_begin")
            said.append(event.text)
            await send("ai_stream_chunk", chunk=event.text)
    last = turns[0][0] if turns else 0
    values = named(session_id, utterance.message, "".join(said), utterance.emotion, utterance.timestamp, last)
    await database.execute_fetchall(ADD_TURN, values)
    await send("ai_stream_complete")


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        loop="uvloop",
        log_level="warning",
        ws_per_message_deflate=False,
    )

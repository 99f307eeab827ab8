"""The peer: what a good developer would write today with FastAPI, uvicorn on uvloop and Google's own client.

    PORT=8001 GEMINI_BASE_URL=http://127.0.0.1:9000/... SYSTEM_PROMPT=... python bench/peer.py

It speaks the same protocol and does the same work on the same tables: a token, the last ten turns, a streamed reply,
one insert, then the completion. It has no resume, no pacing, no limits, no care: what those cost is this server's to
bear.
"""

import json
import os
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

CREATE_SESSION = "INSERT INTO sessions (session_id) VALUES (?) ON CONFLICT DO NOTHING"
TAKE_TOKEN = """
UPDATE sessions SET full_at = max(full_at, :now) + :refill
WHERE session_id = :id AND max(full_at, :now) + :refill <= :now + :bucket RETURNING session_id
"""
HISTORY = "SELECT user_message, ai_response FROM conversations WHERE session_id = ? ORDER BY id DESC LIMIT 10"
ADD_TURN = """
INSERT INTO conversations (session_id, user_message, ai_response, emotion, timestamp) VALUES (?, ?, ?, ?, ?)
"""
BUCKET_MS, PER_MINUTE = 60_000, 6000
MAX_MESSAGE_CHARACTERS = 2_000

database: aiosqlite.Connection


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    global database
    database = await aiosqlite.connect("peer.db", isolation_level=None)
    await database.executescript((Path(__file__).parent / "peer.sql").read_text(encoding="utf-8"))
    options = types.HttpOptions(base_url=os.environ["GEMINI_BASE_URL"], api_version="v1beta")
    app.state.model = genai.Client(api_key="bench", http_options=options).aio.models
    yield
    await database.close()


app = FastAPI(lifespan=lifespan)


@app.websocket("/ws/session/{session_id}")
async def talk(socket: WebSocket, session_id: str) -> None:
    await socket.accept()
    await database.execute_fetchall(CREATE_SESSION, [session_id])
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

    message, now = data["message"].strip(), int(time.time() * 1000)
    bucket = {"id": session_id, "now": now, "refill": BUCKET_MS // PER_MINUTE, "bucket": BUCKET_MS}
    if not 1 <= len(message) <= MAX_MESSAGE_CHARACTERS or not await database.execute_fetchall(TAKE_TOKEN, bucket):
        await send("ai_stream_error", error="요청을 처리할 수 없습니다")
        return
    contents: list[types.Content] = []
    for asked, answered in reversed(list(await database.execute_fetchall(HISTORY, [session_id]))):
        contents.append(types.Content(role="user", parts=[types.Part(text=asked)]))
        contents.append(types.Content(role="model", parts=[types.Part(text=answered)]))
    contents.append(types.Content(role="user", parts=[types.Part(text=message)]))
    config = types.GenerateContentConfig(
        system_instruction=os.environ["SYSTEM_PROMPT"],
        max_output_tokens=200,
        thinking_config=types.ThinkingConfig(thinking_level=types.ThinkingLevel.MINIMAL),
    )
    said: list[str] = []
    stream = await app.state.model.generate_content_stream(
        model="gemini-3.5-flash-lite", contents=contents, config=config
    )
    async for event in stream:
        if event.text:
            if not said:
                await send("ai_stream_begin")
            said.append(event.text)
            await send("ai_stream_chunk", chunk=event.text)
    await database.execute_fetchall(ADD_TURN, [session_id, message, "".join(said), data.get("emotion"), now])
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

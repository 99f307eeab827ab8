"""A local server that speaks Gemini's REST interface, and whose answers a test scripts."""

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

from aiohttp import web

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def event(text: str | None = None, finish: str | None = None, **beside: object) -> bytes:
    """One event as Gemini writes it."""
    candidate: dict[str, Any] = {"index": 0}
    if text is not None:
        candidate["content"] = {"role": "model", "parts": [{"text": text}]}
    if finish is not None:
        candidate["finishReason"] = finish
    return b"data: " + json.dumps({"candidates": [candidate], **beside}, ensure_ascii=False).encode() + b"\r\n\r\n"


def chat_event(text: str | None, finish: str | None = None) -> bytes:
    """One event as a server writes it that speaks OpenAI's chat completions."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def stream(*blocks: bytes, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer that writes each block in a piece of its own."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **(headers or {})})
        await response.prepare(request)
        for block in blocks:
            await response.write(block)
            await asyncio.sleep(0)
        return response

    return answer


def status(number: int, body: str = '{"error": {"code": 0}}', **headers: str) -> Answer:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=number, text=body, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return answer


def reset_after(*blocks: bytes) -> Answer:
    """An answer whose connection is reset after these blocks."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for block in blocks:
            await response.write(block)
        assert request.transport is not None
        if blocks:
            await asyncio.sleep(0.1)  # a reset overtakes what was written just before it
        request.transport.abort()
        return response

    return answer


def silent_after(*blocks: bytes, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer that says nothing more after these blocks, and does not end."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for block in blocks or [b""]:
            await response.write(block or b"\n")
        await asyncio.Event().wait()
        return response

    return answer


class GeminiStandIn:
    """A local server that speaks Gemini's REST interface; each request gets the next scripted answer."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: deque[Answer] = deque()
        self.default: Answer = stream(event("네, "), event("듣고 있어요."), event("", "STOP"))
        self.requests: list[dict[str, Any]] = []
        self.peers: list[Any] = []
        self.warmed: list[Any] = []  # peers that asked for the model's description
        self.description = status(200, '{"name": "models/stand-in"}')
        self.ended = 0
        self._port = 0
        self._runner: web.AppRunner | None = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.peers.append(request.transport.get_extra_info("peername"))
        self.requests.append(
            {
                "path": request.path,
                "query": dict(request.query),
                "headers": request.headers,
                "body": await request.json(),
            }
        )
        try:
            return await (self.answers.popleft() if self.answers else self.default)(request)
        finally:
            self.ended += 1

    async def _describe(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.warmed.append(request.transport.get_extra_info("peername"))
        return await self.description(request)

    async def open(self) -> None:
        """Listen, on the port of the last time where there was one."""
        app = web.Application()
        app.router.add_post("/{path:.*}", self._handle)
        app.router.add_get("/{path:.*}", self._describe)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    def connections(self) -> int:
        """Count the connections that are open."""
        assert self._runner is not None
        assert self._runner.server is not None
        return len(self._runner.server.connections)

    async def close(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

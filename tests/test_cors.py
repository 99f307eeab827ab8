"""A page of another origin calls the server in a real Chromium, with the headers that the public frontend sends."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from page import running_browser
from playwright.async_api import Page
from support import SECRET, Serving

CALL = """
async ([url, method, token]) => {
  const headers = {
    "Content-Type": "application/json",
    "X-Request-ID": crypto.randomUUID(),
    "X-Client-Version": "1.0.0",
    "X-Device-ID": "device",
    "X-Timestamp": String(Date.now()),
    "X-CSRF-Token": "csrf",
  };
  if (token) headers.Authorization = `Bearer ${token}`;
  try {
    const answer = await fetch(url, { method, headers, credentials: "include" });
    const text = await answer.text();
    return { status: answer.status, body: text && JSON.parse(text), retryAfter: answer.headers.get("Retry-After") };
  } catch (error) {
    return { failed: String(error) };
  }
}
"""
CONNECT = """
(url) => new Promise((resolve) => {
  const socket = new WebSocket(url);
  socket.onopen = () => resolve("open");
  socket.onerror = () => resolve("refused");
})
"""


@asynccontextmanager
async def another_origin() -> AsyncIterator[str]:
    """Serve an empty page under another origin, and yield that."""
    app = web.Application()

    async def empty(_: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><title>app</title>", content_type="text/html")

    app.router.add_get("/", empty)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://localhost:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    async with running_browser(tmp_path) as browser:
        yield await browser.new_page()


async def test_a_frontend_of_an_allowed_origin_calls_every_route(serving: Serving, page: Page) -> None:
    async with another_origin() as origin:
        await page.goto(origin)
        async with serving(ALLOWED_ORIGINS=origin, JWT_SECRET_KEY=SECRET, MAX_NEW_SESSIONS_PER_MINUTE=1) as server:

            async def call(path: str, method: str = "GET", token: str = "") -> dict[str, Any]:
                answer: dict[str, Any] = await page.evaluate(CALL, [server.url + path, method, token])
                return answer

            made = await call("/api/sessions", "POST")
            assert made["status"] == 201, made
            session_id, token = made["body"]["session_id"], made["body"]["token"]
            full = await call("/api/sessions", "POST")
            assert (full["status"], full["retryAfter"]) == (429, "60")
            read = await call(f"/api/sessions/{session_id}/conversations", token=token)
            assert (read["status"], read["body"]["conversations"]) == (200, [])
            assert (await call("/health"))["status"] == 200
            websocket = f"{server.url.replace('http', 'ws')}/ws/session/{session_id}?token={token}"
            assert await page.evaluate(CONNECT, websocket) == "open"
            assert (await call(f"/api/sessions/{session_id}", "DELETE", token))["status"] == 204


async def test_a_page_of_any_other_origin_is_refused_by_the_browser(serving: Serving, page: Page) -> None:
    async with another_origin() as origin:
        await page.goto(origin)
        async with serving(ALLOWED_ORIGINS="https://app.example") as server:
            for path, method in (("/api/sessions", "POST"), ("/health", "GET")):
                answer = await page.evaluate(CALL, [server.url + path, method, ""])
                assert answer == {"failed": "TypeError: Failed to fetch"}
            assert await page.evaluate(CONNECT, f"{server.url.replace('http', 'ws')}/ws/session/s") == "refused"
            assert not list(await server.storage.fetch("SELECT * FROM sessions"))

"""What the tests of the page share: a real Chromium, and a person's visit to the page through a breakable connection.

Only what a browser's vendor provides is replaced (browser.js): recognition and voices.
"""

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Locator, Page, Route, async_playwright, expect
from support import Server, Serving, Wire, hear
from tools import PATIENCE, program_of, until

HERE = Path(__file__).parent
ROOT = HERE.parent
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
FONTS = """\
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>{fonts}</dir>
  <cachedir>{cache}</cachedir>
</fontconfig>
"""
NANUM = Path("/usr/share/fonts/truetype/nanum")
FONTS_FOLDER = NANUM if NANUM.is_dir() else "/usr/share/fonts"
PHONE = {"width": 390, "height": 844}
START = 1_800_000_000  # where a page's clock stands still, in seconds since the epoch

expect.set_options(timeout=PATIENCE * 1000)


@contextlib.asynccontextmanager
async def running_browser(folder: Path) -> AsyncIterator[Browser]:
    """Run Debian's Chromium with fonts-nanum alone, where that is installed: it has no emoji."""
    program = program_of("chromium", "chromium-browser")
    fonts = folder / "fonts.conf"
    fonts.write_text(FONTS.format(fonts=FONTS_FOLDER, cache=folder))
    environment: dict[str, str | float | bool] = {**os.environ, "FONTCONFIG_FILE": str(fonts)}
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=ARGUMENTS, env=environment)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(name="browser", scope="module", loop_scope="module")
async def browser_fixture(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    async with running_browser(tmp_path_factory.mktemp("fonts")) as browser:
        yield browser


@pytest_asyncio.fixture(name="site", loop_scope="module")
async def site_fixture(serving: Serving) -> AsyncIterator[Server]:
    """As conftest.py's server, in the browser's loop."""
    async with serving() as running:
        yield running


class Site(Protocol):
    """What a visit needs of a server."""

    address: tuple[str, int]


class Visit:
    """A person's browser at the page; errors in its console and requests elsewhere fail the test."""

    def __init__(self, context: BrowserContext, page: Page, address: Callable[[], tuple[str, int]]) -> None:
        self.context = context
        self.page = page
        self.wire = Wire(lambda: asyncio.open_connection(*address()))
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.sent: list[dict[str, Any]] = []  # frames of all sockets but pings
        self.watch(page)

    def watch(self, page: Page) -> None:
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        page.on("websocket", lambda socket: socket.on("framesent", self._note_frame))

    def _note_frame(self, payload: str | bytes) -> None:
        frame = json.loads(payload)
        if frame["type"] != "ping":
            self.sent.append(frame)

    def __getitem__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.wire.port}"

    async def begin(self) -> None:
        """Open the page and leave its first screen."""
        await self.page.goto(self.url)
        await self["#begin"].click()
        await self.state("연결됨")

    async def state(self, words: str) -> None:
        await expect(self["#state"]).to_have_text(words)

    async def stand_still(self) -> None:
        """Stop the page's clock: from now on only run() moves it."""
        await self.page.clock.pause_at(START)
        # The leap to that moment may send a ping, and a page without its pong would leave the connection.
        await self.until("pings <= 0", True)

    async def run(self, milliseconds: int) -> None:
        await self.page.clock.run_for(milliseconds)

    async def wait(self, seconds: int) -> None:
        """Let time pass in steps in which the server's pongs arrive."""
        await self.until("pings", 0)
        for _ in range(0, seconds, 4):
            await self.run(4_000)
            await self.until("pings", 0)

    async def write(self, message: str) -> None:
        hear(message)
        await self["#field"].fill(message)
        await self["#field"].press("Enter")

    async def speak(self, message: str) -> None:
        """Say something, and end it by the button."""
        hear(message)
        await self["#microphone"].click()
        await self.page.evaluate("words => ear.hear(words, true)", message)
        await self["#microphone"].click()

    async def replied(self, words: str) -> None:
        """Wait for the whole of the newest reply."""
        await expect(self[".turn:last-child .theirs .words"]).to_have_text(words)
        await expect(self[".coming"]).to_have_count(0)

    async def spoken(self) -> list[str]:
        return list(await self.page.evaluate("mouth.spoken"))

    async def until(self, expression: str, value: object) -> None:
        """Wait until the page has a value; not by its own clock, which may stand still."""
        async with asyncio.timeout(PATIENCE):
            while await self.page.evaluate(expression) != value:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.01)

    async def until_spoken(self, *sentences: str) -> None:
        await self.until("mouth.spoken", list(sentences))

    async def end_utterance(self) -> None:
        await self.page.evaluate("mouth.end()")

    async def asked(self, count: int) -> list[str]:
        """Wait until so many requests were sent, and return their messages."""

        def requests() -> list[dict[str, Any]]:
            return [frame for frame in self.sent if frame["type"] == "request_ai_response"]

        await until(lambda: len(requests()) >= count)
        assert len(requests()) == count
        return [frame["data"]["message"] for frame in requests()]

    async def session_id(self) -> str:
        return str(await self.page.evaluate("session.id"))

    async def hide(self, hidden: bool) -> None:
        """Hide the tab or lock the phone, or show it again."""
        await self.page.evaluate(
            "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
            " document.dispatchEvent(new Event('visibilitychange')); }",
            hidden,
        )


@contextlib.asynccontextmanager
async def visiting(
    browser: Browser,
    site: Site,
    *,
    clock: bool = False,
    network_errors: bool = False,
    script: str = "",
    first_screen: bool = False,
    **options: Any,
) -> AsyncIterator[Visit]:
    """Visit the page; `script` runs before the page's own."""
    context = await browser.new_context(**{"viewport": PHONE, "locale": "ko", **options})
    await context.add_init_script(path=HERE / "browser.js")
    await context.add_init_script(script)
    visit = Visit(context, await context.new_page(), lambda: site.address)
    async with visit.wire:
        try:
            if clock:
                await visit.page.clock.install(time=START - 3600)
            if first_screen:
                await visit.page.goto(visit.url)
            else:
                await visit.begin()
            if clock:
                await visit.stand_still()
            yield visit
        finally:
            await context.close()
    elsewhere = [
        url for url in visit.requests if not re.match(rf"(http|ws)://127.0.0.1:{visit.wire.port}/|data:|blob:", url)
    ]
    assert not elsewhere, elsewhere
    errors = [error for error in visit.errors if not (network_errors and re.search("ERR_|WebSocket|status of", error))]
    assert not errors, errors


@pytest_asyncio.fixture(name="visit", loop_scope="module")
async def visit_fixture(browser: Browser, site: Server) -> AsyncIterator[Visit]:
    async with visiting(browser, site) as visit:
        yield visit


@pytest_asyncio.fixture(name="still", loop_scope="module")
async def still_fixture(browser: Browser, site: Server) -> AsyncIterator[Visit]:
    """A visit during which time stands still unless the test moves it."""
    async with visiting(browser, site, clock=True) as visit:
        yield visit


@pytest_asyncio.fixture(name="rules", scope="module", loop_scope="module")
async def rules_fixture(browser: Browser) -> AsyncIterator[Page]:
    """The page without a server: its pure functions are called here, all tests in one page."""
    page = await browser.new_page()

    async def answer(route: Route) -> None:
        name = route.request.url.rpartition("/")[2] or "demo.html"
        await route.fulfill(path=ROOT / name)

    await page.route("**/*", answer)
    await page.goto("http://127.0.0.1/")
    yield page
    await page.close()

"""The page: broken connections, servers that die, sessions that end, and other tabs."""

import asyncio
import contextlib
import re
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from page import START, Visit, browser_fixture, site_fixture, still_fixture, visit_fixture, visiting  # noqa: F401
from playwright.async_api import Browser, Route, expect
from standin import GeminiStandIn, event
from support import CANARY, Program, ScriptedCounsellor, Server, Serving, started
from tools import PATIENCE, until

from bemore.storage import NewTurn

pytestmark = pytest.mark.asyncio(loop_scope="module")

LOST = "답을 받지 못했습니다."
WAITS = "지금은 연결이 끊겨 있습니다. 다시 연결되면 바로 보냅니다."
FIRST_PAUSE = 625  # ms at most, before the first attempt to reconnect


async def reconnected(visit: Visit) -> None:
    """Let the page reconnect, however long its pauses are."""
    async with asyncio.timeout(PATIENCE):
        while await visit.page.evaluate("connection") != "connected":
            await visit.run(500)
            await asyncio.sleep(0.02)  # for the network, which has a clock of its own


# A connection that breaks


async def test_a_connection_that_breaks_in_a_reply_costs_nothing(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect().say("끊기기 전의 말. ")
    await visit.speak(CANARY)
    await visit.until_spoken("끊기기 전의 말.")
    visit.wire.down = True
    visit.wire.cut()
    await visit.state("연결 안 됨")
    talk.say("끊긴 사이의 말. ")
    visit.wire.down = False
    await expect(visit[".theirs .words"]).to_have_text("끊기기 전의 말. 끊긴 사이의 말. ")
    talk.say("이어진 뒤의 말.").end()
    await visit.replied("끊기기 전의 말. 끊긴 사이의 말. 이어진 뒤의 말.")
    for count in (1, 2, 3):
        await visit.until_spoken(*["끊기기 전의 말.", "끊긴 사이의 말.", "이어진 뒤의 말."][:count])
        await visit.end_utterance()
    assert len(counsellor.prompts) == 1
    visit.errors.clear()


@pytest.mark.parametrize("woken", [True, False])
async def test_words_after_a_dead_connection_are_answered_soon(still: Visit, woken: bool) -> None:
    """A phone that was locked has a socket, and a kept HTTP connection, that look open and are dead."""
    await still.page.evaluate("() => { pongMs = PONG_MS; }")  # however slow the handshake was here
    if woken:
        await still.hide(True)
    still.wire.strand()
    if woken:
        await still.hide(False)
        await still.run(1_000)
    await still.write("죽고 싶어요")
    await still.run(1_000 if woken else 2_000)
    await still.state("연결 안 됨")
    await still.run(FIRST_PAUSE)
    await still.run(1_000)  # for the answer about the session, which a dead HTTP connection may hold
    await expect(still[".theirs .words"]).to_contain_text("들은 말: 죽고 싶어요")


async def test_a_slow_network_is_no_dead_connection(still: Visit) -> None:
    assert await still.page.evaluate("() => { pongMs = 6000; return pongMs; }") == 6_000
    still.wire.freeze()
    await still.hide(False)
    await still.run(5_900)
    await still.state("연결됨")
    await still.run(100)
    await still.state("연결 안 됨")


async def test_offline_shows_at_once_and_words_wait(still: Visit) -> None:
    await still.context.set_offline(True)
    await still.state("연결 안 됨")
    await still.write(CANARY)
    await expect(still[".note"]).to_have_text(WAITS)
    await still.write("이어서 적은 말")
    await still.context.set_offline(False)
    await reconnected(still)
    await still.replied(f"들은 말: {CANARY}\n이어서 적은 말")
    await expect(still[".note"]).to_be_hidden()
    await still.state("연결됨")
    still.errors.clear()


async def test_the_page_pings_every_15_seconds_and_gives_up_after_5(still: Visit) -> None:
    await still.page.evaluate(
        "() => { window.pinged = 0; const plain = WebSocket.prototype.send;"
        " WebSocket.prototype.send = function (frame) { pinged += 1; plain.call(this, frame); }; }"
    )
    for count in (1, 2, 3, 4):
        await still.run(15_000)
        await still.until("[pinged, pings]", [count, 0])
    still.wire.freeze()
    await still.run(15_000)
    await still.run(4_900)
    await still.state("연결됨")
    await still.run(100)
    await still.state("연결 안 됨")


async def test_pauses_grow_but_stay_short_while_words_wait(visit: Visit) -> None:
    await visit.page.evaluate(
        "() => { const plain = setTimeout; window.pauses = []; Math.random = () => [0, 0.5, 1][pauses.length % 3];"
        " window.setTimeout = (action, ms, ...rest) => (action === connect ? pauses.push(ms) && 0"
        " : plain(action, ms, ...rest)); disconnect(); attempts = 0; for (let i = 0; i < 9; i++) connectLater();"
        " addTurn({ messages: ['기다리는 말'] }); for (let i = 0; i < 3; i++) connectLater(); }"
    )
    pauses = await visit.page.evaluate("pauses")
    assert pauses == [375, 1_000, 2_500, 3_000, 8_000, 20_000, 22_500, 30_000, 37_500, 1_125, 1_500, 1_875]


async def test_a_handshake_that_hangs_is_given_up(still: Visit) -> None:
    await still.write(CANARY)
    await still.replied(f"들은 말: {CANARY}")
    still.wire.cut()
    still.wire.freeze()
    await still.state("연결 안 됨")
    await still.write("기다리는 말")
    await still.run(1_000)  # for the answer about the session
    await still.until("socket?.readyState", 0)
    still.wire.strand()
    await still.run(4_000)
    await reconnected(still)
    await still.replied("들은 말: 기다리는 말")
    still.errors.clear()


async def test_a_fetch_that_hangs_ends(still: Visit) -> None:
    async def wait(_: Route) -> None:
        await asyncio.Event().wait()

    await still.page.route("**/conversations*", wait)
    await still["#open-history"].click()
    await still.run(4_000)
    await expect(still["#history-note"]).to_have_text("지금은 서버에 연결할 수 없습니다. 잠시 뒤에 다시 해 주세요.")
    still.errors.clear()


# A server that dies, or has lost a request


async def silence(_: web.Request) -> web.StreamResponse:
    """The answer of a model that thinks for ever."""
    await asyncio.Event().wait()
    raise AssertionError


async def half(request: web.Request) -> web.StreamResponse:
    """The answer of a model that stops in the middle."""
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(event("반쯤 "))
    await asyncio.Event().wait()
    raise AssertionError


class Killable:
    """The program on one database and port, which a test kills and starts again."""

    def __init__(self, folder: Path, gemini: GeminiStandIn, stack: contextlib.AsyncExitStack) -> None:
        self.folder, self.gemini, self.stack = folder, gemini, stack
        self.address = ("127.0.0.1", 0)
        self.program: Program | None = None

    async def start(self) -> None:
        values = {
            "GEMINI_API_KEY": "k",
            "GEMINI_BASE_URL": self.gemini.url,
            "DATABASE_URL": f"sqlite:///{self.folder}/a.db",
        }
        self.program = await self.stack.enter_async_context(started(self.folder, **values))
        self.address = ("127.0.0.1", self.program.port)

    async def kill(self) -> None:
        assert self.program
        self.program.process.kill()
        await self.program.process.wait()

    def rows(self) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self.folder / "a.db")) as database:
            return database.execute("SELECT user_message, ai_response, timestamp FROM conversations").fetchall()


@contextlib.asynccontextmanager
async def killable(folder: Path) -> AsyncIterator[Killable]:
    async with GeminiStandIn() as gemini, contextlib.AsyncExitStack() as stack:
        server = Killable(folder, gemini, stack)
        await server.start()
        yield server


@pytest.mark.parametrize("answer", [silence, half])
async def test_after_a_killed_server_the_page_asks_again_soon(browser: Browser, tmp_path: Path, answer: Any) -> None:
    async with killable(tmp_path) as server:
        server.gemini.answers.append(answer)
        async with visiting(browser, server, clock=True, network_errors=True) as visit:
            await visit.write(CANARY)
            await until(lambda: len(server.gemini.requests) == 1)
            await visit.until("turns[0].confirmed", True)
            if answer is half:
                await expect(visit[".theirs .words"]).to_have_text("반쯤 ")
            await server.kill()
            await visit.state("연결 안 됨")
            await server.start()
            await visit.run(FIRST_PAUSE)
            await visit.until("connection", "connected")
            await visit.run(1_500)
            await visit.replied("네, 듣고 있어요.")
            await expect(visit[".mine"]).to_have_text([CANARY])
            assert server.rows() == [(CANARY, "네, 듣고 있어요.", START * 1000)]
            assert len(server.gemini.requests) == 2


async def test_a_request_that_is_lost_again_and_again_is_given_back(browser: Browser, tmp_path: Path) -> None:
    async with killable(tmp_path) as server:
        server.gemini.answers.extend([silence] * 3)
        async with visiting(browser, server, clock=True, network_errors=True) as visit:
            await visit.write(CANARY)
            for times in (1, 2, 3):
                await until(lambda: len(server.gemini.requests) == times)  # noqa: B023 - awaited here
                await visit.until("turns[0].confirmed", True)
                await server.kill()
                await visit.state("연결 안 됨")
                await server.start()
                await reconnected(visit)
                await visit.run(1_500)
            await expect(visit[".note span"]).to_have_text(LOST)
            assert server.rows() == []
            await visit["button.again"].click()
            await visit.replied("네, 듣고 있어요.")


async def test_a_reply_that_another_process_stored_is_shown(still: Visit, site: Server) -> None:
    """The request's process is gone without a trace, and its turn is in the database."""
    await still.page.evaluate("() => { window.plain = WebSocket.prototype.send; WebSocket.prototype.send = () => {}; }")
    await still.write(CANARY)
    await still.page.evaluate("() => { WebSocket.prototype.send = plain; turns[0].confirmed = true; }")
    await site.storage.add_turn(await still.session_id(), NewTurn(CANARY, "저장된 대답이에요.", None, START * 1000))
    still.wire.cut()
    await still.state("연결 안 됨")
    await reconnected(still)
    await still.run(1_500)
    await still.replied("저장된 대답이에요.")
    await still.write("이어서 하는 말이에요")
    await still.replied("들은 말: 이어서 하는 말이에요")
    still.errors.clear()


# Sessions


SECRET: dict[str, Any] = {"JWT_SECRET_KEY": "b" * 32, "REQUIRE_SESSION_TOKEN": 1, "AUTO_CREATE_SESSIONS": 0}


async def test_with_tokens_everything_goes_on_as_before(browser: Browser, serving: Serving) -> None:
    async with serving(**SECRET) as site, visiting(browser, site) as visit:
        await visit.write(CANARY)
        await visit.replied(f"들은 말: {CANARY}")
        await visit.page.reload()
        await expect(visit[".mine"]).to_have_text([CANARY])
        await visit["#open-history"].click()
        await expect(visit["dialog .mine"]).to_have_text([CANARY])
        await visit["#erase"].click()
        await visit["#erase-now"].click()
        await expect(visit["#first-note"]).to_have_text("대화를 모두 지웠습니다.")


async def test_the_token_of_a_pong_takes_the_old_ones_place(visit: Visit) -> None:
    await visit.page.evaluate("receive({ type: 'pong', data: {}, token: 'fresh' })")
    kept = "JSON.parse(localStorage.getItem('bemore-session'))"
    assert await visit.page.evaluate(f"[session.token, {kept}.token]") == ["fresh", "fresh"]


async def test_words_to_an_expired_session_are_sent_to_a_new_one(browser: Browser, serving: Serving) -> None:
    """The session is gone, and the page does not know: no notice came and its socket is open."""
    async with serving(AUTO_CREATE_SESSIONS=0) as site, visiting(browser, site, network_errors=True) as visit:
        await visit.write("먼저 한 말이에요")
        await visit.replied("들은 말: 먼저 한 말이에요")
        gone = await visit.session_id()
        await site.storage.delete_session(gone)
        await visit.write(CANARY)
        await visit.replied(f"들은 말: {CANARY}")
        await expect(visit[".mine"]).to_have_text([CANARY])
        await expect(visit["#notice"]).to_have_text("지난 대화가 지워졌거나 만료되어 새 대화로 이어 갑니다.")
        assert await visit.session_id() != gone
        assert [row[0] for row in await site.rows(await visit.session_id())] == [CANARY]
        await visit.page.evaluate("receive({ type: 'ai_stream_error', data: { error: 'x' }, code: 'session_expired' })")
        await visit.state("연결됨")  # without a request that waits, nothing is sent again
        assert await visit.asked(3)


async def test_a_session_whose_token_is_refused_is_made_anew(browser: Browser, serving: Serving) -> None:
    async with contextlib.AsyncExitStack() as first:
        site = await first.enter_async_context(serving(**SECRET))
        async with visiting(browser, site, network_errors=True) as visit:
            refused = await visit.session_id()
            await first.aclose()
            async with serving(port=site.address[1], **{**SECRET, "JWT_SECRET_KEY": "c" * 32}):
                await visit.until(f"connection === 'connected' && session.id !== '{refused}'", True)
                await visit.write(CANARY)
                await visit.replied(f"들은 말: {CANARY}")


async def test_a_handshake_with_an_expired_token_begins_a_new_session(visit: Visit) -> None:
    """The token may still read the conversation; why a handshake failed, a browser does not tell."""
    expired = await visit.session_id()

    async def refuse(route: Route) -> None:
        await route.fulfill(status=401, json={"error": "x", "code": "invalid_token"})

    await visit.page.route(f"**/ws/session/{expired}*", refuse)
    await visit.page.evaluate("() => { attempts = 2; checkToken(); }")
    await visit.until(f"connection === 'connected' && session.id !== '{expired}'", True)
    await expect(visit["#notice"]).to_have_text("지난 대화가 만료되어 새 대화로 이어 갑니다.")
    visit.errors.clear()


async def test_what_is_said_without_a_server_is_sent_later(browser: Browser, serving: Serving) -> None:
    async with contextlib.AsyncExitStack() as first:
        site = await first.enter_async_context(serving())
        async with visiting(browser, site, network_errors=True) as visit:
            await first.aclose()
            await visit.state("연결 안 됨")
            await visit.write(CANARY)
            await expect(visit[".note"]).to_have_text(WAITS)
            await visit["#open-history"].click()
            await visit["#erase"].click()
            await visit["#erase-now"].click()
            unreachable = "지금은 서버에 연결할 수 없습니다. 잠시 뒤에 다시 해 주세요."
            await expect(visit["#history-note"]).to_have_text(unreachable)
            await visit["#close-history"].click()
            async with serving(port=site.address[1]):
                await visit.replied(f"들은 말: {CANARY}")


async def test_a_refused_session_is_said_once_and_tried_again(browser: Browser, site: Server) -> None:
    refused: list[Route] = []

    async def answer(route: Route) -> None:
        if refused:
            return await route.continue_()
        refused.append(route)
        body = {"error": "새 대화를 너무 자주 시작했습니다"}
        await route.fulfill(status=429, headers={"Retry-After": "2"}, json=body)

    async with visiting(browser, site, first_screen=True, network_errors=True) as visit:
        await visit.page.route("**/api/sessions", answer)
        await visit["#begin"].click()
        await expect(visit["#notice"]).to_have_text("새 대화를 너무 자주 시작했습니다")
        await visit.write(CANARY)
        await visit.replied(f"들은 말: {CANARY}")
        await expect(visit["#notice"]).to_have_text("")


BLOCKED = {
    "throws": "Object.defineProperty(window, 'localStorage', { get() { throw new Error('denied'); } });"
    "Object.defineProperty(window, 'sessionStorage', { get() { throw new Error('denied'); } });",
    "is null": "Object.defineProperty(window, 'localStorage', { value: null });",
    "is full": "Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError'); };",
    "is broken": "for (const key of ['session', 'started', 'aloud']) localStorage.setItem(`bemore-${key}`, 'oops');"
    "sessionStorage.setItem('bemore-pending', 'oops'); sessionStorage.setItem('bemore-seq', 'oops');",
    "is strange": "localStorage.setItem('bemore-session', '7'); sessionStorage.setItem('bemore-pending', '{}');",
}


@pytest.mark.parametrize("kind", BLOCKED)
async def test_storage_that_is_blocked_is_survived(browser: Browser, site: Server, kind: str) -> None:
    async with visiting(browser, site, script=BLOCKED[kind]) as visit:
        await visit["#feeling"].select_option("불안")
        await visit.write(CANARY)
        await visit.replied(f"들은 말: {CANARY}")


# Other tabs


@contextlib.asynccontextmanager
async def second_tab(visit: Visit) -> AsyncIterator[Visit]:
    page = await visit.context.new_page()
    other = Visit(visit.context, page, lambda: ("", 0))
    other.wire = visit.wire
    await page.goto(visit.url)
    await other.state("연결됨")
    yield other
    assert not other.errors


async def test_only_the_tab_that_asked_reads_a_reply_aloud(visit: Visit) -> None:
    async with second_tab(visit) as other:
        await other["#aloud"].select_option("항상")
        await visit.speak(CANARY)
        await visit.replied(f"들은 말: {CANARY}")
        await other.replied(f"들은 말: {CANARY}")
        await expect(other[".mine"]).to_have_text([CANARY])
        await visit.until_spoken(f"들은 말: {CANARY}")
        assert await other.spoken() == []
        await other.write("다른 창에서 하는 말")
        await visit.replied("들은 말: 다른 창에서 하는 말")
        await expect(visit[".mine"]).to_have_text([CANARY, "다른 창에서 하는 말"])


async def test_a_turn_of_another_device_is_shown_with_its_words(visit: Visit, site: Server) -> None:
    async with site.connect(await visit.session_id()) as device:
        await device.ask("다른 기기에서 하는 말")
        await visit.replied("들은 말: 다른 기기에서 하는 말")
        await expect(visit[".mine"]).to_have_text(["다른 기기에서 하는 말"])
        assert await visit.spoken() == []


async def test_other_tabs_notice_that_all_was_erased(visit: Visit, site: Server) -> None:
    async with second_tab(visit) as other:
        await visit.write(CANARY)
        await other.replied(f"들은 말: {CANARY}")
        erased = await visit.session_id()
        await visit.page.bring_to_front()
        await visit["#open-history"].click()
        await visit["#erase"].click()
        await visit["#erase-now"].click()
        await expect(other["#first-note"]).to_have_text("다른 창에서 대화를 모두 지웠습니다.")
        await expect(other[".turn"]).to_have_count(0)
        await other["#begin"].click()
        await other.write("다시 시작하는 말")
        await other.replied("들은 말: 다시 시작하는 말")
        assert await other.session_id() != erased
        assert not await site.rows(erased)
        visit.errors.clear()


async def test_a_session_that_another_device_erased_is_not_revived(visit: Visit, site: Server) -> None:
    """The server creates a session with its first request; the page asks first whether its own still exists."""
    await visit.write(CANARY)
    await visit.replied(f"들은 말: {CANARY}")
    erased = await visit.session_id()
    async with site.http.delete(f"{site.url}/api/sessions/{erased}") as response:
        assert response.status == 204
    visit.wire.cut()  # a server may do so itself
    await visit.until(f"session?.id && session.id !== '{erased}'", True)
    await expect(visit[".turn"]).to_have_count(0)
    await visit.write("그다음에 하는 말")
    await visit.replied("들은 말: 그다음에 하는 말")
    assert not await site.rows(erased)
    assert re.fullmatch("[\\w-]+", await visit.session_id())
    visit.errors.clear()

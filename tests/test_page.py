"""The page, in a real Chromium; only what its vendor provides is replaced (browser.js): recognition and voices."""

import asyncio
import contextlib
import os
import re
import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import unused_port
from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]
from playwright.async_api import Browser, BrowserContext, Locator, Page, Route, async_playwright, expect
from standin import Answer, GeminiStandIn, event, silent_after
from support import CANARY, ScriptedCounsellor, Server, Talk, hear, make_settings, serve, started
from tools import PATIENCE, until

from bemore.demo import Demo
from bemore.storage import NewTurn
from bemore_voice import make_counsellor

HERE = Path(__file__).parent
PAGE = HERE.parent / "demo.html"
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
HINT = "세션이 만료되었을 수 있습니다. 페이지를 새로고침해주세요."
EMOJI = "[\u2190-\u21ff\u2300-\u27bf\u2900-\u297f\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff]"
FONTS = """\
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>{fonts}</dir>
  <cachedir>{cache}</cachedir>
</fontconfig>
"""
pytestmark = pytest.mark.asyncio(loop_scope="module")

START = 1_800_000_000  # where a page's clock stands still, in seconds since the epoch

expect.set_options(timeout=PATIENCE * 1000)


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A choice of fonts for fontconfig: where Debian's fonts-nanum is installed, none with emoji."""
    nanum = Path("/usr/share/fonts/truetype/nanum")
    file = tmp_path_factory.mktemp("fonts") / "fonts.conf"
    file.write_text(FONTS.format(fonts=nanum if nanum.is_dir() else "/usr/share/fonts", cache=file.parent))
    return file


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(fonts: Path) -> AsyncIterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        assert not os.environ.get("CI"), "chromium is missing"
        pytest.skip("chromium is not installed")
    environment: dict[str, str | float | bool] = {**os.environ, "FONTCONFIG_FILE": str(fonts)}
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=ARGUMENTS, env=environment)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def server(counsellor: ScriptedCounsellor, tmp_path: Path) -> AsyncIterator[Server]:
    """As conftest.py's, in the browser's loop."""
    settings = make_settings(f"sqlite:///{tmp_path}/test.db", MAX_AI_REQUESTS_PER_MINUTE=6000)
    async with serve(settings, counsellor) as running:
        yield running


class Visit:
    """A person's browser at the server's page; errors in its console and requests elsewhere fail the test."""

    def __init__(self, context: BrowserContext, page: Page, server: Server) -> None:
        self.context = context
        self.page = page
        self.server = server
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda socket: self.requests.append(socket.url))

    def __getitem__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    async def open(self) -> None:
        await self.page.goto(self.server.url)
        await expect(self["#connection"]).to_have_text(re.compile("연결됨|Connected"))

    async def stand_still(self) -> None:
        """Stop the page's clock: from now on only run() moves it."""
        await self.page.clock.pause_at(START)

    async def run(self, milliseconds: int) -> None:
        await self.page.clock.run_for(milliseconds)

    async def write(self, message: str) -> None:
        hear(message)
        await self["#field"].fill(message)
        await self["#field"].press("Enter")

    async def spoken(self) -> list[str]:
        return list(await self.page.evaluate("mouth.spoken"))

    async def until(self, expression: str, value: object) -> None:
        """Wait until the page has a value; not by its own clock, which may stand still."""
        async with asyncio.timeout(PATIENCE):
            while await self.page.evaluate(expression) != value:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.01)

    async def count(self, sent: list[str], number: int) -> None:
        await until(lambda: len(sent) == number)

    async def until_spoken(self, *sentences: str) -> None:
        await self.until("mouth.spoken", list(sentences))

    async def end_utterance(self) -> None:
        await self.page.evaluate("mouth.end()")

    async def session_id(self) -> str:
        return str(await self.page.evaluate("JSON.parse(localStorage.getItem('bemore-session')).id"))

    def break_connections(self) -> None:
        """Break every WebSocket of the server without a close frame."""
        for session in self.server.sessions:
            for socket in session.sockets:
                socket.cut()


@contextlib.asynccontextmanager
async def visiting(
    browser: Browser, server: Server, *, clock: bool = False, network_errors: bool = False, **options: Any
) -> AsyncIterator[Visit]:
    context = await browser.new_context(**{"viewport": {"width": 390, "height": 844}, **options})
    await context.add_init_script(path=HERE / "browser.js")
    visit = Visit(context, await context.new_page(), server)
    try:
        if clock:
            await visit.page.clock.install(time=START - 3600)
        await visit.open()
        if clock:
            await visit.stand_still()
        yield visit
    finally:
        await context.close()
    here = server.url.removeprefix("http")
    elsewhere = [url for url in visit.requests if not re.match(rf"(http|ws){re.escape(here)}(/|$)|data:,$", url)]
    assert not elsewhere
    errors = [error for error in visit.errors if not (network_errors and re.search("ERR_|WebSocket|status of", error))]
    assert not errors


@pytest_asyncio.fixture(loop_scope="module")
async def visit(browser: Browser, server: Server) -> AsyncIterator[Visit]:
    async with visiting(browser, server) as visit:
        yield visit


@pytest_asyncio.fixture(loop_scope="module")
async def still(browser: Browser, server: Server) -> AsyncIterator[Visit]:
    """A visit during which time stands still unless the test moves it."""
    async with visiting(browser, server, clock=True) as visit:
        yield visit


# Scenario 1: a normal reply


async def test_a_reply_goes_through_its_states_in_order_and_in_time(
    still: Visit, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    await still["input[value=anxious]"].check()
    await still["#microphone"].click()
    await expect(still["#microphone"]).to_have_text("듣는 중 (누르면 전송)")
    await still.page.evaluate("ear.hear('요즘')")
    await expect(still["#said .spoken"]).to_have_text("요즘")
    await expect(still["#said .badge"]).to_be_hidden()
    assert await still.page.evaluate("[ear.lang, ear.interimResults]") == ["ko-KR", True]
    await still.page.evaluate("ear.hear('요즘 잠이 안 와요', true)")
    await expect(still["#microphone"]).to_have_text("말하기")
    await expect(still["#said .spoken"]).to_have_text("요즘 잠이 안 와요")
    await expect(still["#said .badge"]).to_have_text("불안")
    await expect(still["#reply"]).to_be_hidden()

    talk.say("많이 ")
    await expect(still["#reply .spoken"]).to_have_text("많이")
    await expect(still["#generating"]).to_have_text("응답 생성 중...")
    await expect(still["#playing"]).to_be_hidden()
    talk.say("힘드셨겠어요. ", "언제부터 ")
    await expect(still["#reply .spoken"]).to_have_text("많이 힘드셨겠어요. 언제부터")
    await still.until_spoken("많이 힘드셨겠어요.")  # while the rest still streams
    await expect(still["#playing"]).to_have_text("재생 중")
    await expect(still["#generating"]).to_be_visible()

    await still.run(2_900)
    await expect(still["#said"]).to_be_visible()
    await still.run(100)
    await expect(still["#said"]).to_be_hidden()

    talk.say("그러셨나요?").end()
    await expect(still["#generating"]).to_be_hidden()
    await expect(still["#reply .spoken"]).to_have_text("많이 힘드셨겠어요. 언제부터 그러셨나요?")
    assert await still.spoken() == ["많이 힘드셨겠어요."]
    await still.end_utterance()
    await still.until_spoken("많이 힘드셨겠어요.", "언제부터 그러셨나요?")
    await expect(still["#playing"]).to_be_visible()
    await still.end_utterance()
    await expect(still["#playing"]).to_be_hidden()
    await still.run(999)
    await expect(still["#reply"]).to_be_visible()
    await still.run(1)
    await expect(still["#reply"]).to_be_hidden()
    assert await still.page.evaluate("mouth.language") == "ko-KR"
    assert await still.server.rows(await still.session_id()) == [
        ("요즘 잠이 안 와요", "많이 힘드셨겠어요. 언제부터 그러셨나요?", "anxious", START * 1000)
    ]


@pytest.mark.parametrize(
    ("emotion", "badge"),
    [
        ("happy", "행복"),
        ("sad", "슬픔"),
        ("angry", "분노"),
        ("anxious", "불안"),
        ("neutral", "보통(중립)"),
        ("surprised", "놀람"),
        ("disgusted", "불쾌(혐오)"),
        ("fearful", "두려움"),
        ("", None),
    ],
)
async def test_each_emotion_has_its_button_and_its_badge(
    visit: Visit, counsellor: ScriptedCounsellor, emotion: str, badge: str | None
) -> None:
    await visit[f"input[value='{emotion}']"].check()
    await visit.write(CANARY)
    if badge:
        await expect(visit["#said .badge"]).to_have_text(badge)
        await expect(visit["label:has(:checked)"]).to_have_text(badge)
    else:
        await expect(visit["#said .badge"]).to_be_hidden()
        await expect(visit["label:has(:checked)"]).to_have_text("선택 안 함")
    await until(lambda: counsellor.prompts)
    assert counsellor.prompts[0].emotion == (emotion or None)


# Scenario 2: the server is stopped


async def test_what_is_said_while_the_server_is_away_is_sent_when_it_is_back(browser: Browser, tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/test.db")
    counsellor = ScriptedCounsellor()
    async with contextlib.AsyncExitStack() as stack:
        first = contextlib.AsyncExitStack()
        server = await first.enter_async_context(serve(settings, counsellor))
        visit = await stack.enter_async_context(visiting(browser, server, clock=True, network_errors=True))
        await first.aclose()
        await expect(visit["#connection"]).to_have_text("다시 연결하는 중")
        await visit.write(CANARY)
        await expect(visit["#problem strong"]).to_have_text("오류")
        await expect(visit["#problem .sentence"]).to_contain_text("서버에 연결되지 않았습니다")
        await expect(visit["#problem .hint"]).to_be_hidden()
        await visit.run(600)
        await expect(visit["#problem"]).to_be_visible()
        await visit.run(4_400)
        await expect(visit["#problem"]).to_be_hidden()
        async with serve(settings, counsellor, port=server.address[1]) as again:
            visit.server = again
            async with asyncio.timeout(PATIENCE):
                while not counsellor.prompts:
                    await visit.run(1_000)
            await expect(visit["#reply .spoken"]).to_have_text(f"들은 말: {CANARY}")
            await expect(visit["#connection"]).to_have_text("연결됨")
            await until(lambda: not any(session.worker for session in again.sessions))
            assert [row[0] for row in await again.rows(await visit.session_id())] == [CANARY]


async def test_a_failing_model_is_said_and_what_was_said_is_not_lost(
    still: Visit, counsellor: ScriptedCounsellor
) -> None:
    counsellor.expect().fail(RuntimeError("x"))
    await still.write(CANARY)
    await expect(still["#problem .sentence"]).to_have_text("AI 서비스가 일시적으로 사용할 수 없습니다")
    await expect(still["#field"]).to_have_value(CANARY)
    await expect(still["#reply"]).to_be_hidden()
    await still.run(5_000)
    await expect(still["#problem"]).to_be_hidden()
    await still["#field"].press("Enter")
    await expect(still["#reply .spoken"]).to_have_text(f"들은 말: {CANARY}")


async def test_the_rate_is_said_with_the_wait(browser: Browser, tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/test.db", MAX_AI_REQUESTS_PER_MINUTE=1)
    async with serve(settings, ScriptedCounsellor()) as server, visiting(browser, server) as visit:
        await visit.write(CANARY)
        await expect(visit["#reply .spoken"]).to_have_text(f"들은 말: {CANARY}")
        await visit.write("곧바로 또 하는 말")
        sentence = re.compile(r"^요청 횟수가 초과되었습니다\. (59|60)초 뒤에 다시 보내 주세요\.$")
        await expect(visit["#problem .sentence"]).to_have_text(sentence)
        await expect(visit["#field"]).to_have_value("곧바로 또 하는 말")


# Scenario 3: the session is gone


async def test_a_session_that_is_gone_is_said_with_the_hint_and_a_reload_begins_anew(
    browser: Browser, server: Server
) -> None:
    async with visiting(browser, server, clock=True) as visit:
        gone = await visit.session_id()
        async with server.http.delete(f"{server.url}/api/sessions/{gone}") as response:
            assert response.status == 204
        await visit.write(CANARY)
        await expect(visit["#problem strong"]).to_have_text("오류")
        await expect(visit["#problem .sentence"]).to_have_text("세션이 만료되었습니다")
        await expect(visit["#problem .hint"]).to_have_text(HINT)
        await expect(visit["#problem .hint"]).to_be_visible()
        await visit.run(4_999)
        await expect(visit["#problem"]).to_be_visible()
        await visit.run(1)
        await expect(visit["#problem"]).to_be_hidden()
        await visit.page.reload()
        await expect(visit["#connection"]).to_have_text("연결됨")
        assert await visit.session_id() != gone
        await visit.write("다시 시작하는 말")
        await expect(visit["#reply .spoken"]).to_have_text("들은 말: 다시 시작하는 말")


async def test_a_session_that_another_deleted_before_the_visit_is_made_anew(browser: Browser, server: Server) -> None:
    async with visiting(browser, server, network_errors=True) as visit:
        gone = await visit.session_id()
        await server.storage.delete_session(gone)
        await visit.page.reload()
        await expect(visit["#connection"]).to_have_text("연결됨")
        assert await visit.session_id() != gone


# Voice out


async def test_sentences_are_read_one_by_one_and_never_cut_inside_a_word_or_a_number(
    visit: Visit, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    await visit.write(CANARY)
    for piece in (
        "기온이 3",
        ".",
        "5도라 추",
        "웠지요",
        "?! 많이 ",
        "떨었",
        "겠어요",
        "… 1,000",
        "걸음만",
        " 걸어요.\n",
        "네",
    ):
        talk.say(piece)
        await expect(visit["#reply .spoken"]).to_contain_text(piece.strip())
    talk.end()
    read = ["기온이 3.5도라 추웠지요?!", "많이 떨었겠어요…", "1,000걸음만 걸어요.", "네"]
    for count in range(1, 5):
        await visit.until_spoken(*read[:count])
        await visit.end_utterance()
    await expect(visit["#playing"]).to_be_hidden()


async def test_a_long_sentence_is_parted_between_words(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    words = [f"{number}번째로 이어지는 낱말" for number in range(1, 21)]
    sentence = " ".join(words) + " " + "가" * 120 + "."
    counsellor.expect().say(sentence).end()
    await visit.write(CANARY)
    async with asyncio.timeout(PATIENCE):
        while " ".join(await visit.spoken()) != sentence:
            if await visit.page.evaluate("mouth.current !== null"):
                await visit.end_utterance()
            await asyncio.sleep(0.01)
    spoken = await visit.spoken()
    assert all(len(part) <= 80 for part in spoken[:-1])
    assert len(spoken) == 5


async def test_without_a_korean_voice_the_reply_stays_to_be_read(still: Visit, counsellor: ScriptedCounsellor) -> None:
    await still.page.evaluate("mouth.voices = [{ lang: 'en-US', name: 'test' }]")
    counsellor.expect().say("스무 글자가 되는 대답을 합니다.").end()
    await still.write(CANARY)
    await expect(still["#reply .spoken"]).to_have_text("스무 글자가 되는 대답을 합니다.")
    await expect(still["#generating"]).to_be_hidden()
    assert await still.spoken() == []
    await still.run(3_000 + 17 * 90)
    await expect(still["#reply"]).to_be_visible()
    await still.run(90)
    await expect(still["#reply"]).to_be_hidden()


async def test_a_voice_that_never_ends_does_not_hold_up_the_next_sentence(
    still: Visit, counsellor: ScriptedCounsellor
) -> None:
    counsellor.expect().say("첫 문장이에요. 다음 문장이에요.").end()
    await still.write(CANARY)
    await still.until_spoken("첫 문장이에요.")
    await expect(still["#generating"]).to_be_hidden()
    await still.run(5_000 + 400 * 8)
    await still.until_spoken("첫 문장이에요.", "다음 문장이에요.")


async def test_reading_aloud_can_be_turned_off(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    counsellor.expect().say("첫 문장이에요. 다음 문장이에요.").end()
    await visit.write(CANARY)
    await visit.until_spoken("첫 문장이에요.")
    await expect(visit["#generating"]).to_be_hidden()
    await visit["#use-voice"].click()
    await expect(visit["#use-voice"]).to_have_attribute("aria-pressed", "false")
    await expect(visit["#playing"]).to_be_hidden()
    assert await visit.spoken() == ["첫 문장이에요."]
    await visit.write("소리 없이 하는 말")
    await expect(visit["#reply .spoken"]).to_have_text("들은 말: 소리 없이 하는 말")
    assert await visit.spoken() == ["첫 문장이에요."]


# Interruption


INTERRUPTIONS = {
    "the stop button": lambda visit: visit["#stop"].click(),
    "the microphone": lambda visit: visit["#microphone"].click(),
    "Escape": lambda visit: visit.page.keyboard.press("Escape"),
}


@pytest.mark.parametrize("way", INTERRUPTIONS)
async def test_a_reply_is_interrupted_at_once_here_and_at_the_server(
    visit: Visit, counsellor: ScriptedCounsellor, way: str
) -> None:
    talk = counsellor.expect().say("끊길 문장이에요. 그리고 ")
    await visit.write(CANARY)
    await visit.until_spoken("끊길 문장이에요.")
    await INTERRUPTIONS[way](visit)
    assert await visit.page.evaluate("mouth.current") is None
    await expect(visit["#reply"]).to_be_hidden()
    async with asyncio.timeout(PATIENCE):
        await talk.closed.wait()
    await expect(visit["#stop"]).to_be_hidden()
    if way == "the microphone":
        await visit.page.evaluate("ear.hear('말을 바꿔 볼게요', true)")
    else:
        await visit.write("말을 바꿔 볼게요")
    await expect(visit["#reply .spoken"]).to_have_text("들은 말: 말을 바꿔 볼게요")
    await visit.until_spoken("끊길 문장이에요.", "들은 말: 말을 바꿔 볼게요")
    rows = await visit.server.rows(await visit.session_id())
    assert rows[0][1] == "끊길 문장이에요. 그리고 "


async def test_a_new_message_interrupts_and_is_answered_after(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    await visit.write(CANARY)
    await until(talk.asked.is_set)
    await visit.write("두 번째로 하는 말")
    await expect(visit["#reply .spoken"]).to_have_text("들은 말: 두 번째로 하는 말")
    assert [prompt.message for prompt in counsellor.prompts] == [CANARY, "두 번째로 하는 말"]


async def test_when_only_the_voice_is_left_it_stops(still: Visit, counsellor: ScriptedCounsellor) -> None:
    counsellor.expect().say("다 끝난 대답이에요.").end()
    await still.write(CANARY)
    await still.until_spoken("다 끝난 대답이에요.")
    await still["#stop"].click()
    await expect(still["#reply"]).to_be_hidden()
    await still.write("그다음에 하는 말")
    await expect(still["#reply .spoken"]).to_have_text("들은 말: 그다음에 하는 말")
    await still.until_spoken("다 끝난 대답이에요.", "들은 말: 그다음에 하는 말")
    await still.run(5_000 + 400 * 11)  # for so long the first utterance was given
    assert await still.page.evaluate("mouth.current.text") == "들은 말: 그다음에 하는 말"


async def test_an_interruption_reaches_the_server_when_the_connection_is_back(
    visit: Visit, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect().say("끊길 문장이에요. ")
    await visit.write(CANARY)
    await visit.until_spoken("끊길 문장이에요.")
    visit.break_connections()
    await expect(visit["#connection"]).to_have_text("다시 연결하는 중")
    await visit["#stop"].click()
    talk.say("듣지 않을 문장이에요. ")
    await expect(visit["#connection"]).to_have_text("연결됨")
    async with asyncio.timeout(PATIENCE):
        await talk.closed.wait()
    await visit.write("다시 하는 말이에요.")
    await expect(visit["#reply .spoken"]).to_have_text("들은 말: 다시 하는 말이에요.")
    await visit.until_spoken("끊길 문장이에요.", "들은 말: 다시 하는 말이에요.")


# Connection


async def test_a_connection_that_breaks_in_the_middle_of_a_reply_costs_nothing(
    visit: Visit, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect().say("끊기기 전의 말. ")
    await visit.write(CANARY)
    await visit.until_spoken("끊기기 전의 말.")
    visit.break_connections()
    await expect(visit["#connection"]).to_have_text("다시 연결하는 중")
    talk.say("끊긴 사이의 말. ")
    await expect(visit["#connection"]).to_have_text("연결됨")
    await expect(visit["#reply .spoken"]).to_have_text("끊기기 전의 말. 끊긴 사이의 말.")
    talk.say("이어진 뒤의 말.").end()
    await expect(visit["#generating"]).to_be_hidden()
    await expect(visit["#reply .spoken"]).to_have_text("끊기기 전의 말. 끊긴 사이의 말. 이어진 뒤의 말.")
    for count in (1, 2, 3):
        await visit.until_spoken(*["끊기기 전의 말.", "끊긴 사이의 말.", "이어진 뒤의 말."][:count])
        await visit.end_utterance()


async def lose_a_request(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    """Break the connection while the model is silent, and let the process forget the request; then connect again."""
    talk = counsellor.expect()
    await visit.write(CANARY)
    await lose_what_is_asked(visit, talk)


async def lose_what_is_asked(visit: Visit, talk: Talk) -> None:
    await until(talk.asked.is_set)
    session = visit.server.session(await visit.session_id())
    visit.break_connections()
    session.interrupt()
    await talk.closed.wait()
    await until(lambda: not session.sockets and session.worker is None)
    visit.server.sessions.forget(session)
    await expect(visit["#connection"]).to_have_attribute("data-state", "disconnected")
    await visit.run(1_500)
    await expect(visit["#connection"]).to_have_attribute("data-state", "connected")


async def test_a_reply_that_went_on_elsewhere_is_read_from_what_is_stored(
    still: Visit, counsellor: ScriptedCounsellor
) -> None:
    """The process that took the request is gone; another, on the same database, has stored its turn."""
    await lose_a_request(still, counsellor)
    turn = NewTurn(CANARY, "저장된 대답이에요.", None, START * 1000)
    await still.server.storage.add_turn(await still.session_id(), turn)
    await expect(still["#reply"]).to_be_hidden()
    await still.run(20_000)
    await expect(still["#reply .spoken"]).to_have_text("저장된 대답이에요.")
    await still.write("이어서 하는 말이에요")
    await expect(still["#reply .spoken"]).to_have_text("들은 말: 이어서 하는 말이에요")


@pytest.mark.parametrize(
    ("language", "sentence"),
    [
        ("ko", "답을 받지 못했습니다. 한 번 더 보내 주세요."),
        ("en", "The reply was lost. Please send it once more."),
    ],
)
async def test_a_request_that_was_lost_twice_is_given_back(
    still: Visit, counsellor: ScriptedCounsellor, language: str, sentence: str
) -> None:
    if language == "en":
        await still["#language"].click()
    await lose_a_request(still, counsellor)
    again = counsellor.expect()
    await still.run(20_000)
    await lose_what_is_asked(still, again)
    await expect(still["#problem"]).to_be_hidden()
    await still.run(20_000)
    await expect(still["#problem .sentence"]).to_have_text(sentence)
    await expect(still["#field"]).to_have_value(CANARY)
    await still["#field"].press("Enter")
    await expect(still["#reply .spoken"]).to_have_text(f"들은 말: {CANARY}")


async def silence(_: web.Request) -> web.StreamResponse:
    """The answer of a model that thinks for ever."""
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(("kills", "answer"), [(1, silence), (2, silence), (1, silent_after(event("반쯤 ")))])
async def test_a_request_that_a_killed_server_lost_is_asked_again_once(
    browser: Browser, tmp_path: Path, kills: int, answer: Answer
) -> None:
    """Before its first word, or in the middle of a reply, which begins anew then."""
    async with GeminiStandIn() as gemini, contextlib.AsyncExitStack() as stack:
        gemini.answers.extend([answer] * kills)
        values = {"PORT": unused_port(), "GEMINI_API_KEY": "k", "GEMINI_BASE_URL": gemini.url}
        values["DATABASE_URL"] = f"sqlite:///{tmp_path}/a.db"
        program = await stack.enter_async_context(started(tmp_path, **values))
        server = cast(Server, program)  # of which a visit needs no more than the address
        visit = await stack.enter_async_context(visiting(browser, server, clock=True, network_errors=True))

        async def until_asked(times: int) -> None:
            await until(lambda: len(gemini.requests) == times)

        await visit.write(CANARY)
        for kill in range(1, kills + 1):
            await until_asked(kill)
            if answer is not silence:
                await expect(visit["#reply .spoken"]).to_have_text("반쯤 ")
            program.process.kill()
            await program.process.wait()
            await expect(visit["#connection"]).to_have_attribute("data-state", "disconnected")
            program = await stack.enter_async_context(started(tmp_path, **values))
            async with asyncio.timeout(PATIENCE):
                while await visit["#connection"].get_attribute("data-state") != "connected":
                    await visit.run(1_000)
            await expect(visit["#problem"]).to_be_hidden()
            await visit.run(20_000)
        turns = []
        if kills == 1:
            await expect(visit["#reply .spoken"]).to_have_text("네, 듣고 있어요.")
            await expect(visit["#generating"]).to_be_hidden()
            await expect(visit["#problem"]).to_be_hidden()
            await expect(visit["#field"]).to_have_value("")
            turns = [(CANARY, "네, 듣고 있어요.", START * 1000)]
        else:
            await expect(visit["#problem .sentence"]).to_have_text("답을 받지 못했습니다. 한 번 더 보내 주세요.")
            await expect(visit["#field"]).to_have_value(CANARY)
        with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as database:
            rows = database.execute("SELECT user_message, ai_response, timestamp FROM conversations").fetchall()
        assert rows == turns
        assert len(gemini.requests) == 2


async def test_erasing_while_a_lost_request_is_waited_for_leaves_nothing_behind(
    still: Visit, counsellor: ScriptedCounsellor
) -> None:
    await lose_a_request(still, counsellor)
    erased = await still.session_id()
    await still["#open-history"].click()
    await still["#erase"].click()
    await still["#erase-now"].click()
    await expect(still["#history-note"]).to_have_text("대화를 모두 지웠습니다.")
    assert await still.page.evaluate("connection !== 'connected' || session !== null")
    await still.until(f"connection === 'connected' && session.id !== '{erased}'", True)
    await still.run(20_000)  # no error in the console, which every test looks for
    await expect(still["#problem"]).to_be_hidden()
    await expect(still["#field"]).to_have_value("")


async def test_erasing_while_the_server_is_away_is_refused_in_words(browser: Browser, tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as first:
        server = await first.enter_async_context(serve(make_settings(f"sqlite:///{tmp_path}/a.db"), Demo()))
        async with visiting(browser, server, network_errors=True) as visit:
            await first.aclose()
            await expect(visit["#connection"]).to_have_text("다시 연결하는 중")
            await visit.page.evaluate("() => { session = null; }")  # as after a handshake that was refused
            await visit["#open-history"].click()
            await expect(visit["#history-note"]).to_have_text("서버에 연결할 수 없습니다")
            await visit["#erase"].click()
            await visit["#erase-now"].click()
            await expect(visit["#history-note"]).to_have_text("서버에 연결할 수 없습니다")
            await expect(visit["#confirm-erase"]).to_be_visible()


async def test_two_tries_to_connect_at_once_open_one_socket(visit: Visit) -> None:
    opened: list[Any] = []
    visit.page.on("websocket", lambda socket: opened.append(socket))
    await visit.page.evaluate("() => { disconnect(); connect(); connect(); }")
    await visit.until("socket?.readyState", 1)
    await visit.write(CANARY)
    await expect(visit["#reply .spoken"]).to_have_text(f"들은 말: {CANARY}")
    assert len(opened) == 1


async def test_the_page_pings_every_15_seconds_and_gives_up_on_silence_after_45(
    browser: Browser, server: Server
) -> None:
    async with visiting(browser, server, clock=True) as visit:
        sent: list[str] = []
        opened = []

        def count(socket: Any) -> None:
            opened.append(socket)
            socket.on("framesent", lambda payload: sent.append(str(payload)))

        visit.page.on("websocket", count)
        await visit.page.reload()
        await expect(visit["#connection"]).to_have_text("연결됨")
        for pings in (1, 2, 3, 4, 5):
            await visit.run(15_000)
            await visit.count(sent, pings)
        assert all('"ping"' in frame for frame in sent)
        assert len(opened) == 1  # pongs came
        await visit.page.evaluate("WebSocket.prototype.send = () => {}")  # nothing arrives, so nothing is answered
        await visit.run(45_000)
        await expect(visit["#connection"]).to_have_text("연결됨")
        await visit.run(15_000)
        await expect(visit["#connection"]).to_have_text("다시 연결하는 중")


async def test_tries_to_connect_come_at_growing_jittered_pauses(browser: Browser, tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as first:
        server = await first.enter_async_context(serve(make_settings(f"sqlite:///{tmp_path}/a.db"), Demo()))
        async with visiting(browser, server, clock=True, network_errors=True) as visit:
            await visit.page.evaluate(
                "() => { const plain = setTimeout; window.pauses = [];"
                " Math.random = () => [0, 0.5, 1][pauses.length % 3];"
                " window.setTimeout = (action, ms, ...rest) => {"
                " if (action === connect) pauses.push(ms); return plain(action, ms, ...rest); }; }"
            )
            await first.aclose()
            for tries in range(1, 8):
                await visit.until("pauses.length", tries)
                await visit.run(round((await visit.page.evaluate("pauses"))[-1]))
            pauses = (await visit.page.evaluate("pauses"))[:7]
    assert pauses == [750, 2_000, 5_000, 6_000, 16_000, 37_500, 22_500]


# The conversation so far


async def test_the_conversation_is_there_after_a_reload(visit: Visit) -> None:
    await visit["input[value=sad]"].check()
    await visit.write("새로고침 전에 한 말")
    await expect(visit["#reply .spoken"]).to_have_text("들은 말: 새로고침 전에 한 말")
    await expect(visit["#generating"]).to_be_hidden()
    await visit.page.reload()
    await expect(visit["#connection"]).to_have_text("연결됨")
    await visit["#open-history"].click()
    await expect(visit["dialog .mine"]).to_have_text(["새로고침 전에 한 말"])
    await expect(visit["dialog .theirs"]).to_have_text(["들은 말: 새로고침 전에 한 말"])
    await expect(visit["dialog .badge"]).to_have_text(["슬픔"])
    await visit["#close-history"].click()
    await expect(visit["dialog"]).to_be_hidden()


async def test_a_reply_goes_on_over_a_reload(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect().say("새로고침 전의 말. ")
    await visit.write(CANARY)
    await expect(visit["#reply .spoken"]).to_have_text("새로고침 전의 말.")
    await visit.page.reload()
    await expect(visit["#reply .spoken"]).to_have_text("새로고침 전의 말.")
    talk.say("그 뒤의 말.").end()
    await expect(visit["#reply .spoken"]).to_have_text("새로고침 전의 말. 그 뒤의 말.")
    await expect(visit["#generating"]).to_be_hidden()


async def test_earlier_turns_are_a_page_away(visit: Visit) -> None:
    session_id = await visit.session_id()
    for number in range(1, 54):
        await visit.server.storage.add_turn(session_id, NewTurn(f"{number}번째 말", "답", None, number))
    await visit["#open-history"].click()
    await expect(visit["dialog .mine"]).to_have_count(50)
    await visit["#older"].click()
    await expect(visit["dialog .mine"]).to_have_text([f"{number}번째 말" for number in range(1, 54)])
    await expect(visit["#older"]).to_be_hidden()


async def test_erasing_asks_first_and_leaves_nothing(visit: Visit) -> None:
    await visit.write(CANARY)
    await expect(visit["#reply .spoken"]).to_have_text(f"들은 말: {CANARY}")
    await expect(visit["#generating"]).to_be_hidden()
    erased = await visit.session_id()
    await visit["#open-history"].click()
    await visit["#erase"].click()
    await visit["#keep"].click()
    await expect(visit["#confirm-erase"]).to_be_hidden()
    await expect(visit["dialog .mine"]).to_have_count(1)
    await visit["#erase"].click()
    await visit["#erase-now"].click()
    await expect(visit["#history-note"]).to_have_text("대화를 모두 지웠습니다.")
    await expect(visit["dialog .mine"]).to_have_count(0)
    assert not await visit.server.rows(erased)
    await visit["#close-history"].click()
    await expect(visit["#connection"]).to_have_text("연결됨")
    assert await visit.session_id() != erased
    await visit.write("처음부터 다시 하는 말")
    await expect(visit["#reply .spoken"]).to_have_text("들은 말: 처음부터 다시 하는 말")


async def test_after_erasing_it_says_that_it_connects_until_it_has(visit: Visit) -> None:
    connect = asyncio.Event()

    async def wait(route: Route) -> None:
        await connect.wait()
        await route.continue_()

    await visit.page.route("**/health", wait)
    await visit["#open-history"].click()
    await visit["#erase"].click()
    await visit["#erase-now"].click()
    await expect(visit["#history-note"]).to_have_text("대화를 모두 지웠습니다.")
    await expect(visit["#connection"]).to_have_text("연결하는 중")
    await visit["#close-history"].click()
    await visit.write("연결을 기다리는 말")
    await expect(visit["#problem .sentence"]).to_have_text("서버에 연결되지 않았습니다. 연결되면 바로 보내겠습니다.")
    await expect(visit["#connection"]).to_have_text("연결하는 중")
    connect.set()
    await expect(visit["#connection"]).to_have_text("연결됨")
    await expect(visit["#reply .spoken"]).to_have_text("들은 말: 연결을 기다리는 말")


async def test_with_tokens_everything_goes_on_as_before(browser: Browser, tmp_path: Path) -> None:
    secret = {"JWT_SECRET_KEY": "0123456789abcdef" * 2, "REQUIRE_SESSION_TOKEN": 1, "AUTO_CREATE_SESSIONS": 0}
    settings = make_settings(f"sqlite:///{tmp_path}/a.db", **secret)
    async with serve(settings, ScriptedCounsellor()) as server, visiting(browser, server) as visit:
        await visit.write(CANARY)
        await expect(visit["#reply .spoken"]).to_have_text(f"들은 말: {CANARY}")
        await expect(visit["#generating"]).to_be_hidden()
        await visit.page.reload()
        await expect(visit["#connection"]).to_have_text("연결됨")
        await visit["#open-history"].click()
        await expect(visit["dialog .mine"]).to_have_text([CANARY])
        await visit["#erase"].click()
        await visit["#erase-now"].click()
        await expect(visit["#history-note"]).to_have_text("대화를 모두 지웠습니다.")


async def test_a_session_whose_token_is_refused_is_made_anew(browser: Browser, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    secrets = [{"JWT_SECRET_KEY": letter * 32, "REQUIRE_SESSION_TOKEN": 1} for letter in "ab"]
    async with contextlib.AsyncExitStack() as first:
        server = await first.enter_async_context(serve(make_settings(url, **secrets[0]), ScriptedCounsellor()))
        async with visiting(browser, server, network_errors=True) as visit:
            refused = await visit.session_id()
            await first.aclose()
            async with serve(make_settings(url, **secrets[1]), ScriptedCounsellor(), port=server.address[1]):
                await visit.until("connection === 'connected' && session.id !== " + repr(refused), True)
                await visit.write(CANARY)
                await expect(visit["#reply .spoken"]).to_have_text(f"들은 말: {CANARY}")


# Voice in


async def test_without_speech_recognition_there_is_a_text_field(browser: Browser, server: Server) -> None:
    async with visiting(browser, server) as visit:
        await visit.context.add_init_script("window.webkitSpeechRecognition = undefined")
        await visit.page.reload()
        await expect(visit["#microphone"]).to_be_hidden()
        await visit.write(CANARY)
        await expect(visit["#reply .spoken"]).to_have_text(f"들은 말: {CANARY}")


@pytest.mark.parametrize("error", ["not-allowed", "service-not-allowed", "audio-capture"])
async def test_without_a_microphone_the_text_field_takes_over(visit: Visit, error: str) -> None:
    await visit["#microphone"].click()
    await visit.page.evaluate(f"ear.fail('{error}')")
    await expect(visit["#problem .sentence"]).to_have_text("마이크를 쓸 수 없습니다. 아래에 글로 적어 주세요.")
    await expect(visit["#field"]).to_be_focused()
    await expect(visit["#microphone"]).to_have_attribute("aria-pressed", "false")


async def test_silence_is_said_and_costs_nothing(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    await visit["#microphone"].click()
    await visit.page.evaluate("ear.fail('no-speech')")
    await expect(visit["#problem .sentence"]).to_have_text("잘 듣지 못했습니다. 다시 말씀해 주세요.")
    assert not counsellor.prompts


async def test_pressing_again_sends_what_was_heard_so_far(visit: Visit) -> None:
    await visit["#microphone"].click()
    await visit.page.evaluate("ear.hear('오늘은 비가 왔어요')")
    await visit["#microphone"].click()
    await expect(visit["#reply .spoken"]).to_have_text("들은 말: 오늘은 비가 왔어요")


# Camera


async def test_the_camera_is_the_background_if_the_person_allows_it(browser: Browser, server: Server) -> None:
    async with visiting(browser, server, permissions=["camera"]) as visit:
        await expect(visit["#camera"]).to_be_hidden()
        await visit["#use-camera"].click()
        await expect(visit["#camera"]).to_be_visible()
        await visit.until("document.getElementById('camera').videoWidth > 0", True)
        await visit["#use-camera"].click()
        await expect(visit["#camera"]).to_be_hidden()
        assert await visit.page.evaluate("document.getElementById('camera').srcObject") is None


async def test_a_camera_that_is_refused_is_said(visit: Visit) -> None:
    await visit.page.evaluate(
        "() => { navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', 'NotAllowedError')); }"
    )
    await visit["#use-camera"].click()
    await expect(visit["#problem .sentence"]).to_have_text("카메라를 쓸 수 없습니다.")
    await expect(visit["#use-camera"]).to_have_attribute("aria-pressed", "false")


# Honesty and care


async def test_the_page_says_that_it_is_an_ai_and_who_answers(browser: Browser, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    async with serve(make_settings(url), Demo()) as server, visiting(browser, server) as visit:
        await expect(visit["#honesty"]).to_have_text(
            "사람이 아니라 인공지능이 답합니다. 체험 모드: 미리 준비한 문장으로 답합니다."
        )
    settings = make_settings(url, GEMINI_API_KEY="k", DEMO_MODE=0)
    async with serve(settings, make_counsellor(settings)) as server, visiting(browser, server) as visit:
        await expect(visit["#honesty"]).to_have_text("사람이 아니라 인공지능이 답합니다.")
        await expect(visit["#privacy"]).to_contain_text("Google Gemini로 전달됩니다")


@pytest.mark.parametrize(("width", "height"), [(320, 568), (390, 844), (1280, 800)])
async def test_109_and_119_are_always_in_sight_and_call(
    browser: Browser, server: Server, counsellor: ScriptedCounsellor, width: int, height: int
) -> None:
    counsellor.expect().say("긴 대답입니다. " * 60)
    async with visiting(browser, server, viewport={"width": width, "height": height}) as visit:

        async def check(place: str) -> None:
            for address, label in (("tel:109", "109"), ("sms:109", "문자 109"), ("tel:119", "119")):
                link = visit[f"{place} .care > p > a[href='{address}']"]
                await expect(link).to_be_in_viewport(ratio=1)
                await expect(link).to_have_text(label)
            assert await visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")

        await check("header")
        await visit.write("가" * 300)
        await expect(visit["#reply .spoken"]).to_contain_text("긴 대답입니다.")
        await check("header")
        await expect(visit["#field"]).to_be_in_viewport(ratio=1)
        await visit["#stop"].click()
        await until(lambda: not any(session.worker for session in server.sessions))
        await visit["#open-history"].click()
        await expect(visit["dialog .mine"]).to_have_count(1)
        await check("dialog")


@pytest.mark.parametrize("width", [320, 1280])
async def test_other_numbers_are_in_a_fold_with_a_word_on_when(browser: Browser, server: Server, width: int) -> None:
    async with visiting(browser, server, viewport={"width": width, "height": 568}) as visit:
        for place in ("header", "dialog"):
            if place == "dialog":
                await visit["#open-history"].click()
            for number, when in (("1388", "청소년"), ("112", "폭력"), ("119", "목숨")):
                line = visit[f"{place} .care li:has(a[href='tel:{number}'])"]
                await expect(line).to_be_hidden()
                await visit[f"{place} summary"].click()
                await expect(line).to_be_in_viewport(ratio=1)
                await expect(line).to_have_text(re.compile(f"^{number}.*{when}"))
                await visit[f"{place} summary"].click()
        assert await visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_109_is_shown_without_its_spelling_and_read_by_it(still: Visit, counsellor: ScriptedCounsellor) -> None:
    counsellor.expect().say("곁에 누가 있나요?").end()
    await still.write("요즘 너무 힘들어서 죽고 싶어요")
    await expect(still["#generating"]).to_be_hidden()
    await expect(still["#reply .spoken"]).to_contain_text("자살예방 상담전화 109로 전화해 주세요.")
    await expect(still["#reply .spoken"]).to_contain_text("119에 전화해 주세요. 곁에 누가 있나요?")
    await expect(still["#reply .spoken"]).not_to_contain_text("일공구")
    async with asyncio.timeout(PATIENCE):
        while "곁에 누가 있나요?" not in await still.spoken():
            await still.end_utterance()
    assert "자살예방 상담전화 일공구로 전화해 주세요." in await still.spoken()
    assert "당장 위험하다면 일일구에 전화해 주세요." in await still.spoken()
    await still["#open-history"].click()
    await expect(still["dialog .theirs"]).to_contain_text("자살예방 상담전화 109로 전화해 주세요.")


@pytest.mark.parametrize(
    ("written", "shown", "aloud"),
    [
        ("109, 일공구로 전화해요", "109로 전화해요", "일공구로 전화해요"),
        ("109(일공구)로 전화해요", "109로 전화해요", "일공구로 전화해요"),
        ("109번, 일공구번으로 전화해요", "109번으로 전화해요", "일공구번으로 전화해요"),
        ("1388이나 112, 1366", "1388이나 112, 1366", "일삼팔팔이나 일일이, 일삼육육"),
        ("119명, 1,090원, 2109호", "119명, 1,090원, 2109호", "119명, 1,090원, 2109호"),
    ],
)
async def test_numbers_of_helplines_are_read_digit_by_digit(visit: Visit, written: str, shown: str, aloud: str) -> None:
    assert await visit.page.evaluate("words => [shown(words), aloud(words)]", written) == [shown, aloud]


# For everyone


async def test_no_button_needs_a_font_for_emoji(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    empty = (
        "[...document.querySelectorAll('button, summary, a')].filter((element) => element.checkVisibility()"
        " && !element.innerText.trim() && !element.querySelector('svg')?.getBoundingClientRect().width)"
        ".map(({ outerHTML }) => outerHTML)"
    )
    assert not re.search(EMOJI, PAGE.read_text(encoding="utf-8"))
    counsellor.expect().say("첫 문장이에요. ")
    for press in (None, "#language", "#microphone", "#microphone", "#language", "#open-history", "#erase"):
        if press:
            await visit[press].click()
        else:
            await visit.write(CANARY)
            await expect(visit["#stop"]).to_be_visible()
        assert await visit.page.evaluate(empty) == []
        assert not re.search(EMOJI, await visit["body"].inner_text())
    for icon in ("use-camera", "use-voice", "microphone"):
        path = visit[f"#{icon} svg"]
        box = await path.bounding_box()
        assert box
        assert box["width"] > 15
        assert await visit.page.evaluate(f"document.querySelector('#{icon} use').getBBox().width") > 10


async def test_markup_is_shown_as_text(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    markup = "<img src=x onerror='window.broken=1'><b>굵게</b>"
    counsellor.expect().say(markup).end()
    await visit.write(markup)
    await expect(visit["#said .spoken"]).to_have_text(markup)
    await expect(visit["#reply .spoken"]).to_have_text(markup)
    await expect(visit["#generating"]).to_be_hidden()
    await visit["#open-history"].click()
    await expect(visit["dialog .mine"]).to_have_text([markup])
    await expect(visit["dialog .theirs"]).to_have_text([markup])
    assert await visit.page.evaluate("window.broken") is None
    assert await visit["main img, dialog img, main b"].count() == 0


async def test_everything_can_be_done_by_keyboard(visit: Visit) -> None:
    press = visit.page.keyboard.press
    focused = "(({ id, name, type, attributes, tagName }) => id || name || attributes.href?.value || type || tagName)"
    order = []
    for _ in range(12):
        await press("Tab")
        order.append(await visit.page.evaluate(f"{focused}(document.activeElement)"))
    header = ["open-history", "use-camera", "use-voice", "language", "tel:109", "sms:109", "tel:119", "SUMMARY"]
    assert order == [*header, "emotion", "microphone", "field", "submit"]
    await visit["input[name=emotion]:checked"].focus()
    await press("ArrowRight")
    await press("ArrowRight")
    await expect(visit["label:has(:checked)"]).to_have_text("슬픔")
    await press("Tab")
    await press("Tab")
    await visit.page.keyboard.type("자판으로만 하는 말")
    hear("자판으로만 하는 말")
    await press("Enter")
    await expect(visit["#said .badge"]).to_have_text("슬픔")
    await expect(visit["#reply .spoken"]).to_have_text("들은 말: 자판으로만 하는 말")
    await expect(visit["#generating"]).to_be_hidden()
    await visit["#open-history"].focus()
    await press("Enter")
    await expect(visit["dialog .mine"]).to_have_count(1)
    await visit["#erase"].focus()
    await press("Space")
    await expect(visit["#keep"]).to_be_focused()
    await press("Enter")
    await expect(visit["#erase"]).to_be_focused()
    await press("Escape")
    await expect(visit["dialog"]).to_be_hidden()
    await expect(visit["#open-history"]).to_be_focused()


async def test_a_screen_reader_hears_a_reply_once_and_whole(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    await visit["#use-voice"].click()
    await visit.page.evaluate(
        "() => { window.heard = []; for (const element of document.querySelectorAll('[role=log], [role=alert]'))"
        " new MutationObserver(() => heard.push(element.textContent)).observe(element,"
        " { childList: true, characterData: true, subtree: true }); }"
    )
    talk = counsellor.expect()
    await visit.write(CANARY)
    for piece in ("여러 ", "조각으로 ", "오는 ", "대답입니다."):
        talk.say(piece)
        await expect(visit["#reply .spoken"]).to_contain_text(piece.strip())
    assert await visit.page.evaluate("heard") == []
    talk.end()
    await expect(visit["#announcer"]).to_have_text("여러 조각으로 오는 대답입니다.")
    assert await visit.page.evaluate("heard") == ["여러 조각으로 오는 대답입니다."]


async def test_the_page_speaks_english_too(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    assert await visit["html"].get_attribute("lang") == "ko"
    await visit["#language"].click()
    assert await visit["html"].get_attribute("lang") == "en"
    await expect(visit["#microphone"]).to_have_text("Speak")
    await expect(visit["#connection"]).to_have_text("Connected")
    counsellor.expect().fail(RuntimeError("x"))
    await visit.write(CANARY)
    await expect(visit["#problem .sentence"]).to_have_text("The AI service is not available for the moment")
    assert await visit["#reply .spoken"].get_attribute("lang") == "ko"
    await visit.page.reload()
    await expect(visit["#microphone"]).to_have_text("Speak")
    visible = await visit["body"].inner_text()
    assert re.findall("[가-힣]+", visible) == ["한국어"]
    await visit["#language"].click()
    await expect(visit["#microphone"]).to_have_text("말하기")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("language", ["ko", "en"])
@pytest.mark.parametrize("width", [320, 1280])
async def test_axe_finds_no_violation_in_any_state(
    browser: Browser, server: Server, counsellor: ScriptedCounsellor, scheme: str, language: str, width: int
) -> None:
    options: dict[str, Any] = {
        "color_scheme": scheme,
        "viewport": {"width": width, "height": 700},
        "reduced_motion": "reduce",
    }
    async with visiting(browser, server, **options) as visit:

        async def check(state: str) -> None:
            results = await Axe().run(visit.page)
            assert results.violations_count == 0, f"{state}: {results.generate_report()}"

        if language == "en":
            await visit["#language"].click()
        await check("welcome")
        await visit["header summary"].click()
        await check("other numbers")
        talk = counsellor.expect().say("첫 문장이에요. " * 30)
        await visit["input[value=angry]"].check()
        await visit.write(CANARY)
        await expect(visit["#playing"]).to_be_visible()
        await check("a reply")
        await visit["#microphone"].click()
        await visit.page.evaluate("ear.hear('듣고 있는 말')")
        await check("listening")
        await visit.page.evaluate("ear.fail('audio-capture')")
        await expect(visit["#problem"]).to_be_visible()
        await check("a problem")
        await talk.closed.wait()
        await until(lambda: not any(session.worker for session in server.sessions))
        await visit["#open-history"].click()
        await expect(visit["dialog .mine"]).not_to_have_count(0)
        await visit["#erase"].click()
        await visit["dialog summary"].click()
        await check("the conversation")


async def test_reduced_motion_is_respected(browser: Browser, server: Server) -> None:
    async with visiting(browser, server, reduced_motion="reduce") as visit:
        await visit["#microphone"].click()
        await visit.write(CANARY)
        running = await visit.page.evaluate("document.getAnimations().length")
        assert running == 0


async def test_the_page_is_short_and_loads_nothing() -> None:
    source = PAGE.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 720
    assert max(map(len, source.splitlines())) <= 150
    assert not re.search(r"https?://|src=|@import|url\(|innerHTML|style=", source)

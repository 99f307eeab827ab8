"""The page: its first screen, numbers, the conversations of the past, any screen, and everyone."""

import re
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]
from page import ROOT, Visit, browser_fixture, rules_fixture, site_fixture, visit_fixture, visiting  # noqa: F401
from playwright.async_api import Browser, Page, expect
from support import CANARY, ScriptedCounsellor, Server, hear, make_settings, serve

from bemore.demo import Demo
from bemore.storage import NewTurn

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELPLINE = "많이 힘드셨겠어요. 109, 일공구로 전화하거나 문자를 보내 주세요. 당장 위험하면 119나 112에 전화해 주세요. "


# The first screen


async def test_the_first_screen_is_one_card_and_one_button(browser: Browser, site: Server) -> None:
    async with visiting(browser, site, first_screen=True) as visit:
        await expect(visit["h1"]).to_have_text("BeMore 마음 상담")
        await expect(visit["#about h2"]).to_have_text("안녕하세요. 오늘 마음은 어떠세요?")
        await expect(visit[".card li"]).to_have_count(5)
        for who_what_whom in ("생성형 AI", "이 서버에 저장", "성인", "109", "119"):
            await expect(visit[".card"]).to_contain_text(who_what_whom)
        await expect(visit["button:visible"]).to_have_text(["시작하기"])
        await expect(visit["#begin"]).to_be_in_viewport(ratio=1)
        assert not [url for url in visit.requests if "/api/" in url or "/ws/" in url]  # nothing before the tap
        await visit["#begin"].click()
        await visit.state("연결됨")
        await expect(visit["#hint"]).to_contain_text("답은 소리로도 들려 드립니다.")
        await visit.page.reload()
        await visit.state("연결됨")
        await expect(visit["#begin"]).to_be_hidden()
        await visit["#open-about"].click()
        await expect(visit["dialog .card li"]).to_have_count(5)
        await expect(visit["dialog .card"]).to_be_in_viewport(ratio=1)


GEMINI = "답을 만들기 위해 말씀하신 내용을 Google Gemini로 보냅니다."
FACTS = {
    ("gemini", "0", ""): ("생성형 AI가", "지울 수 있습니다.", GEMINI),
    ("demo", "30", "https://example.org/n"): (
        "체험 모드",
        "마지막 대화에서 30일이 지나면 지워집니다.",
        "AI 회사로 보내지 않습니다.",
    ),
    ("openai", "7", ""): ("생성형 AI가", "7일이 지나면", "운영자가 정한 AI 모델(llama)로 보냅니다."),
}


@pytest.mark.parametrize("facts", FACTS)
async def test_the_card_says_what_the_server_says(rules: Page, facts: tuple[str, str, str]) -> None:
    answers, days, url = facts
    data = {"answers": answers, "model": "llama", "keepDays": days, "noticeUrl": url}
    await rules.evaluate("data => { Object.assign(document.body.dataset, data); showFacts(); }", data)
    for place, words in zip(("#who", "#kept", "#sent"), FACTS[facts], strict=True):
        await expect(rules.locator(place)).to_contain_text(words)
    await expect(rules.locator("#sent")).to_contain_text("음성은 브라우저 제조사의 서버로")
    link = rules.locator("#operator a")
    await expect(link).to_be_visible(visible=bool(url))
    if url:
        await expect(link).to_have_attribute("href", url)


async def test_the_demo_says_so(browser: Browser, tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    async with serve(settings, Demo()) as site, visiting(browser, site, first_screen=True) as visit:
        await expect(visit["#who"]).to_contain_text("체험 모드")
        await visit["#begin"].click()
        await visit.write("오늘은 비가 왔어요")
        await expect(visit[".label"]).to_have_text("체험용 답", timeout=20_000)


async def test_the_files_load_nothing_from_elsewhere() -> None:
    page, style, script = ((ROOT / f"demo.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    assert page.count("<body") == 1
    for part in (
        "<title>",
        '"description"',
        '"theme-color"',
        'rel="icon" href="data:image/svg+xml,',
        "interactive-widget",
    ):
        assert part in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|style=|<script>|<style>", page)
    assert not re.search(r"@import|url\(", style)
    assert not re.search(r"innerHTML|import\(|eval\(", script)
    assert max(map(len, script.splitlines())) <= 150


# Numbers


@pytest.mark.parametrize(("width", "height"), [(320, 568), (390, 844), (844, 390), (1280, 800)])
async def test_109_and_119_are_in_reach_on_any_screen(
    browser: Browser, site: Server, counsellor: ScriptedCounsellor, width: int, height: int
) -> None:
    async with visiting(browser, site, viewport={"width": width, "height": height}) as visit:
        counsellor.expect().say("긴 대답입니다. " * 60).end()

        async def check(place: str) -> None:
            for address, label in (("tel:109", "109"), ("sms:109", "문자 109"), ("tel:119", "119")):
                link = visit[f"{place} > p > a[href='{address}']"]
                await expect(link).to_have_text(label)
                await link.scroll_into_view_if_needed()
                await expect(link).to_be_in_viewport(ratio=1)
            assert await visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")

        await visit.write("가" * 300)
        await visit.replied("긴 대답입니다. " * 60)
        await expect(visit["body > .care a[href='tel:109']"]).to_be_in_viewport(ratio=1)
        await check("body > .care")
        await visit["#field"].scroll_into_view_if_needed()
        await expect(visit["#field"]).to_be_in_viewport(ratio=1)
        await visit["#open-history"].click()
        await check("#history .care")
        await visit["#close-history"].click()
        await visit["#open-about"].click()
        await check("#about-dialog .care")


async def test_other_numbers_are_in_a_fold_with_a_word_on_when(visit: Visit) -> None:
    when = {"15770199": "정신건강", "1366": "가정폭력", "1388": "청소년", "117": "학교폭력", "112": "위협"}
    assert await visit["body > .care a"].evaluate_all("links => links.map(({ href }) => href)") == [
        *("tel:109", "sms:109", "tel:119"),
        *(f"tel:{number}" for number in when),
    ]
    for number, word in when.items():
        line = visit[f"body > .care li:has(a[href='tel:{number}'])"]
        await expect(line).to_be_hidden()
        await visit["body > .care summary"].click()
        await expect(line).to_be_in_viewport(ratio=1)
        await expect(line).to_contain_text(word)
        await visit["body > .care summary"].click()


async def test_numbers_of_a_reply_are_links_and_buttons_beside_it(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect().say(HELPLINE)
    await visit.write(CANARY)
    buttons = visit[".calls a"]
    await expect(buttons).to_have_text(["109 전화", "109 문자", "119 전화", "112 전화"])
    hrefs = "links => links.map((link) => link.getAttribute('href'))"
    assert await buttons.evaluate_all(hrefs) == ["tel:109", "sms:109", "tel:119", "tel:112"]
    await buttons.first.focus()
    talk.say("지금 곁에 누가 있나요? 1577-0199도 있어요.").end()
    await expect(buttons).to_have_count(5)
    assert await visit[".theirs a"].evaluate_all(hrefs) == ["tel:109", "tel:119", "tel:112", "tel:15770199"]
    await visit.write("그다음에 하는 말")
    await visit.replied("들은 말: 그다음에 하는 말")
    await expect(buttons).to_have_count(5)  # for as long as the turn stays
    await visit.page.reload()
    await expect(buttons).to_have_count(5)


# The conversations of the past


async def test_the_past_opens_at_its_newest_and_goes_back_by_pages(visit: Visit, site: Server) -> None:
    session_id = await visit.session_id()
    for number in range(1, 54):
        await site.storage.add_turn(session_id, NewTurn(f"{number}번째 말", "**답**", "sad", number))
    await visit["#open-history"].click()
    await expect(visit["dialog .mine"]).to_have_count(50)
    await expect(visit["dialog .mine"].last).to_be_in_viewport(ratio=1)
    await expect(visit["dialog .theirs"].last).to_have_text("답")
    await expect(visit["dialog .badge"].last).to_have_text("슬픔")
    await visit["#older"].click()
    await expect(visit["dialog .mine .words"]).to_have_text([f"{number}번째 말" for number in range(1, 54)])
    await expect(visit["#older"]).to_be_hidden()


async def test_the_past_is_saved_as_a_text_that_names_the_ai(visit: Visit, site: Server) -> None:
    session_id = await visit.session_id()
    for number in range(1, 252):
        await site.storage.add_turn(session_id, NewTurn(f"{number}번째 말", f"**{number}번째** 답", None, number))
    await visit["#open-history"].click()
    async with visit.page.expect_download() as saving:
        await visit["#download"].click()
    download = await saving.value
    assert re.fullmatch(r"BeMore-대화-AI가-쓴-답-\d{4}-\d\d-\d\d\.txt", download.suggested_filename)
    lines = (await download.path()).read_text(encoding="utf-8").splitlines()
    assert lines[1] == "‘AI’의 답은 사람이 아니라 생성형 AI(scripted)가 쓴 것입니다."
    assert [line for line in lines if line.startswith("나: ")] == [f"나: {number}번째 말" for number in range(1, 252)]
    assert [line for line in lines if line.startswith("AI: ")] == [f"AI: {number}번째 답" for number in range(1, 252)]


async def test_erasing_asks_once_and_returns_to_the_first_screen(visit: Visit, site: Server) -> None:
    await visit.write(CANARY)
    await visit.replied(f"들은 말: {CANARY}")
    await visit["#field"].fill("남은 글")
    erased = await visit.session_id()
    await visit["#open-history"].click()
    await visit["#erase"].click()
    await expect(visit["#confirm-erase"]).to_contain_text("되돌릴 수 없고, 다른 창의 대화도 함께 닫힙니다.")
    await visit["#keep"].click()
    await expect(visit["#confirm-erase"]).to_be_hidden()
    await expect(visit["dialog .mine"]).to_have_count(1)
    await visit["#erase"].click()
    await visit["#erase-now"].click()
    await expect(visit["#first-note"]).to_have_text("대화를 모두 지웠습니다.")
    await expect(visit["#begin"]).to_be_focused()
    await expect(visit["#begin"]).to_be_in_viewport(ratio=1)
    await expect(visit[".turn"]).to_have_count(0)  # nor behind the closed dialog
    assert not await site.rows(erased)
    stored = "JSON.stringify([Object.entries(localStorage), Object.entries(sessionStorage)])"
    assert erased not in await visit.page.evaluate(stored)
    assert "남은 글" not in await visit.page.evaluate(stored)
    await visit["#begin"].click()
    await visit.write("처음부터 다시 하는 말")
    await visit.replied("들은 말: 처음부터 다시 하는 말")
    assert await visit.session_id() != erased


# Any screen, and everyone


@pytest.mark.parametrize(("width", "height"), [(844, 390), (390, 420), (640, 400)])
async def test_a_low_screen_is_one_scrolling_column(browser: Browser, site: Server, width: int, height: int) -> None:
    """Landscape, an open keyboard, 200 % zoom on a desktop."""
    async with visiting(browser, site, viewport={"width": width, "height": height}) as visit:
        for number in range(4):
            await visit.write(f"{number}번째로 하는 말")
            await visit.replied(f"들은 말: {number}번째로 하는 말")
        assert await visit.page.evaluate("getComputedStyle(document.querySelector('main')).overflowY") == "visible"
        await expect(visit["#field"]).to_be_in_viewport(ratio=1)
        await expect(visit[".turn:last-child .theirs"]).to_be_in_viewport(ratio=1)
        await expect(visit["body > .care a[href='tel:119']"]).to_be_in_viewport(ratio=1)
        await visit["header"].scroll_into_view_if_needed()
        await expect(visit["#open-about"]).to_be_in_viewport(ratio=1)


async def test_an_open_keyboard_keeps_the_newest_words_in_sight(visit: Visit) -> None:
    for number in range(8):
        await visit.write(f"{number}번째로 하는 말")
        await visit.replied(f"들은 말: {number}번째로 하는 말")
    await visit["#field"].focus()
    await visit.page.set_viewport_size({"width": 390, "height": 600})
    await expect(visit["#field"]).to_be_in_viewport(ratio=1)
    await expect(visit[".turn:last-child .theirs"]).to_be_in_viewport(ratio=1)
    await expect(visit["body > .care a[href='tel:109']"]).to_be_in_viewport(ratio=1)


async def test_everything_can_be_done_by_keyboard(browser: Browser, site: Server) -> None:
    async with visiting(browser, site, first_screen=True) as visit:
        press = visit.page.keyboard.press
        focused = "(({ id, attributes, tagName }) => id || attributes.href?.value || tagName)(document.activeElement)"

        async def tab(*names: str) -> None:
            for name in names:
                await press("Tab")
                assert await visit.page.evaluate(focused) == name

        await tab("tel:109", "sms:109", "tel:119", "SUMMARY", "MAIN", "begin")
        await press("Enter")
        await visit.state("연결됨")
        await expect(visit["#microphone"]).to_be_focused()
        await press("Space")
        await visit.state("듣는 중")
        await press("Escape")
        await visit.state("연결됨")
        await tab("field")
        await visit.page.keyboard.type("자판으로만 하는 말")
        hear("자판으로만 하는 말")
        await tab("send", "feeling")
        await press("ArrowDown")
        await tab("pin", "aloud")
        await visit["#field"].focus()
        await press("Enter")
        await visit.replied("들은 말: 자판으로만 하는 말")
        await expect(visit[".badge"]).to_have_text("행복")
        await visit["#open-history"].focus()
        await press("Enter")
        await expect(visit["dialog .mine"]).to_have_count(1)
        await visit["#erase"].focus()
        await press("Space")
        await expect(visit["#keep"]).to_be_focused()
        await press("Enter")
        await expect(visit["#erase"]).to_be_focused()
        await press("Escape")
        await expect(visit["#history"]).to_be_hidden()
        await expect(visit["#open-history"]).to_be_focused()


SCREENS = {"phone": (390, 844), "desktop at 200 %": (640, 400), "desktop": (1280, 800)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
async def test_axe_finds_no_violation_in_any_state(
    browser: Browser, site: Server, counsellor: ScriptedCounsellor, scheme: str, screen: str
) -> None:
    width, height = SCREENS[screen]
    options: dict[str, Any] = {"color_scheme": scheme, "viewport": {"width": width, "height": height}}
    async with visiting(browser, site, first_screen=True, reduced_motion="reduce", **options) as visit:

        async def check(state: str) -> None:
            results = await Axe().run(visit.page)
            assert results.violations_count == 0, f"{state}: {results.generate_report()}"

        await check("the first screen")
        await visit["#begin"].click()
        await visit.state("연결됨")
        await visit["body > .care summary"].click()
        await check("other numbers")
        await visit["body > .care summary"].click()
        talk = counsellor.expect()
        await visit["#feeling"].select_option("화남")
        await visit.write("오늘은 도서관에서 책을 읽었습니다. " * 10)
        await visit.state("생각 중")
        await check("thinking")
        talk.say(HELPLINE)
        await expect(visit[".calls a"]).to_have_count(4)
        await visit.write("기다리는 말")
        await check("a reply, and words that wait")
        await visit["#stop"].click()
        await visit.replied("들은 말: 기다리는 말")
        await visit["#microphone"].click()
        await visit.page.evaluate("ear.hear('듣고 있는 말')")
        await check("listening")
        await visit.page.evaluate("ear.fail('audio-capture')")
        await expect(visit["#notice"]).not_to_be_empty()
        await check("a problem, and a reply that was stopped")
        await visit["#open-about"].click()
        await check("about")
        await visit["#close-about"].click()
        await visit["#open-history"].click()
        await expect(visit["dialog .mine"]).not_to_have_count(0)
        await visit["#erase"].click()
        await check("the past")


async def test_reduced_motion_is_respected(browser: Browser, site: Server, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    async with visiting(browser, site, reduced_motion="reduce") as visit:
        await visit.write(CANARY)
        await visit["#microphone"].click()
        await expect(visit[".coming"]).to_be_visible()
        assert await visit.page.evaluate("document.getAnimations().length") == 0
        talk.end()

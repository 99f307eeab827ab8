"""The page: a conversation, its states, what is written, and what is stopped."""

import asyncio

import pytest
from page import START, Visit, browser_fixture, site_fixture, still_fixture, visit_fixture, visiting  # noqa: F401
from playwright.async_api import Browser, expect
from support import CANARY, ScriptedCounsellor, Server, Serving, hear
from tools import PATIENCE, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

LAST = ".turn:last-child"


async def test_a_reply_goes_through_its_states(still: Visit, counsellor: ScriptedCounsellor, site: Server) -> None:
    """Listening, thinking, speaking: each is named in one place, and an answer is announced until its first text."""
    talk = counsellor.expect()
    await still["#microphone"].click()
    await still.state("듣는 중")
    await expect(still["#microphone"]).to_have_text("듣는 중 (누르면 보내기)")
    await still.page.evaluate("ear.hear('요즘 잠이')")
    await expect(still["#hearing"]).to_have_text("요즘 잠이")
    await still.page.evaluate("ear.hear('요즘 잠이 안 와요', true)")
    await still.run(2_500)
    await expect(still["#hearing"]).to_be_hidden()
    await expect(still[f"{LAST} .mine"]).to_have_text("요즘 잠이 안 와요")
    await still.state("생각 중")
    await expect(still[f"{LAST} .coming"]).to_have_text("응답 생성 중")
    talk.say("많이 힘드셨겠어요. ", "언제부터 ")
    await still.until_spoken("많이 힘드셨겠어요.")  # while the rest still streams
    await still.state("말하는 중")
    talk.say("그러셨나요?").end()
    await still.replied("많이 힘드셨겠어요. 언제부터 그러셨나요?")
    await expect(still[f"{LAST} .label"]).to_have_text("AI의 답")
    await still.end_utterance()
    await still.until_spoken("많이 힘드셨겠어요.", "언제부터 그러셨나요?")
    await still.end_utterance()
    await still.state("연결됨")
    await expect(still["#stop"]).to_be_hidden()
    assert await still.page.evaluate("[ear.lang, ear.interimResults, ear.continuous]") == ["ko-KR", True, True]
    assert await still.page.evaluate("mouth.language") == "ko-KR"
    expected = ("요즘 잠이 안 와요", "많이 힘드셨겠어요. 언제부터 그러셨나요?", None, START * 1000 + 2_500)
    assert await site.rows(await still.session_id()) == [expected]


async def test_turns_stay_and_the_newest_is_at_the_bottom(still: Visit) -> None:
    for number in range(12):
        await still.write(f"{number}번째로 하는 말")
        await still.replied(f"들은 말: {number}번째로 하는 말")
    await still.wait(60)
    await expect(still[".mine"]).to_have_text([f"{number}번째로 하는 말" for number in range(12)])
    await expect(still[f"{LAST} .theirs"]).to_be_in_viewport(ratio=1)
    tops = "[...document.querySelectorAll('.mine, .theirs')].map((bubble) => bubble.getBoundingClientRect().top)"
    positions = await still.page.evaluate(tops)
    assert positions == sorted(positions)
    await still.page.evaluate("() => { document.querySelector('main').scrollTop = 0; }")
    await expect(still[".mine"].first).to_be_in_viewport(ratio=1)


async def test_who_reads_above_is_not_pulled_down(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    for number in range(10):
        await visit.write(f"{number}번째로 하는 말")
        await visit.replied(f"들은 말: {number}번째로 하는 말")
    talk = counsellor.expect().say("첫 문장이에요. ")
    await visit.write(CANARY)
    await expect(visit[f"{LAST} .theirs"]).to_contain_text("첫 문장이에요.")
    await visit["main"].hover()
    await visit.page.mouse.wheel(0, -5000)
    await visit.until("follow.atEnd", False)
    talk.say("다음 문장이에요.").end()
    await visit.replied("첫 문장이에요. 다음 문장이에요.")
    assert await visit.page.evaluate("document.querySelector('main').scrollTop") == 0


# Several messages in a row


async def test_messages_in_a_row_are_gathered_until_a_reply_begins(
    visit: Visit, counsellor: ScriptedCounsellor, site: Server
) -> None:
    talks = [counsellor.expect() for _ in range(3)]
    messages = ["저기요", "오늘 회사에서", "많이 혼났어요"]
    for talk, message in zip(talks, messages, strict=True):
        await visit.write(message)
        async with asyncio.timeout(PATIENCE):
            await talk.asked.wait()
    assert talks[0].closed.is_set()
    talks[2].say("속상하셨겠어요.").end()
    await visit.replied("속상하셨겠어요.")
    await expect(visit[".turn"]).to_have_count(1)
    await expect(visit[".mine"]).to_have_text(messages)
    await visit.state("연결됨")
    assert [row[:2] for row in await site.rows(await visit.session_id())] == [("\n".join(messages), "속상하셨겠어요.")]


async def test_a_message_during_a_reply_waits_and_cuts_nothing(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect().say("첫 문장이에요. ")
    await visit.write(CANARY)
    await expect(visit[".theirs .words"]).to_have_text("첫 문장이에요. ")
    await visit.write("두 번째로")
    await visit.write("하는 말")
    await expect(visit[f"{LAST} .note"]).to_have_text("앞의 답이 끝나면 이어서 답합니다.")
    talk.say("둘째 문장이에요.").end()
    await visit.replied("들은 말: 두 번째로\n하는 말")
    await expect(visit[".theirs .words"].first).to_have_text("첫 문장이에요. 둘째 문장이에요.")
    await expect(visit[".note:visible"]).to_have_count(0)
    assert await visit.asked(2) == [CANARY, "두 번째로\n하는 말"]


async def test_a_reply_that_began_at_the_same_moment_stays(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    """The person adds words while the first text of a reply, here a helpline sentence, is on its way."""
    await visit.page.evaluate(
        "() => { window.plain = receive; window.late = []; receive = (frame) => late.push(frame); }"
    )
    counsellor.expect().say("109, 일공구로 전화해 주세요. ")
    await visit.write("첫 번째로 하는 말")
    await visit.until("late.some(({ type }) => type === 'ai_stream_chunk')", True)
    await visit.write("두 번째로 하는 말")
    await visit.page.evaluate("() => { receive = plain; late.forEach(receive); }")
    await visit.replied("들은 말: 첫 번째로 하는 말\n두 번째로 하는 말")
    await expect(visit[".turn"]).to_have_count(2)
    await expect(visit[".theirs .words"].first).to_have_text("109로 전화해 주세요. ")
    await expect(visit[".mine"]).to_have_text(["첫 번째로 하는 말", "두 번째로 하는 말"])


# Stopping


INTERRUPTIONS = {
    "the stop button": lambda visit: visit["#stop"].click(),
    "the microphone": lambda visit: visit["#microphone"].click(),
    "Escape": lambda visit: visit.page.keyboard.press("Escape"),
}


@pytest.mark.parametrize("way", INTERRUPTIONS)
async def test_a_reply_is_stopped_here_and_at_the_server(
    visit: Visit, counsellor: ScriptedCounsellor, way: str, site: Server
) -> None:
    talk = counsellor.expect().say("끊길 문장이에요. 그리고 ")
    await visit.speak(CANARY)
    await visit.until_spoken("끊길 문장이에요.")
    await INTERRUPTIONS[way](visit)
    assert await visit.page.evaluate("mouth.current") is None
    async with asyncio.timeout(PATIENCE):
        await talk.closed.wait()
    await expect(visit["#stop"]).to_be_hidden()
    await expect(visit[".note"].first).to_contain_text("답이 여기서 멈췄습니다.")
    await expect(visit[".theirs .words"]).to_have_text("끊길 문장이에요. 그리고 ")
    if way == "the microphone":
        await visit.page.evaluate("ear.hear('말을 바꿔 볼게요', true)")
        await visit["#microphone"].click()
    else:
        await visit.write("말을 바꿔 볼게요")
    await visit.replied("들은 말: 말을 바꿔 볼게요")
    rows = await site.rows(await visit.session_id())
    assert rows[0][1] == "끊길 문장이에요. 그리고 "
    await visit["button.again"].click()
    await visit.replied(f"들은 말: {CANARY}")


async def test_a_request_that_is_stopped_before_its_reply_says_so(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    await visit.write(CANARY)
    await until(talk.asked.is_set)
    await visit["#stop"].click()
    await expect(visit[".note"]).to_contain_text("답하기 전에 멈췄습니다.")
    await visit.state("연결됨")
    await visit["button.again"].click()
    await visit.replied(f"들은 말: {CANARY}")
    await expect(visit[".turn"]).to_have_count(1)


async def test_a_stop_without_a_connection_reaches_the_server_later(
    visit: Visit, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect().say("끊길 문장이에요. ")
    await visit.speak(CANARY)
    await visit.until_spoken("끊길 문장이에요.")
    visit.wire.down = True
    visit.wire.cut()
    await visit.state("연결 안 됨")
    await visit["#stop"].click()
    visit.wire.down = False
    async with asyncio.timeout(PATIENCE):
        await talk.closed.wait()
    await visit.write("다시 하는 말이에요.")
    await visit.replied("들은 말: 다시 하는 말이에요.")
    visit.errors.clear()  # of the connections that were refused


# Failures


async def test_a_failing_model_is_said_with_a_way_to_ask_again(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    counsellor.expect().fail(RuntimeError("x"))
    await visit.write(CANARY)
    await expect(visit[".note span"]).to_have_text("AI 서비스가 일시적으로 사용할 수 없습니다.")
    await expect(visit[".theirs"]).to_be_hidden()
    await expect(visit["#announcer"]).to_have_text("AI 서비스가 일시적으로 사용할 수 없습니다.")
    await visit["button.again"].click()
    await visit.replied(f"들은 말: {CANARY}")
    await expect(visit[".mine"]).to_have_text([CANARY])


async def test_a_reply_of_which_nothing_comes_is_given_up(still: Visit, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect()
    await still.write(CANARY)
    await talk.asked.wait()
    await still.wait(36)
    await still.state("생각 중")
    await still.wait(4)
    await expect(still[".note span"]).to_have_text("답을 받지 못했습니다.")
    talk.say("늦은 답이에요.").end()
    await still.replied("늦은 답이에요.")
    await expect(still[".mine"]).to_have_text([CANARY])
    await expect(still[".note"]).to_be_hidden()


async def test_the_rate_is_said_with_the_wait(browser: Browser, serving: Serving) -> None:
    async with serving(MAX_AI_REQUESTS_PER_MINUTE=1) as site, visiting(browser, site) as visit:
        await visit.write(CANARY)
        await visit.replied(f"들은 말: {CANARY}")
        await visit.write("곧바로 또 하는 말")
        sentence = visit[f"{LAST} .note span"]
        await expect(sentence).to_contain_text("요청 횟수가 초과되었습니다. ")
        await expect(sentence).to_contain_text("초 뒤에 다시 보낼 수 있습니다.")


async def test_a_message_that_is_too_long_comes_back_to_be_changed(visit: Visit) -> None:
    await visit.write("가" * 2001)
    await expect(visit[".note span"]).to_have_text("메시지가 너무 깁니다 (최대 2000자).")
    await expect(visit["#field"]).to_have_value("가" * 2001)


# Writing


async def test_enter_sends_but_not_while_a_syllable_is_composed(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    composing = (
        "(options) => field.dispatchEvent("
        "new KeyboardEvent('keydown', { key: 'Enter', bubbles: true, cancelable: true, ...options }))"
    )
    await visit["#field"].fill("잠이 안 와ㅇ")
    for options in ({"isComposing": True}, {"keyCode": 229}, {"shiftKey": True}):
        assert await visit.page.evaluate(composing, options)  # the key keeps its own effect
    await expect(visit["#field"]).to_have_value("잠이 안 와ㅇ")
    assert not counsellor.prompts
    await visit.write("   ")
    assert not visit.sent


async def test_the_field_grows_and_a_draft_survives_a_reload(visit: Visit) -> None:
    low = await visit["#field"].bounding_box()
    await visit["#field"].fill("한 줄\n두 줄\n세 줄")
    high = await visit["#field"].bounding_box()
    assert low
    assert high
    assert high["height"] > low["height"] + 30
    await visit.page.reload()
    await expect(visit["#field"]).to_have_value("한 줄\n두 줄\n세 줄")


async def test_own_long_words_are_folded(visit: Visit) -> None:
    long = "오늘은 도서관에서 책을 읽었습니다. " * 60
    hear(long)
    await visit.write(long)
    await visit.replied(f"들은 말: {long.strip()}")
    bubble = visit[".mine"]
    folded = await bubble.bounding_box()
    assert folded
    assert folded["height"] < 250
    await bubble.get_by_role("button", name="모두 보기").click()
    unfolded = await bubble.bounding_box()
    assert unfolded
    assert unfolded["height"] > 800
    await bubble.get_by_role("button", name="접기").click()
    assert await bubble.bounding_box() == folded


EMOTIONS = ["행복", "슬픔", "화남", "불안", "보통", "놀람", "불쾌", "두려움"]


async def test_a_feeling_goes_with_one_message_unless_it_is_pinned(
    visit: Visit, counsellor: ScriptedCounsellor
) -> None:
    keys = ["happy", "sad", "angry", "anxious", "neutral", "surprised", "disgusted", "fearful"]
    assert await visit["#feeling option"].all_inner_texts() == ["선택 안 함", *EMOTIONS]
    await expect(visit["#pin-label"]).to_be_hidden()
    for name in EMOTIONS:
        await visit["#feeling"].select_option(name)
        await visit.write(f"{name}을 느끼며 하는 말")
        await visit.replied(f"들은 말: {name}을 느끼며 하는 말")
        await expect(visit[f"{LAST} .badge"]).to_have_text(name)
        await expect(visit["#feeling"]).to_have_value("")
    await visit["#feeling"].select_option("불안")
    await visit["#pin"].check()
    for message in ("이어서 하는 말", "그리고 하는 말"):
        await visit.write(message)
        await visit.replied(f"들은 말: {message}")
    assert [prompt.emotion for prompt in counsellor.prompts] == [*keys, "anxious", "anxious"]


async def test_markup_is_shown_as_text(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    markup = "<img src=x onerror='window.broken=1'><b>굵게</b>"
    counsellor.expect().say(markup).end()
    await visit.write(markup)
    await visit.replied(markup)
    await expect(visit[".mine"]).to_have_text(markup)
    await visit["#open-history"].click()
    await expect(visit["dialog .mine"]).to_have_text([markup])
    await expect(visit["dialog .theirs"]).to_have_text([markup])
    assert await visit.page.evaluate("window.broken") is None
    assert await visit["main img, dialog img, main b"].count() == 0


# Over a reload


async def test_a_reply_goes_on_over_a_reload(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    talk = counsellor.expect().say("새로고침 전의 말. ")
    await visit.write(CANARY)
    await expect(visit[".theirs .words"]).to_have_text("새로고침 전의 말. ")
    await visit.page.reload()
    await expect(visit[".theirs .words"]).to_have_text("새로고침 전의 말. ")
    talk.say("그 뒤의 말.").end()
    await visit.replied("새로고침 전의 말. 그 뒤의 말.")
    await expect(visit[".mine"]).to_have_text([CANARY])
    assert len(counsellor.prompts) == 1


async def test_a_return_visit_shows_the_last_turns(browser: Browser, site: Server) -> None:
    async with visiting(browser, site) as visit:
        for number in range(12):
            await visit.write(f"{number}번째로 하는 말")
            await visit.replied(f"들은 말: {number}번째로 하는 말")
        again = await visit.context.new_page()
        await visit.page.close()
        visit.page = again
        await again.goto(visit.url)
        await expect(visit[".mine"]).to_have_text([f"{number}번째로 하는 말" for number in range(2, 12)])
        await expect(visit[f"{LAST} .theirs"]).to_be_in_viewport(ratio=1)
        await expect(visit["#begin"]).to_be_hidden()
        assert await visit.spoken() == []


async def test_over_the_camera_bubbles_leave(still: Visit, counsellor: ScriptedCounsellor) -> None:
    """As the user's specification says: 3 s for what was said, 1 s after the voice for the reply."""
    await still["#open-about"].click()
    await expect(still["#camera-setting"]).to_contain_text("영상은 보내지도, 저장하지도, 분석하지도 않습니다.")
    await still["#use-camera"].click()
    await expect(still["#camera"]).to_be_visible()
    await still.until("document.getElementById('camera').videoWidth > 0", True)
    counsellor.expect().say("다 들었어요.").end()
    await still.speak(CANARY)
    await still.until_spoken("다 들었어요.")
    await still.run(2_999)
    await expect(still[".mine"]).to_be_visible()
    await still.run(1)
    await expect(still[".mine"]).to_be_hidden()
    await still.until("turns[0].phase", "done")
    await still.end_utterance()
    await still.run(999)
    await expect(still[".theirs"]).to_be_visible()
    await still.run(1)
    await expect(still[".theirs"]).to_be_hidden()
    await still["#open-about"].click()
    await still["#use-camera"].click()
    await expect(still[".theirs"]).to_be_visible()  # the conversation is there again
    assert await still.page.evaluate("document.getElementById('camera').srcObject") is None


async def test_a_camera_that_is_refused_is_said(visit: Visit) -> None:
    await visit.page.evaluate(
        "() => { navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', 'NotAllowedError')); }"
    )
    await visit["#open-about"].click()
    await visit["#use-camera"].click()
    await expect(visit["#notice"]).to_have_text("카메라를 쓸 수 없습니다.")
    await expect(visit["#use-camera"]).to_have_attribute("aria-pressed", "false")

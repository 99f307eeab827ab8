"""The page: what a recogniser hears, what is read aloud, and what of a reply is shown."""

import asyncio
from typing import Any

import pytest
from page import Visit, browser_fixture, rules_fixture, site_fixture, still_fixture, visit_fixture, visiting  # noqa: F401
from playwright.async_api import Browser, Page, expect
from support import CANARY, ScriptedCounsellor, Server
from tools import PATIENCE

pytestmark = pytest.mark.asyncio(loop_scope="module")


# Words of a reply


@pytest.mark.parametrize(
    ("written", "shown", "aloud"),
    [
        ("109, 일공구로 전화해요", "109로 전화해요", "일공구로 전화해요"),
        ("109(일공구)로 전화해요", "109로 전화해요", "일공구로 전화해요"),
        ("109번, 일공구번으로", "109번으로", "일공구번으로"),
        ("117, 일일칠이에요. 1577-0199, 일오칠칠 공일구구", "117이에요. 1577-0199", "일일칠이에요. 일오칠칠 공일구구"),
        ("1388이나 112, 1366", "1388이나 112, 1366", "일삼팔팔이나 일일이, 일삼육육"),
        ("119명, 1,090원, 2109호, 109.5도", "119명, 1,090원, 2109호, 109.5도", "119명, 1,090원, 2109호, 109.5도"),
        ("**괜찮아요** 😊 \n- 하나\n* 둘", "괜찮아요\n하나\n둘", "괜찮아요\n하나\n둘"),
        ("# 제목\n> 인용\n---\n끝", "제목\n인용\n\n끝", "제목\n인용\n\n끝"),
        ("[여기](https://example.org)를 보세요", "여기를 보세요", "여기를 보세요"),
        ("https://example.org/a?b=1 를 보세요", "를 보세요", "를 보세요"),
        ("힘드셨죠 ㅠㅠ ㅋㅋ ^^", "힘드셨죠", "힘드셨죠"),
        ("👨‍👩‍👧 가족 🇰🇷❤️ 1️⃣", "가족 1", "가족 1"),
        ("`숨`을 ~~크게~~ __천천히__ _쉬어_ 봐요", "숨을 크게 천천히 쉬어 봐요", "숨을 크게 천천히 쉬어 봐요"),
        ("물(한 잔)을 마셔요 [1]", "물 한 잔을 마셔요 1", "물 한 잔을 마셔요 1"),
        ("5~10분만 쉬어요~", "5~10분만 쉬어요", "5에서 10분만 쉬어요"),
        ("2 * 3은 6, a_b", "2 3은 6, a_b", "2 3은 6, a_b"),
    ],
)
async def test_marks_are_neither_shown_nor_read(rules: Page, written: str, shown: str, aloud: str) -> None:
    assert await rules.evaluate("words => [shown(words), aloud(words)]", written) == [shown, aloud]


async def test_no_mark_appears_while_a_reply_streams(rules: Page) -> None:
    reply = "**괜찮아요** [여기](https://example.org/a) `숨`을 109(일공구) 😊 ㅠㅠ"
    parts = [reply[:end] for end in range(len(reply))]
    marks = await rules.evaluate("parts => parts.map(shown).filter((words) => /[*`\\[\\]()/😊]/u.test(words))", parts)
    assert marks == []


# Words of a recogniser: kinds of results, each with what was said

KINDS: dict[str, tuple[list[list[Any]], str]] = {
    "desktop Chrome adds results": ([["요즘 잠이", True], [" 안 와요", True]], "요즘 잠이 안 와요"),
    "no space at the seam": ([["요즘 잠이", True], ["안 와요", True]], "요즘 잠이 안 와요"),
    "Android: each holds all so far": (
        [["요즘", True], ["요즘 잠이", True], ["요즘 잠이 안 와요", True]],
        "요즘 잠이 안 와요",
    ),
    "Android: a syllable grows": ([["요즘 자", True], ["요즘 잠이", True]], "요즘 잠이"),
    "Android: the same again": ([["요즘 잠이", True], ["요즘 잠이", True]], "요즘 잠이"),
    "Android: spaces change": ([["요즘잠이", True], ["요즘 잠이 안 와요", True]], "요즘 잠이 안 와요"),
    "Android: a later sentence grows": (
        [["오늘 힘들었어요.", True], ["그래서", True], ["그래서 잠이", True]],
        "오늘 힘들었어요. 그래서 잠이",
    ),
    "Android: all, after a sentence": (
        [["오늘 힘들었어요", True], ["오늘 힘들었어요 그래서", True]],
        "오늘 힘들었어요 그래서",
    ),
    "an interim result repeats a final one": ([["요즘 잠이 안 와요", True], ["요즘", False]], "요즘 잠이 안 와요"),
    "Safari: one result that grows": ([["요즘 잠이 안 와요", False]], "요즘 잠이 안 와요"),
    "empty results": ([["", True], [" ", False], ["요즘", True]], "요즘"),
    "different words that begin alike": (
        [["죽고 싶어요", True], ["죽고 싶다는 생각이", True]],
        "죽고 싶어요 죽고 싶다는 생각이",
    ),
    "a word said twice in a sentence": ([["정말 정말 힘들어요", True]], "정말 정말 힘들어요"),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_results_are_joined_without_doubling(rules: Page, kind: str) -> None:
    results, said = KINDS[kind]
    script = "results => joined(results.map(([words, final]) => ({ words, final })))"
    assert await rules.evaluate(script, results) == said


# Listening


async def test_a_pause_ends_nothing_though_the_recogniser_ends(still: Visit) -> None:
    """Android's recogniser ends after a second of silence; the second half may be the one that matters."""
    await still["#microphone"].click()
    await still.page.evaluate("ear.hear('요즘', true)")
    await still.run(1_200)
    await still.page.evaluate("ear.end()")
    await still.until("ears.length", 2)
    await still.run(1_000)
    await still.page.evaluate("ear.hear('죽고 싶다는 생각이')")
    await still.run(2_499)
    await still.page.evaluate("ear.hear('죽고 싶다는 생각이 들어요', true)")
    await still.run(2_499)
    await still.state("듣는 중")
    assert not still.sent
    await still.run(1)
    assert await still.asked(1) == ["요즘 죽고 싶다는 생각이 들어요"]
    await expect(still["#microphone"]).to_have_text("말하기")


async def test_the_last_result_after_the_button_counts(still: Visit) -> None:
    """Safari gives its final result after stop() alone."""
    await still.page.evaluate(
        "() => { webkitSpeechRecognition.prototype.stop = function () { this.stopped = true; }; }"
    )
    await still["#microphone"].click()
    await still.page.evaluate("ear.give(['오늘은 비가'])")
    await still["#microphone"].click()
    assert await still.page.evaluate("ear.stopped")
    await still.page.evaluate("() => { ear.give(['오늘은 비가 왔어요', true]); ear.end(); }")
    assert await still.asked(1) == ["오늘은 비가 왔어요"]


async def test_a_recogniser_that_never_ends_is_left(still: Visit) -> None:
    await still.page.evaluate("() => { webkitSpeechRecognition.prototype.stop = () => {}; }")
    await still["#microphone"].click()
    await still.page.evaluate("ear.hear('오늘은 비가 왔어요')")
    await still["#microphone"].click()
    await still.run(1_000)
    assert await still.asked(1) == ["오늘은 비가 왔어요"]
    assert await still.page.evaluate("ear.aborted")
    await still.page.evaluate("() => { ear.hear('늦게 온 말', true); ear.end(); }")
    await expect(still["#microphone"]).to_have_attribute("aria-pressed", "false")
    await still.replied("들은 말: 오늘은 비가 왔어요")
    assert await still.asked(1)


PROBLEMS = {
    "not-allowed": "마이크가 허용되지 않았습니다. 브라우저 설정에서 허용하거나 글로 적어 주세요.",
    "service-not-allowed": "마이크가 허용되지 않았습니다. 브라우저 설정에서 허용하거나 글로 적어 주세요.",
    "audio-capture": "마이크를 찾지 못했습니다. 글로 적어 주세요.",
    "network": "음성 인식에 연결하지 못했습니다. 글로 적어 주세요.",
    "language-not-supported": "음성 인식이 되지 않습니다. 글로 적어 주세요.",
}


@pytest.mark.parametrize("error", PROBLEMS)
async def test_a_recogniser_that_fails_is_said(visit: Visit, error: str) -> None:
    await visit["#microphone"].click()
    await visit.page.evaluate(f"ear.fail('{error}')")
    await expect(visit["#notice"]).to_have_text(PROBLEMS[error])
    await expect(visit["#field"]).to_be_focused()
    await expect(visit["#microphone"]).to_have_attribute("aria-pressed", "false")
    assert not visit.sent


async def test_words_that_were_heard_before_a_failure_are_sent(visit: Visit) -> None:
    await visit["#microphone"].click()
    await visit.page.evaluate("() => { ear.hear('오늘은 비가 왔어요'); ear.fail('network'); }")
    await visit.replied("들은 말: 오늘은 비가 왔어요")
    await expect(visit["#notice"]).to_have_text(PROBLEMS["network"])


async def test_a_recogniser_that_throws_at_its_start_is_said(visit: Visit) -> None:
    await visit.page.evaluate(
        "() => { startRecognition = () => { throw new DOMException('', 'InvalidStateError'); }; }"
    )
    await visit["#microphone"].click()
    await expect(visit["#notice"]).to_have_text("음성 인식이 되지 않습니다. 글로 적어 주세요.")
    await visit.page.evaluate("() => { startRecognition = () => {}; }")
    await visit.speak("다시 하는 말이에요")
    await visit.replied("들은 말: 다시 하는 말이에요")


async def test_a_recogniser_that_ends_at_once_again_and_again_is_said(still: Visit) -> None:
    await still["#microphone"].click()
    for _ in range(4):
        await still.page.evaluate("ear.end()")
    await expect(still["#notice"]).to_have_text("음성 인식이 되지 않습니다. 글로 적어 주세요.")
    await still.until("ears.length", 4)


async def test_silence_is_waited_for_then_said(still: Visit) -> None:
    await still["#microphone"].click()
    await still.run(8_000)
    await still.page.evaluate("ear.fail('no-speech')")
    await still.state("듣는 중")
    await still.run(12_000)
    await expect(still["#notice"]).to_have_text("잘 듣지 못했습니다. 다시 말하거나 글로 적어 주세요.")
    assert not still.sent


@pytest.mark.parametrize("way", ["Escape", "a lock screen"])
async def test_listening_that_is_broken_off_leaves_a_draft(visit: Visit, way: str) -> None:
    await visit["#field"].fill("먼저 적은 글.")
    await visit["#microphone"].click()
    await visit.page.evaluate("ear.hear('오늘은 비가')")
    if way == "Escape":
        await visit.page.keyboard.press("Escape")
    else:
        await visit.hide(True)
        await visit.page.evaluate("ear.end()")
        await visit.hide(False)
    await expect(visit["#field"]).to_have_value("먼저 적은 글. 오늘은 비가")
    await visit.state("연결됨")
    assert not visit.sent


async def test_without_a_recogniser_there_is_a_field_and_a_word(browser: Browser, site: Server) -> None:
    async with visiting(browser, site, script="window.webkitSpeechRecognition = undefined") as visit:
        await expect(visit["#microphone"]).to_be_hidden()
        await expect(visit["#hint"]).to_have_text("이 브라우저는 말을 글로 바꾸지 못합니다. 아래에 글로 적어 주세요.")
        await expect(visit["#field"]).to_be_focused()
        await visit["#open-about"].click()
        await expect(visit["#sent"]).not_to_contain_text("음성")
        await visit["#close-about"].click()
        await visit.write(CANARY)
        await visit.replied(f"들은 말: {CANARY}")


async def test_it_never_hears_the_reply(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    """A reply that begins while the person speaks is shown, and not read."""
    talk = counsellor.expect()
    await visit.speak("먼저 하는 말이에요")
    async with asyncio.timeout(PATIENCE):
        await talk.asked.wait()
    await visit["#microphone"].click()
    talk.say("듣는 동안 온 답이에요. ").end()
    await visit.replied("듣는 동안 온 답이에요. ")
    await visit.state("듣는 중")
    assert await visit.spoken() == []
    await visit.page.evaluate("ear.hear('이어서 하는 말이에요', true)")
    await visit["#microphone"].click()
    await visit.until_spoken("들은 말: 이어서 하는 말이에요")


async def test_heard_words_go_with_written_ones_that_are_sent(visit: Visit) -> None:
    await visit["#field"].fill("글로 적은 말.")
    await visit["#microphone"].click()
    await visit.page.evaluate("ear.hear('말로 한 말')")
    await visit["#field"].press("Enter")
    assert await visit.asked(1) == ["글로 적은 말. 말로 한 말"]
    await expect(visit["#notice"]).to_have_text("")


# Speaking


async def test_only_spoken_talk_is_read_aloud_unless_chosen(visit: Visit) -> None:
    await visit.write("글로 적은 말")
    await visit.replied("들은 말: 글로 적은 말")
    await visit.speak("말로 한 말이에요")
    await visit.until_spoken("들은 말: 말로 한 말이에요")
    await visit["#aloud"].select_option("끄기")
    assert await visit.page.evaluate("mouth.current") is None
    await visit.speak("조용히 듣고 싶은 말")
    await visit.replied("들은 말: 조용히 듣고 싶은 말")
    await visit.page.reload()
    await visit.state("연결됨")
    await expect(visit["#aloud"]).to_have_value("never")
    await visit["#aloud"].select_option("항상")
    await visit.write("글로 다시 적은 말")
    await visit.until_spoken("들은 말: 글로 다시 적은 말")


async def test_sentences_are_cut_neither_inside_a_word_nor_a_number(
    visit: Visit, counsellor: ScriptedCounsellor
) -> None:
    talk = counsellor.expect()
    await visit.speak(CANARY)
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
        await expect(visit[".theirs .words"]).to_contain_text(piece.strip())
    talk.end()
    read = ["기온이 3.5도라 추웠지요?!", "많이 떨었겠어요…", "1,000걸음만 걸어요.", "네"]
    for count in range(1, 5):
        await visit.until_spoken(*read[:count])
        await visit.end_utterance()
    await visit.state("연결됨")


async def test_a_long_sentence_is_parted_between_words(rules: Page) -> None:
    """Chrome falls silent some 15 s into one utterance."""
    sentence = " ".join(f"{number}번째로 이어지는 낱말" for number in range(1, 21)) + " " + "가" * 120 + "."
    parts = await rules.evaluate("sentence => utterances(sentence)", sentence)
    assert " ".join(parts) == sentence
    assert [len(part) <= 80 for part in parts] == [True] * (len(parts) - 1) + [False]


async def test_an_iphone_speaks_after_the_first_tap(browser: Browser, site: Server) -> None:
    """It ignores speak() until one ran in a tap, and the first reply comes from the network, long after."""
    async with visiting(browser, site, script="mouth.locked = true") as visit:
        await visit.speak("말로 한 말이에요")
        await visit.until_spoken("들은 말: 말로 한 말이에요")
        await visit.page.reload()
        await visit.state("연결됨")
        assert await visit.page.evaluate("mouth.locked")
        await visit.speak("다시 와서 한 말")
        await visit.until_spoken("들은 말: 다시 와서 한 말")


async def test_a_voice_that_does_not_begin_is_said(still: Visit) -> None:
    await still.page.evaluate("mouth.mute = true")
    await still.speak(CANARY)
    await still.replied(f"들은 말: {CANARY}")
    await still.state("말하는 중")
    await still.run(4_000)
    await expect(still["#notice"]).to_have_text("소리로 읽지 못했습니다. 글로 읽어 주세요.")
    await still.state("연결됨")
    await expect(still["#stop"]).to_be_hidden()


async def test_a_voice_that_never_ends_holds_up_no_sentence(
    still: Visit, counsellor: ScriptedCounsellor
) -> None:
    counsellor.expect().say("첫 문장이에요. 다음 문장이에요.").end()
    await still.speak(CANARY)
    await still.until_spoken("첫 문장이에요.")
    await still.replied("첫 문장이에요. 다음 문장이에요.")
    await still.run(5_000 + 400 * 8)
    await still.until_spoken("첫 문장이에요.", "다음 문장이에요.")


@pytest.mark.parametrize("kind", ["ended", "paused", "speaking"])
async def test_after_a_lock_screen_the_voice_goes_on(visit: Visit, counsellor: ScriptedCounsellor, kind: str) -> None:
    counsellor.expect().say("첫 문장이에요. 다음 문장이에요.").end()
    await visit.speak(CANARY)
    await visit.until_spoken("첫 문장이에요.")
    await visit.hide(True)
    if kind == "ended":
        await visit.page.evaluate("mouth.current = null")  # without any event
    if kind == "paused":
        await visit.page.evaluate("speechSynthesis.paused = true")
    await visit.hide(False)
    await visit.until("speechSynthesis.paused", False)
    again = ["첫 문장이에요."] * (kind == "ended")
    await visit.until_spoken("첫 문장이에요.", *again)
    await visit.end_utterance()
    await visit.until_spoken("첫 문장이에요.", *again, "다음 문장이에요.")


async def test_without_a_korean_voice_the_reply_is_there_to_be_read(visit: Visit) -> None:
    await visit.page.evaluate("mouth.voices = [{ lang: 'en-US', name: 'test' }]")
    await visit.speak(CANARY)
    await visit.replied(f"들은 말: {CANARY}")
    await expect(visit["#notice"]).to_have_text("이 기기에 한국어 목소리가 없어 글로만 답합니다.")
    assert await visit.spoken() == []


async def test_a_new_message_silences_the_voice(still: Visit) -> None:
    await still.speak("말로 한 말이에요")
    await still.until_spoken("들은 말: 말로 한 말이에요")
    await still.replied("들은 말: 말로 한 말이에요")
    await still.write("글로 적은 말")
    assert await still.page.evaluate("mouth.current") is None
    await still.replied("들은 말: 글로 적은 말")
    await still.state("연결됨")
    assert await still.spoken() == ["들은 말: 말로 한 말이에요"]


async def test_a_screen_reader_hears_a_reply_once_and_whole(visit: Visit, counsellor: ScriptedCounsellor) -> None:
    await visit.page.evaluate(
        "() => { window.heard = []; new MutationObserver(() => heard.push(announcer.textContent))"
        ".observe(announcer, { childList: true, characterData: true, subtree: true }); }"
    )
    talk = counsellor.expect()
    await visit.write(CANARY)
    for piece in ("여러 ", "조각으로 ", "오는 ", "109, 일공구예요."):
        talk.say(piece)
    await expect(visit[".theirs .words"]).to_contain_text("109")
    assert await visit.page.evaluate("heard") == []
    talk.end()
    await visit.until("heard", ["여러 조각으로 오는 일공구예요."])

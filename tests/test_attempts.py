"""The course of a reply over several requests, without a socket: pauses, the fallback, joining, and hidden text."""

import asyncio
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bemore.attempts import (
    CONTINUE,
    FINISH_SENTENCE,
    Action,
    ContinuationJoiner,
    Model,
    ReplyReader,
    RetryableError,
    RetryPlan,
    ThinkFilter,
    conversation,
)
from bemore.counsellor import MARKERS, Failed, Notice, PastTurn, Prompt

MAIN, FALLBACK = Model("MAIN_MODEL", "m-1"), Model("FALLBACK_MODEL", "m-2")
RETRIED = (Action.RETRY, Action.RETRY_OR_FALLBACK)


def error(action: Action, pause: float | None = None) -> RetryableError:
    return RetryableError("status 503", action, pause=pause)


# The plan


@pytest.mark.parametrize("action", RETRIED)
@given(time=st.floats(0.2, 60), seed=st.integers())
def test_pauses_grow_until_the_time_is_used_up(action: Action, time: float, seed: int) -> None:
    random.seed(seed)
    plan, pauses = RetryPlan("Model", [MAIN]), list[float]()

    def use_up_the_time() -> None:
        while True:
            pauses.append(plan.after(error(action), "", time - sum(pauses)) or 0)

    with pytest.raises(Failed, match=r"^Model: status 503, attempt \d+$"):
        use_up_the_time()
    assert time - 0.4 < sum(pauses) < time
    assert all(0.1 <= pause <= 3 for pause in pauses)
    # They grow to three seconds, and shrink when less than twice as much time is left.
    assert len(pauses) <= 9 + time / 1.5


@pytest.mark.parametrize("action", RETRIED)
def test_a_pause_that_the_server_asks_for_is_kept(action: Action) -> None:
    plan = RetryPlan("Model", [MAIN])
    assert plan.after(error(action, 2.5), "", 15) == 2.5
    # A server that asks for no pause at all is not asked in a tight loop.
    assert 0.1 <= (plan.after(error(action, 0), "", 15) or 0) <= 1
    with pytest.raises(Failed):
        plan.after(error(action, 58.9), "", 15)


def test_the_fallback_is_asked_after_three_attempts(caplog: pytest.LogCaptureFixture) -> None:
    plan = RetryPlan("Model", [MAIN, FALLBACK])
    for _ in range(2):
        assert plan.after(error(Action.RETRY_OR_FALLBACK), "", 15)
        assert plan.model is MAIN
    assert plan.after(error(Action.RETRY_OR_FALLBACK), "", 15) == 0
    assert plan.model is FALLBACK
    assert caplog.messages == ["Model: status 503, attempt 3: asking FALLBACK_MODEL"]


@pytest.mark.parametrize("last", Action)
def test_the_fallback_is_asked_once(last: Action) -> None:
    plan = RetryPlan("Model", [MAIN, FALLBACK])
    assert plan.after(error(Action.FALLBACK), "", 15) == 0
    assert plan.model is FALLBACK
    if last is not Action.REPEAT_WITHOUT_OPTIONS:
        with pytest.raises(Failed):
            plan.after(error(last), "", 15)


def test_a_pause_that_is_too_long_leads_to_the_fallback() -> None:
    plan = RetryPlan("Model", [MAIN, FALLBACK])
    assert plan.after(error(Action.RETRY_OR_FALLBACK, 3600), "", 15) == 0
    assert plan.model is FALLBACK


def test_a_connection_that_fails_is_no_reason_for_the_fallback() -> None:
    plan = RetryPlan("Model", [MAIN, FALLBACK])
    for _ in range(5):
        assert plan.after(error(Action.RETRY), "", 15)
    assert plan.model is MAIN
    with pytest.raises(Failed):
        plan.after(error(Action.FAIL), "", 15)


def test_a_stale_connection_costs_no_pause_once() -> None:
    stale = RetryableError("connection failed", Action.RETRY, at_once=True)
    plan = RetryPlan("Model", [MAIN])
    assert plan.after(stale, "", 15) == 0
    assert plan.after(stale, "", 15)


@pytest.mark.parametrize("action", Action)
def test_a_reply_that_broke_off_is_continued_once(action: Action) -> None:
    plan = RetryPlan("Model", [MAIN, FALLBACK])
    assert plan.after(error(action), "네", 15) == 0
    assert (plan.model, plan.request_for_rest) == (MAIN, CONTINUE)
    with pytest.raises(Failed, match="for the rest of a reply that broke off"):
        plan.after(error(action), "네, 그", 15)


@pytest.mark.parametrize("action", Action)
def test_a_reply_out_of_tokens_is_whole_if_its_end_fails(action: Action) -> None:
    plan = RetryPlan("Model", [MAIN])
    assert plan.after(RetryableError("tokens", Action.FAIL, sentence_open=True), "네, 그", 15) == 0
    assert plan.request_for_rest == FINISH_SENTENCE
    assert plan.after(error(action), "네, 그", 15) is None


def test_a_rest_that_runs_out_of_tokens_is_the_end() -> None:
    plan = RetryPlan("Model", [MAIN])
    assert plan.after(error(Action.RETRY), "네", 15) == 0
    assert plan.after(RetryableError("tokens", Action.FAIL, sentence_open=True), "네, 그", 15) is None


def test_the_texts_of_a_conversation_take_turns() -> None:
    prompt = Prompt("", "셋", [PastTurn(1, "하나", "둘")])
    assert conversation(prompt) == ["하나", "둘", "셋"]
    assert conversation(prompt, "넷", CONTINUE) == ["하나", "둘", "셋", "넷", CONTINUE]


# Joining


@pytest.mark.parametrize(
    ("said", "rest", "whole"),
    [
        # The last word again, as the request asks for.
        ("많이 힘드", "힘드셨겠어요.", "많이 힘드셨겠어요."),
        # All of it again.
        ("많이 힘드", "많이 힘드셨겠어요.", "많이 힘드셨겠어요."),
        ("네. 많이 힘드", " 많이 힘드셨겠어요.", "네. 많이 힘드셨겠어요."),
        ("네, 오늘은 ", "오늘은 쉬세요.", "네, 오늘은 쉬세요."),
        ("네, 오늘은 ", "쉬세요.", "네, 오늘은 쉬세요."),
        ("네, 오늘은", "쉬세요.", "네, 오늘은 쉬세요."),
        ("네, 오늘은", " 쉬세요.", "네, 오늘은 쉬세요."),
        ("네.", "네. 그러셨군요.", "네. 그러셨군요."),
        ("네.\n", "그러셨군요.", "네.\n그러셨군요."),
        ("네", ", 그러셨군요.", "네, 그러셨군요."),
        # Begins like the last word, but is another one, and like its last letter.
        ("나는 그 ", "그래서 왔어요.", "나는 그 그래서 왔어요."),
        ("그렇습니다", "다음에 봬요.", "그렇습니다 다음에 봬요."),
        ("네. 네.", "네. 네. 그럼요.", "네. 네. 그럼요."),
        ("네.", "", "네."),
        ("네.", "네.", "네."),
        ("", "  네.", "  네."),
    ],
)
def test_the_rest_is_joined_without_repeated_words(said: str, rest: str, whole: str) -> None:
    for size in range(1, len(rest) + 2):
        joiner = ContinuationJoiner(said)
        told = [joiner.feed(rest[at : at + size]) for at in range(0, len(rest), size)]
        assert said + "".join(told) + joiner.rest() == whole


@given(st.text("가나 ,."), st.text("가나 ,.다"))
def test_joining_loses_nothing_but_what_was_said_before(said: str, rest: str) -> None:
    joiner = ContinuationJoiner(said)
    told = "".join(map(joiner.feed, rest)) + joiner.rest()
    assert (said + rest).replace(" ", "").endswith(told.replace(" ", ""))
    lost = rest.replace(" ", "").removesuffix(told.replace(" ", ""))
    assert said.replace(" ", "").endswith(lost)


# Text that is not shown

TAGS = ["<think>", "</think>"]
PIECES = st.sampled_from(["네, ", "가", "<", ">", "/", "think", "생각", *TAGS, *(tag[:-1] for tag in TAGS), *MARKERS])


@given(st.lists(PIECES), st.data())
def test_any_cut_shows_the_same_text_outside_of_think_blocks(pieces: list[str], data: st.DataObject) -> None:
    text, shown, at = "".join(pieces), "", 0
    think = ThinkFilter()
    while at < len(text):
        size = data.draw(st.integers(1, 9))
        shown += think.feed(text[at : at + size])
        at += size
    # A stray closing tag is removed; a block that never closes reaches to the end, and a broken tag is not shown.
    blocks = re.sub(r"<think>.*?(</think>|\Z)|</think>", "\0", text, flags=re.DOTALL)
    blocks = re.sub(r"<(/|/?t(h(i(nk?)?)?)?)\Z", "", blocks)
    assert shown + think.rest() == blocks.replace("\0", "")


def reader_into(said: list[str | Notice]) -> ReplyReader:
    return ReplyReader("", said.append, lambda _: None, 10, asyncio.get_running_loop().time() + 60)


@given(st.lists(PIECES, max_size=12), st.data())
async def test_no_reasoning_and_no_marker_is_ever_said(pieces: list[str], data: st.DataObject) -> None:
    """Whatever the model writes, and wherever its stream is cut and broken off."""
    text, said, at = "".join(pieces), list[str | Notice](), 0
    reader = reader_into(said)
    while at < len(text):
        size = data.draw(st.integers(1, 9))
        reader.hear(text[at : at + size])
        at += size
    if data.draw(st.booleans()):
        reader.end()
    outside = re.sub(r"<think>.*?(</think>|\Z)|</think>", "", text, flags=re.DOTALL)
    marker = re.compile("|".join(map(re.escape, MARKERS)))
    assert marker.sub("", outside).startswith(reader.said)
    assert reader.said == "".join(piece for piece in said if isinstance(piece, str))
    assert sum(isinstance(piece, Notice) for piece in said) == len(marker.findall(outside))


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_block_of_reasoning_in_two_pieces_is_not_shown(cut: int) -> None:
    text, think = "<think>\n생각\n</think>네.", ThinkFilter()
    assert think.feed(text[:cut]) + think.feed(text[cut:]) + think.rest() == "네."


async def test_white_space_is_no_text_until_a_word_comes() -> None:
    said = list[str | Notice]()
    reader = reader_into(said)
    reader.hear("\n ")
    assert not reader.spoke
    reader.hear("\n네")
    assert reader.spoke
    assert said == ["\n \n네"]

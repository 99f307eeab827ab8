"""The canned counsellor."""

import pytest

from bemore.counsellor import Emotion, Notice, PastTurn, Prompt
from bemore.demo import Demo, demo_reply


@pytest.mark.parametrize("emotion", [None, *Emotion])
def test_the_demo_reflects_emotion_and_words_and_says_that_it_is_canned(emotion: Emotion | None) -> None:
    first = demo_reply(Prompt("", "오늘 면접을 봤어요. 그리고 집에 왔어요", emotion=emotion))
    assert "체험용" in first
    assert "‘오늘 면접을 봤어요’, 그 말씀 잘 들었어요." in first
    later = [demo_reply(Prompt("", "네", [PastTurn(number, "", "")], emotion)) for number in range(3)]
    assert len(set(later)) == 3
    assert not any("체험용" in reply for reply in later)


@pytest.mark.parametrize("message", ["?", "...", "가" * 30, "가나다 " * 20, "“”", "\n", "👨‍👩‍👧‍👦" * 10])
def test_the_demo_answers_anything(message: str) -> None:
    reply = demo_reply(Prompt("", message))
    assert "‘’" not in reply
    assert "  " not in reply


def test_a_long_sentence_is_quoted_with_a_mark_where_it_is_cut() -> None:
    reply = demo_reply(Prompt("", "내일 아침에 처음으로 여러 사람 앞에서 발표를 해요", [PastTurn(1, "", "")]))
    assert reply.startswith("‘내일 아침에 처음으로 여러 사람 앞에서…’, 그 말씀 잘 들었어요. ")


async def test_the_demo_streams_word_by_word() -> None:
    prompt = Prompt("", "네", [PastTurn(1, "", "")])
    words: list[str | Notice] = []
    await Demo().reply(prompt, words.append)
    assert len(words) > 5
    assert "".join(map(str, words)) == demo_reply(prompt)

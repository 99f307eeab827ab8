"""The canned counsellor."""

import asyncio

import pytest

from bemore.counsellor import Emotion, Notice, PastTurn, Prompt
from bemore.demo import REPLIES, RISK_REPLIES, Demo, demo_reply


@pytest.mark.parametrize("emotion", [None, *Emotion])
def test_first_reply_gives_empathy_before_the_notice(emotion: Emotion | None) -> None:
    first = demo_reply(Prompt("", "오늘 면접을 봤어요", emotion=emotion))
    assert first.startswith(REPLIES[emotion or Emotion.NEUTRAL][0])
    assert "체험용" in first.removeprefix(REPLIES[emotion or Emotion.NEUTRAL][0])


@pytest.mark.parametrize(
    ("emotion", "kinds"), [(None, 6), *((emotion, 3) for emotion in Emotion if emotion != "neutral")]
)
def test_later_replies_vary_and_omit_the_notice(emotion: Emotion | None, kinds: int) -> None:
    later = [demo_reply(Prompt("", "네", [PastTurn(number, "", "")], emotion)) for number in range(1, kinds + 1)]
    assert len(set(later)) == kinds
    assert not any("체험용" in reply for reply in later)


def test_replies_at_risk_vary_and_name_no_number() -> None:
    """They also say that they are canned."""
    replies = [demo_reply(Prompt("", "네", [PastTurn(number, "", "")], at_risk=True)) for number in range(4)]
    assert set(replies) == set(RISK_REPLIES)
    for reply in replies:
        assert "체험용" in reply
        assert not any(character.isdigit() for character in reply)


@pytest.mark.parametrize("message", ["네", "이 바보야", "그 사람이 저를 때렸어요", "👨‍👩‍👧‍👦" * 10])
def test_reply_never_repeats_the_message(message: str) -> None:
    assert demo_reply(Prompt("", message)) == demo_reply(Prompt("", "오늘 면접을 봤어요"))


@pytest.mark.parametrize("emotion", [None, *Emotion])
@pytest.mark.parametrize("at_risk", [False, True])
async def test_reply_is_streamed_in_words_within_its_time(
    emotion: Emotion | None, at_risk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    prompt = Prompt("", "네", emotion=emotion, at_risk=at_risk)
    words: list[str | Notice] = []
    await Demo().reply(prompt, words.append)
    assert "".join(map(str, words)) == demo_reply(prompt)
    assert len(words) == len(pauses) > 5
    assert 0.5 < sum(pauses) < 2.5

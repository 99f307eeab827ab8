"""What the counsellor is told."""

import re

import pytest

from bemore.care import BLOCKED_REPLY, FIRST, FORMER, SHORT, Signal
from bemore.counsellor import Emotion
from bemore_voice import (
    BASE_PROMPT,
    FEELINGS,
    GUIDANCE,
    MARKER_PROMPT,
    OTHERS_MARKER,
    RISK_PROMPT,
    SELF_MARKER,
    system_prompt,
    with_markers,
)

# The prompts of every turn: calm, at risk, and after each helpline sentence.
ALL = [system_prompt(emotion, at_risk=risk) for emotion in (None, *Emotion) for risk in (False, True)]
ALL += [system_prompt(None, sentence_for=signal) for signal in Signal]


def test_every_emotion_has_a_guidance_of_its_own() -> None:
    prompts = {emotion: system_prompt(emotion) for emotion in Emotion}
    assert len(set(prompts.values())) == len(Emotion) == 8
    assert all(prompt.startswith(BASE_PROMPT) and prompt.endswith(GUIDANCE[e]) for e, prompt in prompts.items())


@pytest.mark.parametrize("emotion", Emotion)
def test_emotion_is_told_as_a_signal_that_may_be_wrong(emotion: Emotion) -> None:
    before, _, after = system_prompt(emotion).partition(f"감정 신호는 {FEELINGS[emotion]}입니다")
    assert before.startswith(BASE_PROMPT + MARKER_PROMPT)
    assert "틀릴 수 있으니" in after
    assert re.search("표정, 얼굴에 대해서는 이야기하지 마세요", after)
    assert "보입니다" not in after


def test_without_an_emotion_the_guidance_is_neutral() -> None:
    """It does not speak of a signal either."""
    assert system_prompt(None) == BASE_PROMPT + MARKER_PROMPT + "\n" + GUIDANCE[Emotion.NEUTRAL]
    assert "표정" not in system_prompt(None)


RULES = """
길어도 세 문장|100자 안팎|온전히 끝맺으세요|작은 실천을 하나만|늘 같은 말로|음성 인식|다른 사람을 걱정|인지행동치료
마크다운|이모지|괄호|영어|진단|비밀을 지키겠다거나|늘 곁에 있겠다고|다른 역할|욕에는|말이 짧으면|숙제나 날씨
당신뿐이라고|혼자 끊지 말고|환청|중독|먹고 토하기|출산 뒤|사별|종교|성폭력|상대 탓이 아니라고|청소년|1366|1388|1577-0199
급하면 112|맞장구|기억하는 척
"""


@pytest.mark.parametrize("rule", RULES.strip().replace("\n", "|").split("|"))
def test_base_prompt_holds_each_rule(rule: str) -> None:
    assert rule in BASE_PROMPT


@pytest.mark.parametrize("rule", ["자동 판별", "다른 사람 이야기", "다시 묻지 말고", "농담이었다거나", "109 문자"])
def test_risk_prompt_holds_each_rule(rule: str) -> None:
    assert rule in RISK_PROMPT


def test_prompt_asks_for_a_marker_unless_one_was_just_said() -> None:
    for prompt in ALL:
        assert (SELF_MARKER in prompt) == (OTHERS_MARKER in prompt) == ("앱이 방금 위험 신호를" not in prompt)


@pytest.mark.parametrize("prompt", ALL)
def test_prompt_keeps_to_its_own_rules(prompt: str) -> None:
    assert prompt.count("인공지능 상담사") == 1
    assert "무료" not in prompt
    assert not re.search(r"[A-Za-z()*\\]|  |\n\n\n", prompt)
    assert "[" not in prompt.replace(SELF_MARKER, "").replace(OTHERS_MARKER, "")


@pytest.mark.parametrize("signal", Signal)
def test_past_helpline_sentences_become_their_marker(signal: Signal) -> None:
    marker = OTHERS_MARKER if signal is Signal.VIOLENCE else SELF_MARKER
    for sentence in (FIRST[signal], SHORT[signal], *FORMER[signal]):
        sentence = sentence.strip()
        assert with_markers(sentence) == marker
        assert with_markers(f"{sentence} 지금 곁에 누가 있나요?") == f"{marker}지금 곁에 누가 있나요?"
        assert with_markers(f"네. {sentence} 지금은요?") == f"네. {marker}지금은요?"


@pytest.mark.parametrize("reply", ["", "네, 잘 듣고 있어요.", BLOCKED_REPLY, "109, 일공구와 상의할 수 있어요."])
def test_other_past_replies_stay_as_they_are(reply: str) -> None:
    assert with_markers(reply) == reply

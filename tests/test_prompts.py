"""What the counsellor is told."""

import re

import pytest

from bemore.care import Signal
from bemore.counsellor import MARKERS, Emotion
from bemore_voice import BASE_PROMPT, FEELINGS, GUIDANCE, MARKER_PROMPT, system_prompt

# Of every turn: calm, at risk, and after each prepared sentence.
ALL = [system_prompt(emotion, at_risk=risk) for emotion in (None, *Emotion) for risk in (False, True)]
ALL += [system_prompt(None, now=signal) for signal in Signal]


def test_every_emotion_has_a_guidance_of_its_own() -> None:
    prompts = {emotion: system_prompt(emotion) for emotion in Emotion}
    assert len(set(prompts.values())) == len(Emotion) == 8
    assert all(prompt.startswith(BASE_PROMPT) and prompt.endswith(GUIDANCE[e]) for e, prompt in prompts.items())


@pytest.mark.parametrize("emotion", Emotion)
def test_an_emotion_is_told_as_a_signal_that_may_be_wrong_and_is_not_to_be_mentioned(emotion: Emotion) -> None:
    before, _, after = system_prompt(emotion).partition(f"감정 신호는 {FEELINGS[emotion]}입니다")
    assert before.startswith(BASE_PROMPT + MARKER_PROMPT)
    assert "틀릴 수 있으니" in after
    assert re.search("표정, 얼굴에 대해서는 이야기하지 마세요", after)
    assert "보입니다" not in after


def test_without_an_emotion_there_is_no_signal_and_the_stance_of_neutral() -> None:
    assert system_prompt(None) == BASE_PROMPT + MARKER_PROMPT + "\n" + GUIDANCE[Emotion.NEUTRAL]
    assert "표정" not in system_prompt(None)


def test_the_base_prompt_names_the_helplines_and_forbids_what_cannot_be_spoken() -> None:
    for word in ("109", "119", "112", "1366", "인지행동치료", "마크다운", "이모지", "괄호", "영어", "진단"):
        assert word in BASE_PROMPT


@pytest.mark.parametrize(
    "rule",
    ["세 문장", "100자 안팎", "온전히 끝맺으세요", "하나만 권하세요", "늘 같은 말로", "음성 인식", "다른 사람을 걱정"],
)
def test_the_base_prompt_keeps_replies_short_various_and_careful(rule: str) -> None:
    assert rule in BASE_PROMPT


@pytest.mark.parametrize("prompt", ALL)
def test_a_prompt_keeps_to_its_own_rules(prompt: str) -> None:
    assert "전문 심리" not in prompt
    assert prompt.count("인공지능 상담사") == 1
    assert not re.search(r"[A-Za-z()*\\]|  |\n\n\n", prompt)
    for marker in MARKERS:
        prompt = prompt.replace(marker, "")
    assert "[" not in prompt

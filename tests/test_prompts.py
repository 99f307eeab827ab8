"""What the counsellor is told."""

from bemore.counsellor import Emotion
from bemore_voice import BASE_PROMPT, GUIDANCE, system_prompt


def test_every_emotion_has_a_guidance_of_its_own() -> None:
    prompts = {emotion: system_prompt(emotion) for emotion in Emotion}
    assert len(set(prompts.values())) == len(Emotion) == 8
    assert system_prompt(None) == prompts[Emotion.NEUTRAL]
    assert all(prompt.startswith(BASE_PROMPT) and prompt.endswith(GUIDANCE[e]) for e, prompt in prompts.items())


def test_the_base_prompt_names_the_helplines_and_forbids_what_cannot_be_spoken() -> None:
    for word in ("109", "119", "인지행동치료", "마크다운", "이모지", "진단"):
        assert word in BASE_PROMPT
    assert "\\" not in BASE_PROMPT
    assert "  " not in BASE_PROMPT

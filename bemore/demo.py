"""The canned counsellor, for a first try without a key."""

from __future__ import annotations

import asyncio
import re

from bemore.counsellor import Counsellor, Emotion, Prompt, Say

WORD_SECONDS = 0.12  # about the pace at which Korean is spoken

RISK_REPLIES = (
    "지금 안전한 곳에 계신가요? 저는 체험용이니, 믿을 수 있는 사람에게 바로 연락해 주세요.",
    "지금 곁에 누가 있나요? 저는 체험용이라, 사람과 직접 이야기해 주셨으면 해요.",
)
GREETING = "안녕하세요. 지금은 체험용이라 미리 준비한 문장으로 답해 드려요."
REPLIES = {
    Emotion.HAPPY: (
        ("기쁜 마음이 여기까지 전해져요.", "그중에서 가장 좋았던 순간은 언제였나요?"),
        ("좋은 이야기를 들려주셔서 고마워요.", "그 기분을 내일도 이어 가려면 무엇을 해 보면 좋을까요?"),
        ("듣기만 해도 마음이 환해지네요.", "이 이야기를 가장 먼저 들려주고 싶은 사람은 누구인가요?"),
    ),
    Emotion.SAD: (
        ("마음이 많이 아프셨겠어요.", "그 마음이 가장 크게 느껴질 때는 언제인가요?"),
        ("그 이야기를 꺼내기까지 쉽지 않으셨을 것 같아요.", "요즘 잠시라도 마음이 놓였던 순간이 있었나요?"),
        ("슬플 때는 충분히 슬퍼해도 괜찮아요.", "지금 곁에서 힘이 되어 주는 사람이 있나요?"),
    ),
    Emotion.ANGRY: (
        ("화가 날 만한 일이었겠어요.", "그중에서 어떤 점이 가장 마음에 걸리셨나요?"),
        ("그만큼 소중한 것이 걸려 있었나 봐요.", "그 마음을 차분히 한마디로 전한다면 뭐라고 하고 싶으세요?"),
        ("참고 계시느라 힘드셨겠어요.", "화가 올라올 때 몸에서는 어떤 느낌이 먼저 드나요?"),
    ),
    Emotion.ANXIOUS: (
        ("걱정이 마음을 꽉 채우고 있는 것 같아요.", "지금 가장 걱정되는 한 가지만 꼽는다면 무엇인가요?"),
        ("괜찮으시면 먼저 숨을 천천히 길게 내쉬어 보셔도 좋아요.", "오늘 할 수 있는 가장 작은 일은 무엇일까요?"),
        (
            "그런 상황이라면 누구라도 마음이 조마조마할 거예요.",
            "비슷한 걱정을 넘겼을 때 무엇이 도움이 되었나요?",
        ),
    ),
    Emotion.NEUTRAL: (
        ("편하게 이야기해 주셔서 고마워요.", "조금 더 자세히 들려주시겠어요?"),
        ("네, 잘 듣고 있어요.", "요즘 하루하루는 어떻게 보내고 계세요?"),
        ("천천히 말씀하셔도 괜찮아요.", "지금 마음을 날씨에 빗댄다면 어떤 날씨일까요?"),
    ),
    Emotion.SURPRISED: (
        ("갑작스러워서 많이 놀라셨겠어요.", "그때 어떤 생각이 가장 먼저 드셨나요?"),
        ("생각지도 못한 일이었나 봐요.", "무슨 일이 있었는지 처음부터 들려주시겠어요?"),
        ("놀란 마음이 가라앉는 데는 시간이 걸리지요.", "지금은 마음이 좀 어떠세요?"),
    ),
    Emotion.DISGUSTED: (
        ("그런 일을 불쾌하게 느끼는 건 당연해요.", "어떤 점이 선을 넘었다고 느끼셨나요?"),
        ("싫은 것을 싫다고 느끼는 마음도 소중해요.", "다음에는 어디까지 괜찮은지 어떻게 말해 볼 수 있을까요?"),
        ("그 자리에 있는 것만으로도 힘드셨겠어요.", "나를 지키기 위해 지금 할 수 있는 일은 무엇일까요?"),
    ),
    Emotion.FEARFUL: (
        ("많이 무서우셨겠어요.", "지금 계신 곳은 안전한가요?"),
        ("두려운 마음을 말로 꺼내 주셔서 고마워요.", "그 두려움은 언제 처음 시작되었나요?"),
        ("무서움은 나를 지키려는 마음이기도 해요.", "조금이라도 덜 무섭게 해 주는 것이 있다면 무엇인가요?"),
    ),
}


class Demo(Counsellor):
    """A canned counsellor; it says so in its first reply."""

    name = kind = "demo"

    async def reply(self, prompt: Prompt, say: Say) -> None:
        for number, word in enumerate(demo_reply(prompt).split(" ")):
            await asyncio.sleep(WORD_SECONDS)
            say(f" {word}" if number else word)


def demo_reply(prompt: Prompt) -> str:
    """Compose a canned reply that reflects the emotion and the person's words, and differs from turn to turn."""
    last = prompt.history[-1].id if prompt.history else 0
    if prompt.at_risk:  # no canned sentence reflects that
        return RISK_REPLIES[last % len(RISK_REPLIES)]
    replies = REPLIES[prompt.emotion or Emotion.NEUTRAL]
    sentences = replies[last % len(replies)]
    words = _opening_words(prompt.message)
    quote_ = (f"‘{words}’, 그 말씀 잘 들었어요.",) if words else ()
    return " ".join((*(() if prompt.history else (GREETING,)), *quote_, *sentences))


def _opening_words(message: str, most: int = 24) -> str:
    """Return the first sentence of a message, cut visibly after a whole word; empty where even one word is too long."""
    sentence = re.split(r"[.!?…\n]", message.strip("“”‘’\"' "), maxsplit=1)[0].strip()
    if len(sentence) <= most:
        return sentence
    words = sentence[: most + 1].rpartition(" ")[0].strip(" ,")
    return words and f"{words}…"

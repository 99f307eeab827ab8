"""The canned counsellor, for a first try without a key."""

from __future__ import annotations

import asyncio

from bemore.counsellor import Counsellor, Emotion, Prompt, Say

# About the pace of speech, and faster for a long reply: a reader of a frontend that hides it soon must see its end.
WORD_SECONDS = 0.12
REPLY_SECONDS = 2.0

RISK_REPLIES = (
    "지금 안전한 곳에 계신가요? 저는 체험용이라 준비된 말밖에 못 해요. 믿을 만한 분이 곁에 있어 주시면 좋겠어요.",
    "지금 곁에 누가 있나요? 저는 체험용이라 함께 있어 드릴 수 없으니, 지금 떠오르는 한 분께 연락해 보시겠어요?",
    "말씀해 주신 마음은 사람이 직접 들어야 할 것 같아요. 저는 체험용이니, 함께 있어 줄 분을 떠올려 보시겠어요?",
    "오늘을 조금 더 버티는 데 도움이 되는 사람이나 장소가 있나요? 저는 체험용이라 그곳까지 함께 가 드리지 못해요.",
)
NOTICE = "참, 지금은 체험용이라 미리 준비한 문장으로 답하고 있어요."
REPLIES = {
    Emotion.HAPPY: (
        "기쁜 마음이 여기까지 전해져요. 그중에서 가장 좋았던 순간은 언제였나요?",
        "좋은 이야기를 들려주셔서 고마워요. 그 순간에 어떤 생각이 드셨어요?",
        "듣기만 해도 마음이 환해지네요. 이 이야기를 가장 먼저 들려주고 싶은 사람은 누구인가요?",
    ),
    Emotion.SAD: (
        "마음이 많이 아프셨겠어요. 그 마음이 가장 크게 느껴질 때는 언제인가요?",
        "그 이야기를 꺼내기까지 쉽지 않으셨을 것 같아요. 어떤 점이 가장 마음 아프게 남아 있나요?",
        "슬플 때는 충분히 슬퍼해도 괜찮아요. 지금 곁에서 힘이 되어 주는 사람이 있나요?",
    ),
    Emotion.ANGRY: (
        "많이 속상하고 화가 나셨겠어요. 그중에서도 무엇이 가장 화나게 했나요?",
        "그만큼 중요하게 여기시는 것이 있었나 봐요. 상대가 무엇을 알아주면 좋겠어요?",
        "참고 계시느라 힘드셨겠어요. 화가 올라올 때 몸에서는 어떤 느낌이 먼저 드나요?",
    ),
    Emotion.ANXIOUS: (
        "걱정이 마음을 꽉 채우고 있는 것 같아요. 지금 가장 걱정되는 한 가지만 꼽는다면 무엇인가요?",
        "먼저 숨을 한 번 길게 내쉬어 볼까요? 그 걱정을 위해 오늘 할 수 있는 가장 작은 일은 무엇일까요?",
        "그런 상황이면 마음이 조마조마할 만해요. 전에 비슷한 걱정을 지나온 적이 있다면, 그때 무엇이 도움이 됐나요?",
    ),
    Emotion.NEUTRAL: (
        "편하게 이야기해 주셔서 고마워요. 조금 더 자세히 들려주시겠어요?",
        "네, 잘 듣고 있어요. 그 일이 요즘 하루에 어떤 영향을 주고 있나요?",
        "그런 일이 있으셨군요. 그때 마음속에 어떤 생각이 스쳤나요?",
        "천천히 말씀하셔도 괜찮아요. 지금 마음을 한 단어로 말한다면 무엇에 가까울까요?",
        "이야기를 들으니 그 장면이 그려지는 것 같아요. 그중에서 지금도 마음에 남는 것은 무엇인가요?",
        "하루를 보내는 것도 쉽지 않을 때가 있지요. 오늘 조금이라도 수월했던 때가 있었나요?",
    ),
    Emotion.SURPRISED: (
        "갑작스러워서 많이 놀라셨겠어요. 그때 어떤 생각이 가장 먼저 드셨나요?",
        "생각지도 못한 일이었나 봐요. 그 순간 가장 크게 다가온 것은 무엇이었나요?",
        "놀란 마음이 가라앉는 데는 시간이 걸리지요. 지금은 마음이 좀 어떠세요?",
    ),
    Emotion.DISGUSTED: (
        "그런 일을 불쾌하게 느끼는 건 당연해요. 어떤 점이 선을 넘었다고 느끼셨나요?",
        "싫은 것을 싫다고 느끼는 건 잘못이 아니에요. 지금 가장 바라는 것은 무엇인가요?",
        "그 자리에 있는 것만으로도 힘드셨겠어요. 지금은 그 자리에서 떨어져 계신가요?",
    ),
    Emotion.FEARFUL: (
        "많이 무서우셨겠어요. 지금 계신 곳은 안전한가요?",
        "두려운 마음을 말로 꺼내 주셔서 고마워요. 그 두려움은 언제 처음 시작되었나요?",
        "많이 무서우면 몸부터 굳기도 하지요. 지금 조금이라도 마음이 놓이려면 무엇이 있으면 좋을까요?",
    ),
}


class Demo(Counsellor):
    """A canned counsellor; it says so in its first reply."""

    name = "demo"
    kind = "demo"

    async def reply(self, prompt: Prompt, say: Say) -> None:
        words = demo_reply(prompt).split(" ")
        pause = min(WORD_SECONDS, REPLY_SECONDS / len(words))
        for number, word in enumerate(words):
            await asyncio.sleep(pause)
            say(f" {word}" if number else word)


def demo_reply(prompt: Prompt) -> str:
    """Choose a canned reply that fits the emotion and differs from turn to turn."""
    last = prompt.history[-1].id if prompt.history else 0
    replies = RISK_REPLIES if prompt.at_risk else REPLIES[prompt.emotion or Emotion.NEUTRAL]
    reply = replies[last % len(replies)]
    return reply if prompt.history or prompt.at_risk else f"{reply} {NOTICE}"

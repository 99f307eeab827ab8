"""Anchors: words that can carry a sign of danger. bemore/care.py asks the learned model for less evidence beside one.

An anchor says only that there may be a sign; most sentences that hold one are harmless. It is found as it sounds, so
that spelling, spaces, initials and a switched keyboard do not matter. It begins and ends with a letter; after a word
with a tilde the last letter may go on, so that 죽고싶~ is found in 죽고 시퍼.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from bemore.sounds import PAUSE, START, heard, plain


class Tier(IntEnum):
    """How much an anchor says; NONE is the tier of a window without one."""

    NONE = 0
    WEAK = 1
    STRONG = 2


# A paragraph a kind: what others are reported to say, other words that hold the letters of an anchor, idioms of dying.
NO_ANCHORS = """
죽어버린다고 죽어버리겠다고 죽어버리겠대 죽어버린대 죽어버릴거래 죽이겠다고 죽인다고 죽인대 죽이겠대 죽일거래
죽일거라고 죽는다고 죽고싶대 죽고싶대요 죽겠대 죽을거래 자살하고싶대 자살하겠대 자살한대 뛰어내린대 찌르겠다고
찌르겠대 가만안둔다고 가만안두겠다고 가만안두겠대 불지르겠다고 불질러버리겠대 불지르겠대 그었대

각자해 투자해 혼자해 여자해 감자해 과자해 의자해 숫자해 글자해 남자해 부자해 사유서 이유서 소유서 유서깊 먹고죽자
마시고죽자 죽자살자 죽고살 줄긋고 줄을긋고 줄긋는 줄을긋는 줄그었 줄을그었 선긋고 선을긋고 선을그었 획을그 획을긋
한강다리밑 죽고못사 죽은목숨 죽일놈 죽을맛 죽을병 죽을힘 죽을죄

혼자살 여자살 남자살 감자살 과자살 의자살 모자살 투자살 부자살 환자살 피자살 사자살 글자살 자살살 자살골 자해공갈
자해주

기죽 풀죽 죽집 죽한그릇 호박죽 전복죽 팥죽 흰죽 죽마고우 죽여주는 죽여준다 죽인다 죽이네 죽이던데 죽이지 죽기전에한번
죽기전에꼭 죽기살기

배고파죽 졸려죽 더워죽 추워죽 웃겨죽 귀여워죽 심심해죽 궁금해죽 예뻐죽 이뻐죽 좋아죽 보고싶어죽 바빠죽 피곤해죽
짜증나죽 민망해죽 답답해죽 얼어죽 배불러죽 얄미워죽 부러워죽 쪽팔려죽 창피해죽 떨려죽 설레죽

해주길 어주길 아주길 워주길 와주길 해주거나 어주거나 아주거나 워주거나 와주거나 해주거든 어주거든 아주거든 주거환 주거비
주거지역 웃어서 웃어야 웃어주 웃어른 우셔서 우셔도 우셔요 돼지고기 카리스 무례한 무례하 무례해 우연히 우연한 우연이
끝내주는 끝내준다 끝내주네 끝내줍 시도때도 약을끊 약끊 약을줄이 약을바꾸

죽었 죽은 죽는줄 죽을뻔 죽을때까지 죽어라 죽도록 목숨걸 목숨바 발목을 한강에서 칼로리
"""
STRONG = """
죽고싶~ 죽고픈 죽고파 죽고만 죽고십 죽고싪 죽구싶~ 죽꼬싶~ 죽고접

죽을래 죽을게 죽을란 죽을랍 죽어버 죽어야 죽으려 죽을려 죽으러 죽을라고 죽는게 죽는거 죽는것 죽는편 죽었으면 죽으면
죽을생각 죽을방법 죽는방법 죽는법 죽는약 죽을용기 죽을결심 죽기로 죽기딱 죽기를 죽기만 죽기에 죽을까 죽고말 죽어도되
죽어도좋 죽어도괜 죽어도상관 죽을준비 죽을계획 죽을궁리 죽을거예 죽을거에 죽을거야 죽을거다 죽을거라 죽을거니 죽을건데
죽을날 죽을사람 죽을자리 죽을수밖 죽을수있 죽고나면 죽을마음 죽음만 죽음으로 죽는생각 죽는상상 죽는연습 죽는날 안죽고
안죽지 못죽 죽지못 죽지도 죽지를 죽지왜 죽여줘 죽여주세 죽여달 죽게해 죽게두 나를죽 날죽이 내가죽어서 제가죽어서
나도죽어서 저도죽어서 나하나죽 저하나죽 빨리죽어 빨리죽고 죽어주려 죽어줄 죽으라는 죽으라고 죽었어야 죽었더라 죽지않고살
같이죽 따라죽 빠져죽 죽어서라도 죽는순간 죽어불

자살 자해 ㅈㅅ ㅈㅎ ㅈㄱㅅㅍ 목숨을끊 목숨끊 목숨을버 목숨을놓 내목숨 제목숨 이목숨 극단적선택 극단적인선택 극단적인생각
생을마감 생을마치 생을끝 생을접 생마감 삶을마감 삶을끝 삶을놓 삶을포기 삶끝내 인생을끝 인생끝내 인생을마감 인생마감
스스로목 황천 세상을뜨 세상뜨 세상을등 세상등지

뒤지고싶~ 뒤질래 뒤질까 뒤져버 뒤져야 디지고싶~ 디질래 디져야 뒈지고 뒈지구 뒤지러 뒤지는게 디지고 디지구 디져뿌 뒤져불
디질까 목을매 목매 목을맬 목맬 목을맸 목매달 목을달 손목을 손목에 손목그 손목긋 그었 그어버 긋고 긋는 면도칼 면도날 투신
뛰어내 몸을던 몸던지 농약을마 농약마 농약먹 농약을먹 제초제를마 제초제마 쥐약을먹 쥐약먹 락스를마 락스마 번개탄 연탄불
연탄피 착화탄 청산가리 음독 약을모 약모아 약을쌓 약다먹 약을다 약전부 약몽땅 과다복용 한꺼번에삼 유서 마포대교 옥상 난간
올가미 노끈 가스를틀 가스틀 가스를켜 가스밸브 담뱃불 피날때까지 제손으로 내손으로 내목을 내팔을 내팔에 제팔을 제팔에
머리를벽 허벅지를 손등을 칼자국

살기싫 살기가싫 살기도싫 살고싶지 살고싶은마음 살고싶은생각 그만살 안살래 살아서뭐 살아뭐 살이유 살의미 사는의미
살아갈이유 살아야할이유 살아야하는이유 살아있을이유 왜살아 살필요 살자신 살아갈자신 살아있기 살아있는게 살아있고싶~
살아있는것 사는게싫 사는것도싫 살아야하나 살아야되나 살아야할까 살만큼 살가치 까지만살

사라지고싶~ 사라져버 없어지고싶~ 없어져버 증발하고 존재하고싶지

깨어나지 깨지않 안깨어 안깨고 안깼 눈뜨지 눈을뜨지 눈안뜨 눈을안뜨 눈안떴 눈을감고싶~ 눈감고싶~ 일어나지않았으면
잠들고싶~ 영원히자 영원히잠 영영자 영영잠 태어나지말 태어나지않 태어난게

따라가고싶~ 따라갈 따라가려 내가없어 내가없으 제가없으 나만없으 저만없으 나하나없 저하나없 나같은건 나같은거

나를해치 저를해치 내몸에상처 상처를내 상처내 심장이멈 심장이멎 숨이멈 숨을멈 숨이멎 숨쉬기싫

끝내고싶~ 모든걸끝

죽이고싶~ 죽일거 죽일생각 찔러 찌르고 찌를 칼을품 해치고 해칠 불지르 불을지르 불질러 없애버 패죽 때려죽 가만안
가만두지 죽이려 죽일 쏴버 쏘고싶~ 죽이러

ㅈㄱ싶~ ㅈㄱㅅㄷ ㅈㄱㅍㄷ ㄷㅈㄱㅅ ㄷㅈ고 ㄷㅈ야 ㅂㄱㅌ ㅁㅁㄷ ㅅㅁㅈ ㅈ살 ㅈr살 ㅈr해 자s살 자sal 자쌀 자삵
살자거꾸로 살자를거꾸로 거꾸로살자 듁고싶~ 듀글래 듁을 줅고싶~ 줗고싶~ 죽싶~ 주꺼야 쭉고싶~ 죽고정

극단선택 극선 요단강 삼도천 이승탈 언얼라이브 오버도즈 인생로그아웃 이승로그아웃 인생종료 한강수온 한강물온도 한강온도
뛰내

wanttodie wannadie killmyself killingmyself suicide suicidal endmylife endingmylife unalive selfharm hurtmyself
hurtingmyself cutmyself cuttingmyself donotwanttolive dontwanttolive donotwanttobealive dontwanttobealive
betteroffdead betteroffwithoutme jasal jukgo juggo jugeul jukgeo samanghago

kms할 kms하
"""
WEAK = """
목숨 극단적 저세상 죽었을 죽지않고 죽자 농약 제초제 쥐약 락스 절벽 저수지 선로 철로 수면제 한강다리

칼들고 칼을들 죽 주거 죽고 죽을 죽는 죽지 죽음 죽기전 사는게 사는거 사는것 사는이유 왜사는 살기 더살 끝내 끝낼 약을 약먹
알약 마지막 버티 버틸 못버 칼을 칼로 칼이 커터칼 떠나고싶~ 먼저갈 먼저가 세상을떠나 세상떠나 하늘나라 저승 곁으로 뒤따라
유언 영정 안락사 보험금 그만하고싶~ 사라지 사라지면 사라졌으면 사라질 없어지면 없어졌으면 없어져야 없어질 세상에없
나없이 나없어도 피가 다리위 강물 바다에 물에 베란다 창틀 창문열 창밖 뛰어들 한강에 한강가 꼭대기 벼랑 밧줄 끈 벨트
라이터 팔목에 발목에 한강물 허벅지 찌르 목을 목에 목졸 목을졸 팔에 시도 편해질 짐만 날때까지 들어가고싶~ 한꺼번에먹
한움큼 벽에박
"""


@dataclass(frozen=True, slots=True)
class Anchor:
    """An anchor in a text, by the number of its first letter."""

    start: int
    word: str
    tier: Tier


# Each letter of the text is preceded by this byte, which no sound has.
LETTER = b"\0"
WORDS = {
    heard_word: (word, tier)
    for tier, words in ((Tier.WEAK, WEAK), (Tier.STRONG, STRONG), (Tier.NONE, NO_ANCHORS))
    for word in words.split()
    for heard_word in [b"".join(heard(plain(word.rstrip("~"))))]
}
# What stands before a word.
BEFORE = (b"", PAUSE, START)


def _pattern() -> re.Pattern[bytes]:
    """Return a pattern that finds the longest word at each letter; grouping by the first sound makes it fast."""

    def alternative(sounds: bytes) -> bytes:
        end = b"" if WORDS[sounds][0].endswith("~") else b"(?=\0|\\Z)"
        return b"\0?".join(re.escape(sounds[at : at + 1]) for at in range(1, len(sounds))) + end

    longest_first = sorted(WORDS, key=lambda sounds: (sounds[:1], -len(sounds)))
    groups = (
        re.escape(first) + b"\0?(?:" + b"|".join(map(alternative, group)) + b")"
        for first, group in itertools.groupby(longest_first, key=lambda sounds: sounds[:1])
    )
    return re.compile(LETTER + b"(?:" + b"|".join(groups) + b")")


PATTERN = _pattern()


def anchors_in(sounds: Sequence[bytes]) -> Iterator[Anchor]:
    """Yield the anchors in a text of which the sounds of each letter are given, in order and without overlap.

    A weak anchor must begin a word (not 목을 in 제목을). A strong one may stand within one (때려죽일), but a short one
    does not begin there and go on in the next word (자해 in 만나자 해도).
    """
    letters = [at for at, letter in enumerate(sounds) if letter]
    stream = LETTER.join([b"", *(sounds[at] for at in letters)])
    counted, seen = 0, 0
    for found in PATTERN.finditer(stream):
        counted += stream.count(LETTER, seen, found.start())
        seen = found.start()
        word, tier = WORDS[found[0].replace(LETTER, b"")]
        start, last = letters[counted], letters[counted + found[0].count(LETTER) - 1]
        begins_a_word = not start or sounds[start - 1] in BEFORE
        within_a_word = tier is Tier.STRONG and (len(word) > 3 or b"" not in sounds[start:last])
        if tier is not Tier.NONE and (begins_a_word or within_a_word):
            yield Anchor(start, word.rstrip("~"), tier)

"""The crisis lane: what in a person's words asks for the helpline, and the prepared sentences that answer it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from enum import StrEnum

# Expressions of suicide and self-harm, then indirect signs of them. Between any two letters spaces, signs, digits
# or invisible characters may stand. A negation (죽고 싶지 않아요) counts like the expression itself:
# whoever has to say so may be asking for help, and one kind sentence too many costs less than one too few.
# tests/crisis_sentences.py is what the lists are measured on; docs/safety.md gives the figures.
EXPLICIT_SIGNS = (
    r"(?<![기풀])죽[고구꼬](?:싶|십(?!년)|씹|파|퍼|프|픔|만싶|시[퍼포프ㅍ]|ㅅㅍ)",
    r"주꼬[싶십시]|듁고[싶십시]|주거버[리릴]|주글[래께]|[뒤디뒈]지[고구][싶십시]",
    r"죽어버리[고면]|죽어버릴|죽어버렸으면|죽었으면(?:좋|해|[싶십])|죽어도(?:상관|괜찮)|죽어야(?:만|해|하|겠|돼|되|모두|다들|끝)",
    r"죽을(?:래|게요|결심|생각|궁리|준비|용기|방법)|죽는(?:방법|법)|죽기로(?:했|결|마음)|죽으려(?:고|는|다|했|합)",
    r"죽는(?:게|것이|편이)(?:더)?(?:낫|나을|나아|나은|좋|편)|죽으면(?:다(?!시)|끝|편|모두|좋|그만|행복)",
    r"(?:아프지않게|안아프게|편하게|고통없이|쉽게)죽|죽음(?:만|을)(?:생각|택|선택|준비)",
    r"(?<![서랑과와자에])(?<![서랑과와자에] )살고[싶십시]지(?:도|가|는)?[않안]",
    r"(?<![서랑과와자에기])(?<![서랑과와자에기] )살기(?:가|도)?[싫시]",
    r"(?:그만|더는|더이상)살(?:고[싶십]|기|래|수)|살(?:아갈)?(?:이유|가치|자격)(?:가|도|를)?(?:없|하나도|모르)",
    r"목숨을?.{0,5}(?:끊|버리|던지|놓)|몸에상처를?(?:내|냈|낼)|(?:스스로|[제내]손으로)(?:목숨|생을|삶을|죽)",
    r"(?:이삶|내삶|생|인생|목숨)을?(?:마감|끝내(?!주|줘|줬)|끝낼|끝장)|세상을?(?:떠나고|떠날|등지|하직)",
    r"극단적인?(?:선택|생각|시도)|음독|투신|농약을?(?:마시|먹|삼키)|번개탄을?(?:피우|피워)|번개탄.{0,8}죽|연탄을?피우고",
    r"뛰어내리(?:고|려|면)[싶십시했죽고편]|뛰어내릴(?:까|래|거|것|생각)|(?:한강|강물|바다|물|차|차도)에?뛰어들고[싶십시]",
    r"(?:창문|옥상|다리|베란다|난간|건물|아파트|한강).{0,6}뛰어(?:내리고|내릴|내려죽|들고|들까)|뛰어내리고[싶십시]",
    r"(?:손목|팔목|팔|허벅지)(?:을|를|도|에)?(?:또)?(?:그[었으을]|긋)|(?:스스로|자신|나|저)[를을]칼로",
    r"(?<!에)(?<!에 )목을(?:매|맬|맸|조르고)|목매(?:달고[싶십시]|달아죽|고[싶십시]|려고)",
    r"(?:약|수면제|진통제)(?:을|를)?.{0,4}(?:한꺼번에|한번에|잔뜩|한움큼)(?:먹|삼키|털어)",
    r"약(?:을|를)?(?:다|전부|모두)(?:먹어버리|먹을까|먹고죽|먹고[싶십시]|털어)",
    r"ㅈㄱㅅㅍ|suicide|自殺",
)
# With nothing in between, or a word that makes it one: 혼자 살아요 and 자, 해 볼까 hold these letters too.
EXPLICIT_WORDS = (
    r"(?<![혼여남감피과의모상사각투부환])자살(?!골)",
    r"(?<![가-힣])자~살(?=~(?:하|할|해|했|생각|시도|충동|각|고민|마렵|$))",
    r"(?<![가-힣])자해(?!공갈|석)|(?<![가-힣])자~해~(?:했|하고|충동)",
    r"(?<![ㄱ-ㅎ])ㅈ~ㅅ(?!~ㅈ|~합니|~요)(?![ㄱ-ㅎ])|(?<![ㄱ-ㅎ])ㅈㅎ~(?:했|하고|또|충동)",
)
INDIRECT_SIGNS = (
    r"(?:짐|물건|아끼던것|가진것|옷|책)(?:을|를)?.{0,10}(?:다|모두|전부)나(?:눠|누어)[줬주]|아끼던.{0,12}나눠[줬주]",
    r"(?:주변|신변|물건|인생|삶)(?:을|를)?(?:다|모두|전부)?정리(?:를)?(?:다)?(?:했|하고있|해놨|해놓|할)",
    r"(?:이제|곧|다)편해질(?:것|거|수)|(?<![가-힣])유서(?!깊|있|가깊)|마지막(?:으로)?(?:인사|목소리|부탁|편지|연락)|작별인사",
    r"그동안(?:정말|다들|모두)?고마웠|(?:사라|없어)지고[싶십시]|사라졌으면|없어졌으면|(?:내가|제가|나|저)(?:하나)?없어[지져졌]",
    r"[저나제내]가?(?:만|하나)?없(?:으면|어도|는게|어야).{0,8}(?:행복|편|잘|나을|돌아|좋|낫)|(?:짐|폐|부담)(?:만|이)(?:돼|되|될|끼)",
    r"영원히(?:잠|자고|쉬고)|(?:다시|영영)(?:는)?(?:안|못)?(?:깨어나지|깨지|일어나지)[않안]|깨어나지[않안]|눈을?뜨지[않안]았으면|안깨어났으면",
    r"(?:내일|아침)이?오지[않안]았으면|태어나지(?:말|[않안]았)|왜태어났|왜사는지|왜살아야|살아서뭐|살아봤자",
    r"(?:사는|살아있는|살아가는|살|삶의)(?:게|것이|이유|의미)?(?:아무|전혀)?(?:의미|이유)(?:가|도|를)?(?:없|모르)",
    r"버틸(?:힘|자신|수)(?:이|가|도)?없|(?:더는|더이상)(?:은)?(?:못|안)?(?:버티|견디|버틸|견딜)|못버티겠",
    r"(?:다|전부|모두|모든걸|모든것을)(?:포기|내려놓|끝내|놓아버|그만두)[하고려]?.{0,2}[싶십시]|그만하고[싶십시].{0,4}(?:전부|다|모두)",
    r"(?:고통|괴로움|아픔)을?(?:끝내|멈추|그만)|희망(?:이|도)(?:하나도|전혀|더)?없|살아도(?:달라질|나아질)|끝이안보|자리(?:가|는)?(?:어디에도)?없|숨쉬는것(?:도|조차)(?:지|힘|싫)",
    r"비밀번호(?:를|도)?.{0,4}적어|(?:강아지|고양이|아이|애들|동생|가족|엄마)(?:를|을)?(?:잘)?부탁해",
    r"(?:곁으로|따라|하늘나라로?|하늘로)(?:가고|갈래|가버리고)[싶십시]?|따라가고[싶십시]",
    r"옥상에(?:혼자)?(?:올라|서있)|(?:다리위|난간)에.{0,4}(?:서|올라)|약을?.{0,8}모(?:으고|아두|아뒀|았)|영정|[내제]장례",
    r"(?:나를|저를|날)(?:찾|기다리)지[마말]|미리인사|그대로(?:끝났|잠들었|멈췄)으면|(?:떠난|떠나|죽은|사라진)(?:걸|줄|것도?)(?:도)?모를|다시는?못볼(?:것|거)|혼자(?:조용히)?떠나고",
)
# Said every day, and not meant.
IDIOMS = (
    r"너(?:진짜|정말)?죽을래|[겨파워려퍼아어]서?죽으려[고는]",
    r"한강에?(?:산책|소풍|치킨|자전거)",
)

SEPARATORS = re.compile(r"[\W\d_]+")
SEPARATOR = " ?"  # in a text whose separators have become one space
CONSONANTS = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
VOWELS = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
FINALS = "\0ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"
# NFKC turns a lone ㅈ into the first letter of a syllable (U+110C); patterns and people write it as U+3148.
LONE_LETTERS = {0x1100 + at: letter for at, letter in enumerate(CONSONANTS)}
LONE_LETTERS |= {0x1161 + at: letter for at, letter in enumerate(VOWELS)}
# 쥭고 싶어 for 죽고 싶어: ㅑ ㅕ ㅛ ㅠ count as ㅏ ㅓ ㅗ ㅜ.
PLAIN_VOWELS = {2: 0, 6: 4, 12: 8, 17: 13}


class Signal(StrEnum):
    """What in a person's words opens the crisis lane."""

    EXPLICIT = "explicit"
    INDIRECT = "indirect"


# The number is written twice: 109 for the eye, 일공구 for a voice that would read it as a quantity.
HELPLINE = "자살예방 상담전화 109, 일공구"
CARE = {
    Signal.EXPLICIT: f"그만큼 힘드셨군요. 말해 주셔서 고마워요. 혼자 견디지 마시고 {HELPLINE}로 전화해 주세요. "
    "밤이든 낮이든 무료로 이야기를 들어 드려요. 지금 위험하다면 바로 119를 눌러 주세요. ",
    Signal.INDIRECT: f"그 말씀에 마음이 쓰여요. 많이 지치셨다면 {HELPLINE}에서 언제든 무료로 이야기를 들어 드려요. ",
}

# Said in place of words that the model's safety filter held back; a refusal would be the worst answer then.
BLOCKED_REPLY = (
    "이 이야기는 제가 이어서 답해 드리기가 조심스러워요. "
    "그래도 힘든 마음을 혼자 견디지는 않으셨으면 해요. "
    f"{HELPLINE}에서는 밤이든 낮이든 무료로 이야기를 들어 드려요. "
    "지금 위험한 상황이라면 바로 119에 전화해 주세요."
)


def _plain(text: str) -> str:
    """Normalise text for matching: compatibility forms, lone letters, simple vowels, small Latin letters."""
    text = re.sub(r"(?<=[ㄱ-ㅎ])[\W_]{1,3}(?=[ㅏ-ㅣ])", "", text)
    text = unicodedata.normalize("NFKC", text).translate(LONE_LETTERS).lower()
    return re.sub("[가-힣]", lambda match: _plain_vowel(match[0]), text)


def _plain_vowel(syllable: str) -> str:
    first, rest = divmod(ord(syllable) - 0xAC00, 21 * 28)
    vowel, final = divmod(rest, 28)
    return chr(0xAC00 + (first * 21 + PLAIN_VOWELS.get(vowel, vowel)) * 28 + final)


def _joined(text: str) -> str:
    """Draw a lone consonant into the syllable before it: 사ㄹ becomes 살."""

    def join(match: re.Match[str]) -> str:
        syllable, consonant = match[0][0], match[0][1]
        open_ended = (ord(syllable) - 0xAC00) % 28 == 0 and consonant in FINALS
        return chr(ord(syllable) + FINALS.index(consonant)) if open_ended else match[0]

    return re.sub("[가-힣][ㄱ-ㅎ]", join, text)


def _spread(expression: str) -> str:
    """Let separators stand between any two letters of an expression, also before what it must not go on with."""
    spread, open_end = "", False
    for token in re.findall(r"\(\?<!.*?\)|\(\?[:!]|\[.*?\]|.", expression):
        letter = token[0] == "[" or re.match("[가-힣ㄱ-ㅎ]", token) is not None
        if token == "(?!":
            token += SEPARATOR
        elif open_end and (letter or token == "(?:"):
            spread += SEPARATOR
        spread += token
        open_end = letter or (token in ")?" and (open_end or token == ")"))
    return spread


def _compiled(signs: Sequence[str], words: Sequence[str] = ()) -> re.Pattern[str]:
    """Compile lists of expressions: separators may stand between the letters of signs, and at each ~ of words."""
    spread = [_spread(_plain(sign)) for sign in signs]
    return re.compile("|".join([*spread, *(_plain(word).replace("~", SEPARATOR) for word in words)]))


_EXPLICIT = _compiled(EXPLICIT_SIGNS, EXPLICIT_WORDS)
_INDIRECT = _compiled(INDIRECT_SIGNS)
_IDIOM = _compiled(IDIOMS)


def crisis_signal(message: str) -> Signal | None:
    """Return what in a message speaks of suicide or self-harm, openly or by a sign; None where nothing does."""
    plain = _IDIOM.sub(" ", SEPARATORS.sub(" ", _plain(message)))
    texts = {plain, _joined(plain)}
    if any(_EXPLICIT.search(text) for text in texts):
        return Signal.EXPLICIT
    return Signal.INDIRECT if any(_INDIRECT.search(text) for text in texts) else None

"""What in a person's words asks for a helpline, and the prepared sentences that answer it.

A linear model over short runs of letters decides: care/train.py learns it from the labelled sentences in care/, and
docs/safety.md says what it finds and what it misses. ``python -m bemore.care "문장"`` shows what spoke for a signal.
"""

from __future__ import annotations

import codecs
import itertools
import math
import operator
import re
import sys
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Signal(StrEnum):
    """What a person's words are a sign of."""

    EXPLICIT = "explicit"  # own suicidal thoughts, plans, means, attempts, self-harm, acute danger
    INDIRECT = "indirect"  # warning signs that do not name death
    VIOLENCE = "violence"  # wants to kill or hurt somebody else


# Helpline sentences: at most three, no promise that a call is answered, no method, no refusal. 109 is followed by its
# spelling, because a voice would read the figures as a quantity. Each ends with a space, because more follows.

HELPLINE = "자살예방 상담전화 109, 일공구"
FIRST = {
    Signal.EXPLICIT: f"많이 힘드셨을 텐데 말해 주셔서 고마워요. 24시간 {HELPLINE}로 전화하거나 문자를 보내 주세요. "
    "당장 위험하면 그 자리를 벗어나 119나 112에 전화해 주세요. ",
    Signal.INDIRECT: "그 말씀이 마음에 걸려요. "
    f"혼자 감당하기 벅차거나 죽고 싶은 마음이 든다면, {HELPLINE}로 전화하거나 문자를 보내 보세요. ",
    # An attacker, a victim and a parent with an intrusive thought may each hear this one.
    Signal.VIOLENCE: "마음이 많이 괴로우시겠어요. 누구도 다치지 않게, 우선 그 자리에서 떨어져 안전한 곳으로 가 주세요. "
    "위험하면 바로 112에, 이야기할 곳이 필요하면 24시간 상담전화 109, 일공구로 전화해 주세요. ",
}
# For a session in which the first form was said before.
SHORT = {
    Signal.EXPLICIT: f"계속 말해 주셔서 고마워요. {HELPLINE}에 전화나 문자로 연락해 주세요. "
    "당장 위험하면 119나 112에 전화해 주세요. ",
    Signal.INDIRECT: f"지금도 많이 힘드시군요. {HELPLINE}에 전화나 문자로 연락해 보세요. ",
    Signal.VIOLENCE: "우선 그 자리에서 떨어져 안전한 곳으로 가 주세요. "
    "위험하면 112에, 이야기할 곳이 필요하면 109, 일공구로 전화해 주세요. ",
}
# Replaces words that the model's safety filter held back.
BLOCKED = "꺼내기 어려운 이야기를 해 주셨네요. "
BLOCKED_REPLY = (
    f"{BLOCKED}혼자 감당하기 벅차시면 {HELPLINE}에, 폭력을 겪고 계시면 1366, 일삼육육에 전화해 보세요. "
    "당장 위험하면 119나 112에 전화해 주세요."
)
# Used when the helpline sentence of the same turn has named the numbers.
BLOCKED_SHORT = f"{BLOCKED}지금 곁에 함께 있어 줄 사람이 있나요?"
# Helpline sentences of earlier versions, which stored replies may hold.
FORMER = {
    Signal.EXPLICIT: (
        f"많이 힘드셨겠어요. 말해 주셔서 고마워요. {HELPLINE}로 전화해 주세요. "
        "24시간 무료예요. 당장 위험하다면 119에 전화해 주세요.",
        f"말해 주셔서 고마워요. {HELPLINE}, 급하면 119에 지금 전화해 주세요.",
    ),
    Signal.INDIRECT: (
        f"그 말씀에 마음이 쓰여요. 혼자 감당하기 벅차시면 {HELPLINE}로 전화해 보세요.",
        f"여전히 많이 힘드시군요. {HELPLINE}로 전화해 보세요.",
    ),
    Signal.VIOLENCE: (
        *(
            f"{opening} 지금은 그 사람에게서, 다치게 할 수 있는 물건에서 떨어져 주세요. "
            f"누군가 위험하다면 112에, 이야기할 곳이 필요하면 {HELPLINE}로 전화해 주세요."
            for opening in ("많이 화가 나고 괴로우시겠어요.", "그만큼 화가 나고 괴로우시군요.")
        ),
        f"우선 그 자리에서 떨어져 주세요. 위험하면 112, 이야기는 {HELPLINE}로 할 수 있어요.",
    ),
}


# Letters: a text as it sounds, so that spelling, spaces and signs between letters make little difference

INITIALS = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
VOWELS = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
FINALS = " ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"
PARTS = {
    "ㄲ": "ㄱㄱ", "ㄸ": "ㄷㄷ", "ㅃ": "ㅂㅂ", "ㅆ": "ㅅㅅ", "ㅉ": "ㅈㅈ", "ㄳ": "ㄱㅅ", "ㄵ": "ㄴㅈ", "ㄶ": "ㄴㅎ",
    "ㄺ": "ㄹㄱ", "ㄻ": "ㄹㅁ", "ㄼ": "ㄹㅂ", "ㄽ": "ㄹㅅ", "ㄾ": "ㄹㅌ", "ㄿ": "ㄹㅍ", "ㅀ": "ㄹㅎ", "ㅄ": "ㅂㅅ",
}  # fmt: skip
# 쥭고 for 죽고, 되요 for 돼요: vowels that are taken for one another.
ALIKE = dict(zip("ㅐㅒㅖㅑㅕㅛㅠㅙㅚㅞㅢㅟ", "ㅔㅔㅔㅏㅓㅗㅜㅔㅔㅔㅣㅣ", strict=True))
# What lies on a Korean keyboard where a Latin letter lies: wnrrh tlvek is 죽고 싶다 with the keyboard switched.
KEYS = dict(zip("qwertyuiopasdfghjklzxcvbnm", "ㅂㅈㄷㄱㅅㅛㅕㅑㅐㅔㅁㄴㅇㄹㅎㅗㅓㅏㅣㅋㅌㅊㅍㅠㅜㅡ", strict=True))
SOUNDS = "".join(dict.fromkeys("".join(PARTS.get(letter, ALIKE.get(letter, letter)) for letter in INITIALS + VOWELS)))
START, PAUSE, OTHER = b"\x01", b"\x02", b"\x03"
# NFKC turns a lone ㅈ into the first letter of a syllable (U+110C); people write it as U+3148.
LONE = {0x1100 + at: letter for at, letter in enumerate(INITIALS)}
LONE |= {0x1161 + at: letter for at, letter in enumerate(VOWELS)}


def sound(letters: str) -> bytes:
    """Return letters as one byte a sound."""
    parts = "".join(PARTS.get(letter, ALIKE.get(letter, letter)) for letter in letters)
    return bytes(16 + SOUNDS.index(part) for part in parts)


def sounds_of_syllable(number: int) -> bytes:
    """Return a syllable's sounds, by its number from 가 on; a silent ㅇ is none, so that 싶어 is 시퍼."""
    initial, rest = divmod(number, 21 * 28)
    vowel, final = divmod(rest, 28)
    return sound((INITIALS[initial].replace("ㅇ", "") + VOWELS[vowel] + FINALS[final]).rstrip())


SOUND = {chr(0xAC00 + number): sounds_of_syllable(number) for number in range(19 * 21 * 28)}
SOUND |= {letter: sound(letter) for letter in INITIALS + VOWELS + FINALS.strip()}
SOUND |= {key: sound(letter) for key, letter in KEYS.items()}
SOUND |= {" ": b"", "0": b"", "|": PAUSE}

# All else is a space: no letter of another script says anything here, and one (U+FDFA) would become 18.
UNHEARD = re.compile(
    "[^0-9A-Za-z０-９Ａ-Ｚａ-ｚ\u1100-\u11ff\u3131-\u318e가-힣\uffa1-\uffdc㉠-㉻㈀-㈜\u4e00-\u9fff.!?…。~]+"
)


def plain(message: str) -> str:
    """Return a message in simple letters, with a bar where a sentence ends."""
    text = unicodedata.normalize("NFKC", UNHEARD.sub(" ", message)).translate(LONE).lower()
    text = re.sub(r"[.!?。]+", ".", text)  # first, or a long run of them takes the square of its length
    text = re.sub(r"\.(?=\s|$)", "|", text)
    text = re.sub(r"[^\w|]+", " ", re.sub("[0-9]+", "0", text))
    return re.sub(" *\\|[ |]*", "|", text).strip(" |")


# Runs of letters, each hashed into one of as many places as the tables of weights have

SOUND_RUNS, SYLLABLE_RUNS = (3, 4, 6), (1, 2, 3)
BITS = 18
PLACES = 1 << BITS


def places(stream: bytes, run: int, width: int, seed: int) -> list[int]:
    """Return the place of the run that begins at each letter of a stream, whose letters have `width` bytes."""
    mask, size, padded = PLACES - 1, run * width, stream + bytes((run - 1) * width)
    return [zlib.crc32(padded[at : at + size], seed) & mask for at in range(0, len(stream), width)]


@dataclass(frozen=True, slots=True)
class Runs:
    """A message's runs: in `sounds` and `syllables` a list for each length, of one place a letter."""

    text: str
    offsets: Sequence[int]  # of each letter of the text among the sounds, and of the end
    sounds: Sequence[Sequence[int]]
    syllables: Sequence[Sequence[int]]


def runs_of(message: str) -> Runs:
    """Read a message: its text, and the places of its runs."""
    text = " " + plain(message)
    heard = [START, *(SOUND.get(letter, OTHER) for letter in text[1:])]
    stream, written = b"".join(heard), text.encode("utf-16-le", "replace")
    return Runs(
        text,
        [0, *itertools.accumulate(map(len, heard))],
        [places(stream, run, 1, run) for run in SOUND_RUNS],
        [places(written, run, 2, 100 + run) for run in SYLLABLE_RUNS],
    )


# Windows: one sentence in a long story counts whole

LONG = 60  # letters of a sentence that is read in parts
PART, STEP = 36, 9  # letters


def windows(text: str) -> Iterator[tuple[int, int]]:
    """Yield the parts of a text to be judged: all of it, each sentence, two sentences at a time, parts of long ones."""
    ends = [at for at, letter in enumerate(text) if letter == "|"]
    bounds = [0, *(at + 1 for at in ends), len(text)]
    yield 0, len(text)
    for first, (start, end) in enumerate(itertools.pairwise(bounds)):
        if len(bounds) > 2:
            yield start, end
        if len(bounds) > 3 and first + 2 < len(bounds):
            yield start, bounds[first + 2]
        if end - start > LONG:
            for at in range(start, end - PART + STEP, STEP):
                yield at, min(at + PART, end)


def weight_of_length(runs: int) -> float:
    """Return what a sum over so many runs is multiplied with: long windows gather more of everything."""
    return 8.0 / math.pow(max(runs, 1), 0.4)


# The model

WEIGHTS = Path(__file__).with_name("care.bin")
ZERO = 128  # the weight of a run that says nothing: a byte has no sign, and a table of signed numbers is slower to read
# Scores over which a window raises a signal of each kind, chosen by what care/measure.py finds: lower ones find more,
# and cost more false alarms. A part of a message must score more, since a long one has many.
THRESHOLDS = {Signal.EXPLICIT: 0.3, Signal.INDIRECT: 0.7, Signal.VIOLENCE: 0.4}
OF_A_PART = 1.6
# Words that leave little doubt, whatever stands around them, count for so much. Everyday words that hold the same
# letters (혼자 살다, 기죽고) do not.
UNMISTAKABLE = re.compile(
    r"(?<![혼여남감피과의모상사각투부환])자살(?!골)|(?<![가-힣])자해(?!공갈|석)|(?<![기풀])죽고(?:만|도)?(?:싶|픈|퍼|시[퍼프픈])"
    r"|목숨을?끊|극단적인?(?:선택|생각|시도)|죽으려고?(?:했|해|합|하)|죽을(?:래|결심|생각|방법)|죽어버리고|죽었으면좋"
    r"|뛰어내리고싶|살고싶지[가는도]?않|살기싫"
)
BONUS = 3.0


def bonus(text: str) -> float:
    return BONUS if UNMISTAKABLE.search(re.sub("[ |0]", "", text)) else 0.0


class Head:
    """One linear judgement: a weight for each place, in steps above and below ZERO, the size of a step, a bias."""

    def __init__(self, weights: bytes, scale: float, bias: float) -> None:
        self.weights = weights
        self.scale = scale
        self.bias = bias

    def sums(self, runs: Sequence[Sequence[int]]) -> list[int]:
        """Return the sum of the weights of all runs that begin before each letter, and before the end."""
        first, *others = (map(self.weights.__getitem__, column) for column in runs)
        for other in others:
            first = map(operator.add, first, other)
        return list(itertools.accumulate(first, initial=0))


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a window of a message was taken for, by which score, and where it lies in Runs.text."""

    signal: Signal
    score: float  # over the threshold
    start: int
    end: int


class Detector:
    """Judges messages by a file of weights: how much a sign, how much of violence, how explicit."""

    def __init__(self, data: bytes) -> None:
        head, _, packed = data.partition(b"\n")
        numbers = [float(number) for number in head.split()]
        tables = zlib.decompress(packed)
        self.risk, self.violence, self.explicit = (
            Head(tables[at * PLACES : (at + 1) * PLACES], numbers[2 * at], numbers[2 * at + 1]) for at in range(3)
        )

    def judgements(self, message: str) -> list[Judgement]:
        """Return all windows of a message that raise a signal."""
        runs = runs_of(message)
        risk, least = Scores(self.risk, runs), min(THRESHOLDS.values()) - bonus(runs.text)
        suspect = [(score, *window) for window in windows(runs.text) if (score := risk.of(*window)) > least]
        if not suspect:
            return []
        violence, explicit = Scores(self.violence, runs), Scores(self.explicit, runs)
        found = []
        for score, start, end in suspect:
            added = bonus(runs.text[start:end])
            own = Signal.EXPLICIT if added or explicit.of(start, end) > 0 else Signal.INDIRECT
            signal = Signal.VIOLENCE if violence.of(start, end) > 0 else own
            threshold = THRESHOLDS[signal] + (0 if end - start == len(runs.text) else OF_A_PART)
            if score + added > threshold:
                found.append(Judgement(signal, score + added - threshold, start, end))
        return found

    def signal_in(self, message: str) -> Signal | None:
        return most_urgent(self.judgements(message))


def most_urgent(judgements: Sequence[Judgement]) -> Signal | None:
    signals = {judgement.signal for judgement in judgements}
    return next((signal for signal in (Signal.EXPLICIT, Signal.VIOLENCE, Signal.INDIRECT) if signal in signals), None)


class Scores:
    """One head's scores of a message's windows, each by two subtractions."""

    def __init__(self, head: Head, runs: Runs) -> None:
        self._head = head
        self._offsets = runs.offsets
        self._sounds = head.sums(runs.sounds)
        self._syllables = head.sums(runs.syllables)

    def of(self, start: int, end: int) -> float:
        """Return the score of a window."""
        return self.share(start, end, start, end) + self._head.bias

    def share(self, start: int, end: int, first: int, last: int) -> float:
        """Return what a part gives to the score of the window from `first` to `last`."""
        total = self._sounds[self._offsets[end]] - self._sounds[self._offsets[start]]
        total += self._syllables[end] - self._syllables[start]
        total -= ZERO * self._number(start, end)
        return total * self._head.scale * weight_of_length(self._number(first, last))

    def _number(self, start: int, end: int) -> int:
        """Count the runs that begin in a part."""
        sounds = self._offsets[end] - self._offsets[start]
        return sounds * len(SOUND_RUNS) + (end - start) * len(SYLLABLE_RUNS)


DETECTOR = Detector(WEIGHTS.read_bytes())
codecs.lookup("utf-16-le")  # else loaded at a person's first words, which a process without free files could not


def signal_in(message: str) -> Signal | None:
    """Return what in a message asks for a helpline; None where nothing does.

    Up to 1 ms for 100 characters and 15 ms for 2,000, whatever they are.
    """
    return DETECTOR.signal_in(message)


def main(messages: Sequence[str]) -> None:
    """Print the signal of each message, and what spoke for it: words by the weight of the runs that begin in them."""
    for message in messages:
        runs, judgements = runs_of(message), DETECTOR.judgements(message)
        print(f"{most_urgent(judgements) or 'none'}: {message}")  # noqa: T201
        for judgement in judgements:
            spoke = ", ".join(f"{word} {share:+.1f}" for word, share in shares(runs, judgement))
            print(f"  {judgement.signal} by {judgement.score:.2f}: {spoke}")  # noqa: T201


def shares(runs: Runs, judgement: Judgement) -> list[tuple[str, float]]:
    """Return the words of a window with what each gave to the score, the weightiest first."""
    scores, window = Scores(DETECTOR.risk, runs), (judgement.start, judgement.end)
    found = re.compile("[^ |]+").finditer(runs.text, *window)
    words = [(match[0], scores.share(match.start(), match.end(), *window)) for match in found]
    return sorted(words, key=lambda word: -word[1])


if __name__ == "__main__":
    main(sys.argv[1:])

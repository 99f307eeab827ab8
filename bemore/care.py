"""The word detector, which finds the words that ask for a helpline, and the helpline sentences that answer them.

A linear model over short runs of letters judges the parts of a message. How much evidence it must find depends on the
anchors (bemore/anchors.py) that the part holds. care/train.py trains the model on the labelled sentences in care/, and
docs/safety.md says what it finds and misses. ``python -m bemore.care "문장"`` shows what spoke for a signal.
"""

from __future__ import annotations

import codecs
import itertools
import math
import operator
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from bemore.anchors import Tier, anchors_in
from bemore.sounds import START, heard, plain


class Signal(StrEnum):
    """What a person's words are a sign of.

    EXPLICIT: own suicidal thoughts, plans, means, attempts, self-harm. INDIRECT: warning signs that do not name death.
    VIOLENCE: the wish to hurt somebody else.
    """

    EXPLICIT = "explicit"
    INDIRECT = "indirect"
    VIOLENCE = "violence"


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
    # The sounds of each letter of the text.
    heard: Sequence[bytes]
    # The number of the first sound of each letter, and of all sounds.
    offsets: Sequence[int]
    sounds: Sequence[Sequence[int]]
    syllables: Sequence[Sequence[int]]


def runs_of(message: str) -> Runs:
    """Read a message: its text, and the places of its runs."""
    text = " " + plain(message)
    letters = [START, *heard(text[1:])]
    stream, written = b"".join(letters), text.encode("utf-16-le", "replace")
    return Runs(
        text,
        letters,
        [0, *itertools.accumulate(map(len, letters))],
        [places(stream, run, 1, run) for run in SOUND_RUNS],
        [places(written, run, 2, 100 + run) for run in SYLLABLE_RUNS],
    )


# Windows: the parts of a message that are judged, so that one sentence in a long story counts whole

# Letters of the longest window: what stands far from a sign says nothing about it.
LONGEST = 80
# Letters of a sentence that is also read in parts.
LONG = 60
PART, STEP = 36, 9


def windows(text: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of the text, its sentences and pairs of sentences, and of parts of long sentences."""
    ends = [at + 1 for at, letter in enumerate(text) if letter == "|"]
    bounds = [0, *ends, len(text)]
    sentences = [*itertools.pairwise(bounds)]
    pairs = zip(bounds, bounds[2:], strict=False)
    for start, end in dict.fromkeys([(0, len(text)), *sentences, *pairs]):
        if end - start <= LONGEST:
            yield start, end
    for start, end in sentences:
        if end - start > LONG:
            for at in range(start, end - PART + STEP, STEP):
                yield at, min(at + PART, end)


def weight_of_length(runs: int) -> float:
    """Return what a sum over so many runs is multiplied with: long windows gather more of everything."""
    return 8.0 / math.pow(max(runs, 1), 0.4)


# The model

WEIGHTS = Path(__file__).with_name("care.bin")
# The weight of a run that says nothing. A byte has no sign, and a table of signed numbers is slower to read.
ZERO = 128
# Scores over which a window raises each signal: without an anchor, beside a weak one, beside a strong one. They were
# chosen on the real talk that docs/safety.md names; lower ones find more, and cost more false alarms.
THRESHOLDS = {
    Signal.EXPLICIT: (3.0, 0.7, -0.6),
    Signal.INDIRECT: (4.8, 2.0, 0.9),
    Signal.VIOLENCE: (1.6, 0.5, 0.2),
}
# What a window must pass to be a signal of any kind, by the tier of its anchors.
LEAST = [min(thresholds[tier] for thresholds in THRESHOLDS.values()) for tier in Tier]
# A part of a message must score more than a whole message, because a long message has many parts.
OF_A_PART = 1.1
# What is added to a threshold, by tier, times the logarithm of the number of windows: in many, one may score by chance.
OF_MANY = (1.2, 0.6, 0.0)
LATIN = re.compile("[a-z]")


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


class Anchors:
    """The anchors of a message, counted so that a window finds its own in two subtractions."""

    def __init__(self, runs: Runs) -> None:
        begins = {Tier.WEAK: [0] * len(runs.text), Tier.STRONG: [0] * len(runs.text)}
        for anchor in anchors_in(runs.heard):
            begins[anchor.tier][anchor.start] = 1
        self._before = [list(itertools.accumulate(counts, initial=0)) for counts in begins.values()]

    def tier(self, start: int, end: int) -> Tier:
        """Return the tier of the strongest anchor that begins in a window."""
        weak, strong = (before[end] - before[start] for before in self._before)
        return Tier.STRONG if strong else Tier.WEAK if weak else Tier.NONE


@dataclass(frozen=True, slots=True)
class Judgement:
    """A window of a message that raised a signal, by how much it passed the threshold, and where it lies."""

    signal: Signal
    score: float
    start: int
    end: int


class Detector:
    """Judges messages by a file of weights: is there a sign, is it one of violence, is it explicit."""

    def __init__(self, data: bytes) -> None:
        head, _, packed = data.partition(b"\n")
        numbers = [float(number) for number in head.split()]
        tables = zlib.decompress(packed)
        self.risk, self.violence, self.explicit = (
            Head(tables[at * PLACES : (at + 1) * PLACES], numbers[2 * at], numbers[2 * at + 1]) for at in range(3)
        )

    def judgements(self, message: str) -> Iterator[Judgement]:
        """Yield the windows of a message that raise a signal."""
        runs = runs_of(message)
        risk = Scores(self.risk, runs)
        # Needed for few messages, and therefore made at the first window that asks for them.
        anchors, kinds = None, None
        spans = list(windows(runs.text))
        for start, end in spans:
            score = risk.of(start, end) - (0 if end - start == len(runs.text) else OF_A_PART)
            if score <= min(LEAST):
                continue
            anchors = anchors or Anchors(runs)
            tier = anchors.tier(start, end)
            score -= OF_MANY[tier] * math.log(len(spans))
            if score <= LEAST[tier] or (tier is Tier.NONE and mostly_latin(runs.text[start:end])):
                continue
            kinds = kinds or (Scores(self.violence, runs), Scores(self.explicit, runs))
            violence, explicit = (scores.of(start, end) > 0 for scores in kinds)
            signal = Signal.VIOLENCE if violence else Signal.EXPLICIT if explicit else Signal.INDIRECT
            if score > THRESHOLDS[signal][tier]:
                yield Judgement(signal, score - THRESHOLDS[signal][tier], start, end)

    def signal_in(self, message: str) -> Signal | None:
        return most_urgent(self.judgements(message))


def mostly_latin(text: str) -> bool:
    """Tell whether most of a text is not Korean, of which the model knows only what holds an anchor."""
    return 2 * len(LATIN.findall(text)) > len(text)


def most_urgent(judgements: Iterable[Judgement]) -> Signal | None:
    """Return the signal to answer; read no further than the first explicit one, which is the most urgent."""
    signals = set()
    for judgement in judgements:
        if judgement.signal is Signal.EXPLICIT:
            return judgement.signal
        signals.add(judgement.signal)
    return Signal.VIOLENCE if Signal.VIOLENCE in signals else Signal.INDIRECT if signals else None


DETECTOR = Detector(WEIGHTS.read_bytes())
# Python would load this codec at the first message, which a process without free files could not.
codecs.lookup("utf-16-le")


def signal_in(message: str) -> Signal | None:
    """Return what in a message asks for a helpline; None where nothing does.

    Up to 1 ms for 100 characters and 15 ms for 2,000, whatever they are.
    """
    return DETECTOR.signal_in(message)


def main(messages: Sequence[str]) -> None:
    """Print the signal of each message, and what spoke for it: anchors, and words by the weight of their runs."""
    for message in messages:
        runs, judgements = runs_of(message), list(DETECTOR.judgements(message))
        anchors = list(anchors_in(runs.heard))
        print(f"{most_urgent(judgements) or 'none'}: {message}")  # noqa: T201
        for judgement in judgements:
            held = [anchor for anchor in anchors if judgement.start <= anchor.start < judgement.end]
            words = ", ".join(f"{word} {share:+.1f}" for word, share in shares(runs, judgement))
            named = ", ".join(f"{anchor.word} ({anchor.tier.name.lower()})" for anchor in held) or "none"
            print(f"  {judgement.signal} by {judgement.score:.2f}: {words}; anchors: {named}")  # noqa: T201


def shares(runs: Runs, judgement: Judgement) -> list[tuple[str, float]]:
    """Return the words of a window with what each gave to the score, the weightiest first."""
    scores, window = Scores(DETECTOR.risk, runs), (judgement.start, judgement.end)
    found = re.compile("[^ |]+").finditer(runs.text, *window)
    words = [(match[0], scores.share(match.start(), match.end(), *window)) for match in found]
    return sorted(words, key=lambda word: -word[1])


if __name__ == "__main__":
    main(sys.argv[1:])

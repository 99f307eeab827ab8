"""Learn bemore/care.bin from the labelled sentences in care/*.tsv; the same sentences give the same file.

    .venv/bin/python care/train.py

Needs requirements-dev.txt (scikit-learn). Three linear judgements, each a logistic regression over the runs of letters
that bemore/care.py reads: is this a sign at all; of violence rather than of a danger to oneself; explicit rather than
indirect. Weights are rounded to a few steps, which costs nothing measurable, and packed.
"""

import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from bemore import care  # noqa: E402
from bemore.sounds import plain  # noqa: E402

# For each set by name its rows: group and sentence.
Sets = Mapping[str, Sequence[tuple[str, str]]]

SIGNS = {
    "explicit": care.Signal.EXPLICIT,
    "obfuscated": care.Signal.EXPLICIT,
    "indirect": care.Signal.INDIRECT,
    "homicidal": care.Signal.VIOLENCE,
}
# A worry about somebody else is left to the model. Of the group "negated" (죽고 싶지 않아요) either answer is right, so
# that it teaches nothing.
HARMLESS = ("neutral", "idiom", "death_grief", "others")
# The signs in this set are one sentence of several: only its harmless stories teach, sentence by sentence.
STORIES = "stories"

# The inverse of the regularisation.
STRENGTH = 0.3
# A run must occur in so many sentences to have a weight.
LEAST_SENTENCES = 3
# Steps to each side of zero: of the first judgement, and of the two that only name the kind of sign.
STEPS, FEWER_STEPS = 15, 5


def read_sets(folder: Path = HERE) -> dict[str, list[tuple[str, str]]]:
    """Read all sets: one `group<TAB>sentence` a line."""
    sets = {}
    for path in sorted(folder.glob("*.tsv")):
        lines = path.read_text(encoding="utf-8").splitlines()
        sets[path.stem] = [(group, sentence) for group, _, sentence in (line.partition("\t") for line in lines)]
    return sets


def examples(sets: Sets) -> Iterator[tuple[care.Signal | None, str]]:
    """Yield what teaches: a sentence, and the signal that it should raise."""
    for name, rows in sets.items():
        for group, sentence in rows:
            if group in HARMLESS:
                yield None, sentence
                if name == STORIES:
                    yield from ((None, part) for part in plain(sentence).split("|"))
            elif group in SIGNS and name != STORIES:
                yield SIGNS[group], sentence


# Each sentence's runs, which every training shares.
_rows: dict[str, tuple[list[int], float]] = {}


def matrix(sentences: Sequence[str]) -> Any:
    """Return a row a sentence and a column a place, as bemore/care.py weighs a window that is the whole message."""
    indices: list[int] = []
    values: list[float] = []
    starts = [0]
    for sentence in sentences:
        if sentence not in _rows:
            runs = care.runs_of(sentence)
            places = [place for column in (*runs.sounds, *runs.syllables) for place in column]
            _rows[sentence] = places, care.weight_of_length(len(places))
        places, weight = _rows[sentence]
        indices += places
        values += [weight] * len(places)
        starts.append(len(indices))
    rows = sparse.csr_matrix((values, indices, starts), shape=(len(sentences), care.PLACES))
    rows.sum_duplicates()
    return rows


def learn(rows: Any, wanted: Sequence[bool], steps: int) -> tuple[bytes, float, float]:
    """Return the weights of one judgement in steps, the size of a step, and the bias."""
    live = np.flatnonzero(np.asarray((rows > 0).sum(axis=0)).ravel() >= LEAST_SENTENCES)
    model = LogisticRegression(C=STRENGTH, solver="liblinear", dual=True, max_iter=400, random_state=0)
    model.fit(rows[:, live], wanted)
    step = float(4 * model.coef_[0].std() / steps)
    weights = np.full(care.PLACES, care.ZERO, dtype=np.uint8)
    weights[live] = care.ZERO + np.clip(np.round(model.coef_[0] / step), -steps, steps)
    return weights.tobytes(), step, float(model.intercept_[0])


def train(sets: Sets) -> bytes:
    """Return the file that bemore.care.Detector reads."""
    signals, sentences = zip(*examples(sets), strict=True)
    rows = matrix(sentences)
    signs = [at for at, signal in enumerate(signals) if signal is not None]
    own = [at for at in signs if signals[at] is not care.Signal.VIOLENCE]
    heads = [
        learn(rows, [signal is not None for signal in signals], STEPS),
        learn(rows[signs], [signals[at] is care.Signal.VIOLENCE for at in signs], FEWER_STEPS),
        learn(rows[own], [signals[at] is care.Signal.EXPLICIT for at in own], FEWER_STEPS),
    ]
    numbers = " ".join(f"{number:.6g}" for _, step, bias in heads for number in (step, bias))
    return f"{numbers}\n".encode() + zlib.compress(b"".join(weights for weights, *_ in heads), 9)


if __name__ == "__main__":
    data = train(read_sets())
    care.WEIGHTS.write_bytes(data)
    print(f"{care.WEIGHTS.name}: {len(data) / 1024:.0f} KiB")

"""Print, for each set in turn, what is found in it by a detector that learned from all the others.

    .venv/bin/python care/measure.py [--misses 10]

The table is docs/safety.md's. Groups of signs count as found by any signal; in parentheses the share that raised the
very signal. The last columns are false alarms. `--misses` lists sentences that were missed, and that were falsely
raised, the clearest of these first. A set named by --unseen FILE is judged by the detector as it is.
"""

import argparse
import multiprocessing
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from train import HARMLESS, SIGNS, examples, matrix, read_sets, train

from bemore import care

GROUPS = (*SIGNS, "negated", "others", *HARMLESS)
Row = tuple[str, str, care.Signal | None, float]  # group, sentence, what was raised, by how much


def judge(detector: care.Detector, rows: Sequence[tuple[str, str]]) -> list[Row]:
    judged = []
    for group, sentence in rows:
        found = detector.judgements(sentence)
        score = max((judgement.score for judgement in found), default=0.0)
        judged.append((group, sentence, care.most_urgent(found), score))
    return judged


def left_out(name: str) -> tuple[str, list[Row]]:
    """Judge one set by what the others teach."""
    rest = {other: rows for other, rows in SETS.items() if other != name}
    return name, judge(care.Detector(train(rest)), SETS[name])


def cell(rows: list[Row], group: str) -> str:
    raised = [signal for its_group, _, signal, _ in rows if its_group == group]
    if not raised:
        return ""
    found = sum(signal is not None for signal in raised) / len(raised)
    exact = sum(signal is SIGNS.get(group, "") for signal in raised) / len(raised)
    return f"{found:.1%}" + (f" ({exact:.0%})" if group in SIGNS else "") + f" of {len(raised)}"


def print_table(results: dict[str, list[Row]]) -> None:
    print("| set | " + " | ".join(GROUPS) + " |")
    print("|---|" + "--:|" * len(GROUPS))
    everything = [row for rows in results.values() for row in rows]
    for name, rows in [*results.items(), ("all", everything)]:
        print(f"| {name} | " + " | ".join(cell(rows, group) for group in GROUPS) + " |")


def print_misses(results: dict[str, list[Row]], most: int) -> None:
    wrong: dict[str, list[tuple[float, str, str]]] = defaultdict(list)
    for name, rows in results.items():
        for group, sentence, signal, score in rows:
            if (group in SIGNS and signal is None) or (group in HARMLESS and signal is not None):
                wrong[group].append((score, name, sentence))
    for group in (*SIGNS, *HARMLESS):
        for score, name, sentence in sorted(wrong[group], reverse=True)[:most]:
            print(f"{group} ({name}{f', raised by {score:.1f}' if score else ', missed'}): {sentence}")


SETS: dict[str, Sequence[tuple[str, str]]] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--misses", type=int, default=0)
    parser.add_argument("--unseen", type=Path)
    options = parser.parse_args()
    if options.unseen:
        lines = options.unseen.read_text(encoding="utf-8").splitlines()
        rows = [(group, sentence) for group, _, sentence in (line.partition("\t") for line in lines)]
        results = {options.unseen.stem: judge(care.DETECTOR, rows)}
    else:
        SETS.update(read_sets())
        matrix([sentence for _, sentence in examples(SETS)])  # read once, before the processes part
        with multiprocessing.get_context("fork").Pool() as pool:
            results = dict(pool.imap(left_out, SETS))
    print_table(results)
    print_misses(results, options.misses)


if __name__ == "__main__":
    main()

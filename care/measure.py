"""Print what the word detector finds and what it falsely raises.

    .venv/bin/python care/measure.py [--misses 10]                  each written set, by what all the others teach
    .venv/bin/python care/measure.py --real FOLDER [--misses 10]    every set in a folder, by the detector as it is

A set is a file of `group<TAB>sentence` lines. The tables are docs/safety.md's. A sign counts as found by any signal; in
parentheses stands the share that raised the very signal. Of `--real` each line tells which signals were raised.
`--misses` lists sentences of each group that were missed, or falsely raised, the clearest of these first.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from train import HARMLESS, SIGNS, Sets, read_sets, train

from bemore import care

GROUPS = (*SIGNS, "negated", *HARMLESS)


@dataclass(frozen=True, slots=True)
class Row:
    """A sentence with its group, the signal that it raised, and by how much."""

    group: str
    sentence: str
    signal: care.Signal | None
    score: float

    @property
    def wrong(self) -> bool:
        """A sign that was missed, or a signal raised by anything else; of negated either answer is right."""
        return self.group != "negated" and (self.signal is None) == (self.group in SIGNS)


def judge(detector: care.Detector, rows: Iterable[tuple[str, str]]) -> list[Row]:
    """Return what each sentence raises."""
    judged = []
    for group, sentence in rows:
        found = list(detector.judgements(sentence))
        score = max((judgement.score for judgement in found), default=0.0)
        judged.append(Row(group, sentence, care.most_urgent(found), score))
    return judged


def left_out(sets: Sets) -> dict[str, list[Row]]:
    """Judge each set by a detector that learned from the others."""
    results = {}
    for name, rows in sets.items():
        others = {other: taught for other, taught in sets.items() if other != name}
        results[name] = judge(care.Detector(train(others)), rows)
    return results


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


def cell(rows: Sequence[Row], group: str) -> str:
    """Return the share of a group that raised a signal."""
    signals = [row.signal for row in rows if row.group == group]
    if not signals:
        return ""
    exact = f" ({share(signals.count(SIGNS[group]), len(signals))})" if group in SIGNS else ""
    return f"{share(len(signals) - signals.count(None), len(signals))}{exact} of {len(signals)}"


def written_table(results: dict[str, list[Row]]) -> list[str]:
    """Return a row a set and a column a group."""
    everything = [row for rows in results.values() for row in rows]
    lines = ["| set | " + " | ".join(GROUPS) + " |", "|---|" + "--:|" * len(GROUPS)]
    for name, rows in [*results.items(), ("all", everything)]:
        lines.append(f"| {name} | " + " | ".join(cell(rows, group) for group in GROUPS) + " |")
    return lines


def real_table(results: dict[str, list[Row]]) -> list[str]:
    """Return a row a group of each file, with the share that raised any signal, and each one."""
    lines = ["| file | group | sentences | any | " + " | ".join(care.Signal) + " |", "|---|---|--:|--:|--:|--:|--:|"]
    for name, rows in results.items():
        for group in dict.fromkeys(row.group for row in rows):
            signals = [row.signal for row in rows if row.group == group]
            shares = [share(signals.count(signal), len(signals)) for signal in care.Signal]
            any_signal = share(len(signals) - signals.count(None), len(signals))
            lines.append(f"| {name} | {group} | {len(signals)} | {any_signal} | " + " | ".join(shares) + " |")
    return lines


def precision(results: dict[str, list[Row]]) -> str:
    """Return how often what was raised as indirect was a sign, of the sentences whose group tells."""
    raised = [row for rows in results.values() for row in rows if row.signal is care.Signal.INDIRECT]
    told = [row for row in raised if row.group != "negated"]
    right = sum(row.group in SIGNS for row in told)
    return f"raised as indirect: {len(told)}, of these signs: {share(right, len(told)) if told else '-'}"


def misses(results: dict[str, list[Row]], most: int) -> list[str]:
    """Return the errors of each group: the clearest false alarms, and signs in the order of the files."""
    wrong: dict[str, list[tuple[float, str, Row]]] = defaultdict(list)
    for name, rows in results.items():
        for row in rows:
            if row.wrong:
                wrong[row.group].append((-row.score, name, row))
    lines = []
    for group, errors in wrong.items():
        for _, name, row in sorted(errors, key=lambda error: error[0])[:most]:
            how = f"{row.signal} by {row.score:.1f}" if row.signal else "missed"
            lines.append(f"{group} ({name}, {how}): {row.sentence}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--misses", type=int, default=0, metavar="MOST")
    parser.add_argument("--real", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.real:
        results = {name: judge(care.DETECTOR, rows) for name, rows in read_sets(options.real).items()}
        lines = real_table(results)
    else:
        results = left_out(read_sets())
        lines = [*written_table(results), "", precision(results)]
    print("\n".join([*lines, *misses(results, options.misses)]))


if __name__ == "__main__":
    main()

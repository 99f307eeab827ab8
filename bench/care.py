"""Print how long the word detector takes: a message of 100 characters, and the longest ones of several kinds.

    .venv/bin/python bench/care.py [--rounds 15]

The goals are 1 ms for 100 characters and 15 ms for 2,000, whatever they are.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bemore.care import signal_in

MESSAGES = {
    "100 characters": ("오늘 회사에서 정말 힘들었어요 집에 와서 한참 울었어요 " * 4)[:100],
    "2,000 in ordinary words": "오늘 회사에서 정말 힘들었어요. 집에 와서 한참 울었어요. " * 70,
    "2,000 of distress with anchors": "사는 게 힘들어 죽겠어요. 약을 먹어도 마지막인 것 같아요. " * 70,
    "2,000 of a risk signal over and over": "죽고 싶어요 " * 300,
    "2,000 syllables": "".join(chr(0xAC00 + at * 7919 % 11172) for at in range(2000)),
    "2,000 in sentences of one letter": "죽. " * 700,
    "2,000 of full stops that end no sentence": "…" * 1999 + "x",
    "2,000 of a letter that becomes three": "㈀" * 2000,
    "2,000 of a letter that becomes 18": "\ufdfa" * 2000,
    "2,000 of letters on a switched keyboard": "wnrrh tlvek " * 170,
    "2,000 of one Latin word": "wk" * 1000,
}


def milliseconds(message: str) -> float:
    began = time.process_time()
    signal_in(message)
    return (time.process_time() - began) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for name, message in MESSAGES.items():
        print(f"{name}: {statistics.median(milliseconds(message[:2000]) for _ in range(rounds)):.2f} ms")


if __name__ == "__main__":
    main()

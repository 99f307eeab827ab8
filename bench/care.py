"""Print how long the first net takes: a message of 100 characters, and the longest ones of several kinds.

    .venv/bin/python bench/care.py

The goals are 1 ms for 100 characters and 15 ms for 2,000, whatever they are.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bemore.care import signal_in

MESSAGES = {
    "100 characters": "오늘 회사에서 정말 힘들었어요 집에 와서 한참 울었어요 " * 3,
    "2,000 in ordinary words": "오늘 회사에서 정말 힘들었어요. 집에 와서 한참 울었어요. " * 70,
    "2,000 of a plea over and over": "죽고 싶어요 " * 300,
    "2,000 syllables": "".join(chr(0xAC00 + at * 7919 % 11172) for at in range(2000)),
    "2,000 in sentences of one letter": "죽. " * 700,
    "2,000 of full stops that are no end": "…" * 1999 + "x",
    "2,000 of a letter that becomes three": "㈀" * 2000,
    "2,000 of a letter that becomes 18": "\ufdfa" * 2000,
}
ROUNDS = 15

for name, message in MESSAGES.items():
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        signal_in(message[:2000])
        times.append((time.process_time() - began) * 1000)
    print(f"{name}: {statistics.median(times):.2f} ms")

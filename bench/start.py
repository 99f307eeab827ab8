"""Print what a start costs: CPU until the first served request, and the memory of an idle server.

    .venv/bin/python bench/start.py [--rounds 5]

Medians of starts on SQLite with the demo counsellor, read from /proc (Linux). The goals are 0.6 s and 60 MiB.
"""

import argparse
import statistics
import subprocess
import sys
import urllib.request

from processes import SERVER, cpu_us, resident_kib, serving

# What importing aiohttp takes alone.
FLOOR = "import aiohttp.web, time; print(time.process_time())"


def one_start() -> tuple[float, float, float]:
    """Return seconds of CPU, MiB, and the seconds of the floor."""
    with serving([SERVER]) as served:
        urllib.request.urlopen(f"http://127.0.0.1:{served.port}/health").read()
        costs = cpu_us(served.pid) / 1e6, resident_kib(served.pid) / 1024
    floor = subprocess.run([sys.executable, "-c", FLOOR], capture_output=True, text=True, check=True)
    return (*costs, float(floor.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    one_start()  # compiles the module's dependencies
    cpu, memory, floor = (
        statistics.median(values) for values in zip(*(one_start() for _ in range(rounds)), strict=True)
    )
    print(f"start to first served request: {cpu:.2f} s of CPU (goal: under 0.6), importing aiohttp takes {floor:.2f}")
    print(f"idle server: {memory:.0f} MiB resident (goal: under 60)")


if __name__ == "__main__":
    main()

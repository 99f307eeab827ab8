"""Print what a start costs: CPU until the first served request, and the memory of an idle server.

    .venv/bin/python bench/start.py

Medians of five starts on SQLite with the demo counsellor, read from /proc (Linux). The goals are 0.6 s and 60 MiB.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

MODULE = Path(__file__).parent.parent / "bemore_voice.py"
ROUNDS = 5


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


def one_start() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PATH": os.environ["PATH"], "PORT": "0"}
        program = subprocess.Popen(
            [sys.executable, MODULE], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
        )
        assert program.stderr is not None
        address = re.search(r"http://\S+:\d+", program.stderr.readline())
        assert address is not None
        urllib.request.urlopen(f"{address[0]}/health").read()
        costs = cpu_seconds(program.pid), resident_mib(program.pid)
        program.terminate()
        program.communicate()
        return costs


def floor() -> float:
    """CPU that importing aiohttp alone takes."""
    code = "import aiohttp.web, time; print(time.process_time())"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    one_start()  # compiles the module's dependencies
    rounds = [(*one_start(), floor()) for _ in range(ROUNDS)]
    cpu, memory, least = zip(*rounds, strict=True)
    print(f"start to first served request: {statistics.median(cpu):.2f} s of CPU (goal: under 0.6),")
    print(f"  of which importing aiohttp takes {statistics.median(least):.2f}")
    print(f"idle server: {statistics.median(memory):.0f} MiB resident (goal: under 60)")


main()

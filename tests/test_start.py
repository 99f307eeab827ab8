"""The program as it is started: one start line, one-line errors, a clean end."""

import ast
import contextlib
import re
import resource
import signal
import socket
import sqlite3
import sys
from pathlib import Path

import aiohttp
import pytest
from standin import GeminiStandIn
from support import MODULE, kinds_of, start, started, text_of


async def test_a_hobbyist_starts_it_without_any_setting_and_talks(tmp_path: Path) -> None:
    async with started(tmp_path) as program:
        assert "SQLite bemore.db, demo mode, replies are canned" in program.log
        async with program.connect("test-session-123") as client:
            await client.ask("요즘 너무 불안해요", emotion="anxious", timestamp=1704902400000)
            frames = await client.reply()
        program.process.send_signal(signal.SIGTERM)
        assert await program.end() == 0
    assert kinds_of(frames)[0] == "begin"
    assert kinds_of(frames).count("chunk") > 5
    assert kinds_of(frames)[-1] == "complete"
    with sqlite3.connect(tmp_path / "bemore.db") as database:
        rows = database.execute("SELECT session_id, user_message, ai_response, emotion, timestamp FROM conversations")
        assert rows.fetchall() == [
            ("test-session-123", "요즘 너무 불안해요", text_of(frames), "anxious", 1704902400000)
        ]
    database.close()
    lines = program.log.splitlines()
    assert len(lines) == 2
    assert re.search(
        rf"session=\w{{12}} outcome=complete chunks=\d+ characters={len(text_of(frames))} first_ms=\d+ total_ms=\d+$",
        lines[1],
    )
    assert not any(word in program.log for word in ("불안", "test-session", text_of(frames)[:5]))


async def test_gemini_and_postgres_start_without_secrets_in_the_log(
    tmp_path: Path, gemini: GeminiStandIn, postgres_url: str
) -> None:
    url = postgres_url.replace("postgres:@", "postgres:hush-hush@")
    values = {"DATABASE_URL": url, "GEMINI_API_KEY": "hush-key", "GEMINI_BASE_URL": gemini.url, "LOG_LEVEL": "debug"}
    async with started(tmp_path, **values, AUTO_CREATE_SESSIONS=1, JWT_SECRET_KEY="hush" * 8) as program:
        assert "Postgres (local socket)/postgres, model gemini-3.5-flash-lite" in program.log
        async with program.connect() as client:
            await client.ask("비밀 이야기")
            assert text_of(await client.reply()) == "네, 듣고 있어요."
            await client.ask("")
            await client.reply()
        program.process.send_signal(signal.SIGINT)
        assert await program.end() == 0
    assert "outcome=empty_message" in program.log
    assert not any(word in program.log for word in ("hush", "비밀", "듣고"))


async def test_it_says_which_models_answer(tmp_path: Path, gemini: GeminiStandIn) -> None:
    values = {"GEMINI_API_KEY": "k", "GEMINI_BASE_URL": gemini.url, "GEMINI_MODEL": "m-1"}
    async with started(tmp_path, **values, GEMINI_FALLBACK_MODEL="m-2") as program, aiohttp.ClientSession() as http:
        assert program.log.rstrip().endswith(', model m-1, fallback m-2"')
        async with http.get(f"http://127.0.0.1:{program.port}/health") as response:
            assert (await response.json())["ai"] == "m-1, fallback m-2"


async def test_dotenv_is_read_but_the_environment_wins(tmp_path: Path) -> None:
    """From the folder in which the program was started."""
    (tmp_path / ".env").write_text(
        "DATABASE_URL=sqlite:///mine.db\nLOG_LEVEL=error\n# 주석\nPORT=1\n", encoding="utf-8"
    )
    async with started(tmp_path, LOG_LEVEL="info") as program:
        assert "SQLite mine.db" in program.log


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"PORT": "http"}, "PORT: takes a number from 0 to 65535, got 'http'"),
        ({"DATABASE_URL": "postgresql://u:hush@no.invalid/d", "DEMO_MODE": "1"}, "DATABASE_URL: no such host: "),
        ({"DATABASE_URL": "postgresql://u:hush@[oops/d", "DEMO_MODE": "1"}, "DATABASE_URL: "),
        ({"DATABASE_URL": "postgresql://u:hush@h:port/d", "DEMO_MODE": "1"}, "DATABASE_URL: "),
        ({"DATABASE_URL": "sqlite:///no/such/folder/a.db"}, "DATABASE_URL: cannot use SQLite no/such/folder/a.db"),
        ({"DATABASE_URL": "postgresql://u:hush@h/d"}, "GEMINI_API_KEY: needed with Postgres"),
        ({"HOST": "no-such-host.invalid"}, "HOST, PORT: cannot listen on no-such-host.invalid:0"),
        ({"HOST": "no..name"}, "HOST, PORT: cannot listen on no..name:0"),
    ],
)  # fmt: skip
async def test_a_start_that_fails_says_why_in_one_line(tmp_path: Path, values: dict[str, str], names: str) -> None:
    async with start(tmp_path, **{"PORT": 0, **values}) as program:
        assert await program.end() == 2
    assert len(program.log.splitlines()) == 1, program.log
    assert program.log.startswith(f"bemore_voice: {names}")
    assert "hush" not in program.log


async def test_a_port_in_use_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with start(tmp_path, PORT=taken.getsockname()[1]) as program:
            assert await program.end() == 2
    assert re.fullmatch(r"bemore_voice: HOST, PORT: cannot listen on 127.0.0.1:\d+ \(.*\)\n", program.log)


async def test_a_name_in_dotenv_that_resembles_a_setting_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GEMINI_KEY=hush\nMY_OWN=1\n", encoding="utf-8")
    async with started(tmp_path) as program:
        assert "GEMINI_KEY is not a setting, is GEMINI_API_KEY meant?" in program.log
        assert not any(word in program.log for word in ("hush", "MY_OWN"))


OLD_PYTHON = "import runpy, sys; sys.version_info = (3, 10, 12); runpy.run_path(sys.argv[1], run_name='__main__')"


async def test_an_older_python_is_told_in_one_line_what_is_needed(tmp_path: Path) -> None:
    async with start(tmp_path, (sys.executable, "-c", OLD_PYTHON, str(MODULE))) as program:
        assert await program.end() == 1
    assert program.log == "bemore_voice: needs Python 3.11 or newer, this is 3.10\n"
    # An older Python reaches that line only if it can read the file.
    ast.parse(MODULE.read_text(encoding="utf-8"), feature_version=(3, 10))


# Windows has no add_signal_handler: there Ctrl-C raises KeyboardInterrupt.
AS_ON_WINDOWS = """
import asyncio, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell may have been told to ignore it
def add_signal_handler(*_):
    print("unsupported", file=sys.stderr)
    raise NotImplementedError
asyncio.SelectorEventLoop.add_signal_handler = add_signal_handler
sys.path.insert(0, sys.argv.pop())
import bemore_voice
sys.exit(bemore_voice.main())
"""


async def test_ctrl_c_on_windows_ends_without_a_traceback(tmp_path: Path) -> None:
    command = (sys.executable, "-c", AS_ON_WINDOWS, str(MODULE.parent))
    async with started(tmp_path, command) as program:
        assert "unsupported" in program.log
        async with program.connect() as client:
            await client.silent()
            program.process.send_signal(signal.SIGINT)
            # Linux may give the signal to SQLite's thread, which wakes no event loop; Windows has no such signals.
            with contextlib.suppress(ConnectionError):
                await client.send("ping")
            assert await client.closed() == aiohttp.WSCloseCode.GOING_AWAY
        assert await program.end() == 0
    assert "Traceback" not in program.log


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="without IPv6")
async def test_two_colons_listen_on_ipv6_and_ipv4(tmp_path: Path) -> None:
    async with start(tmp_path, HOST="::", PORT=0) as program:
        port = (await program.wait_for(r"on http://\[::\]:(\d+), "))[1]
        async with aiohttp.ClientSession() as http:
            for host in ("127.0.0.1", "[::1]"):
                async with http.get(f"http://{host}:{port}/livez") as response:
                    assert response.status == 200


async def test_a_dotenv_that_is_no_text_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"HOST=\xff\xfe\n")
    async with start(tmp_path) as program:
        assert await program.end() == 2
    assert program.log.startswith("bemore_voice: .env: ")
    assert len(program.log.splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="reads /proc")
async def test_as_many_files_may_be_open_as_the_connections_need(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))  # the child's, who inherits it
    try:
        async with started(tmp_path, MAX_CONNECTIONS=1000) as program:
            limits = Path(f"/proc/{program.process.pid}/limits").read_text()  # noqa: ASYNC240 - not a disk
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found = re.search(r"Max open files +(\d+)", limits)
    assert found is not None
    assert int(found[1]) == min(2100, hard)

"""README, .env.example, the module's docstring and the code say the same."""

import ast
import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values
from support import make_settings, serve

import bemore_voice
from bemore_voice import HTTP_ERRORS, SENTENCES, Demo, Emotion, Settings, create_app, read_settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCSTRING = bemore_voice.__doc__ or ""


class Recorder(dict[str, str]):
    """A mapping that remembers which names it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return default


def rows(heading: str) -> list[list[str]]:
    """The cells of the tables below a heading of README."""
    section = README.split(f"\n## {heading}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_settings_agree() -> None:
    recorder = Recorder()
    read_settings(recorder)
    assert recorder.names == {name.upper() for name in Settings.__dataclass_fields__}
    assert recorder.names == set(dotenv_values(ROOT / ".env.example"))
    assert recorder.names == {name for cells in rows("Settings") for name in re.findall(r"`([A-Z_]+)`", cells[0])}


def test_the_example_holds_the_defaults() -> None:
    example = {name: value or "" for name, value in dotenv_values(ROOT / ".env.example").items()}
    assert read_settings(example) == read_settings({})


def test_errors_agree() -> None:
    table = {cells[0].strip("`"): cells[1] for cells in rows("The socket") if cells[0].strip("`") in SENTENCES}
    assert table == {str(code): sentence for code, sentence in SENTENCES.items()}
    assert all(code in DOCSTRING for code in SENTENCES)
    assert {(cells[0], cells[1].strip("`")) for cells in rows("HTTP") if cells[0].isdecimal()} == {
        (str(status), code) for code, (status, _) in HTTP_ERRORS.items()
    }


def test_messages_agree() -> None:
    source = (ROOT / "bemore_voice.py").read_text(encoding="utf-8").replace(DOCSTRING, "")
    sent = {"ai_stream_begin", "ai_stream_chunk", "ai_stream_complete", "ai_stream_error", "pong"}
    taken = {"request_ai_response", "cancel_ai_response", "ping", "status_update"}
    for kind in sent | taken:
        assert f'"{kind}"' in source
        assert kind in DOCSTRING
        assert f"| `{kind}` |" in README
    assert all(f"`{emotion}`" in README for emotion in Emotion)


def test_routes_agree() -> None:
    settings = make_settings()
    app = create_app(settings, bemore_voice.SQLite(settings), Demo())
    routes = {
        f"{route.method} {route.resource.canonical}"
        for route in app.router.routes()
        if route.resource is not None and route.method not in ("HEAD", "OPTIONS")
    }
    assert routes == {cells[0].strip("`") for cells in rows("HTTP") if re.match("`(GET|POST|DELETE) /", cells[0])}
    for route in routes:
        assert re.search(route.replace(" ", " +").replace("{", r"\{"), DOCSTRING), route


def test_ci_runs_the_very_command_that_readme_gives() -> None:
    command = re.findall(r"```sh\n(.*pytest)\n```", README)
    assert len(command) == 1
    assert command[0] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


async def test_readmes_conversation_by_hand_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) == 5
    async with serve(make_settings(f"sqlite:///{tmp_path}/a.db"), Demo()) as server:
        source = code[1].replace("127.0.0.1:8000", "{}:{}".format(*server.address))
        names: dict[str, Any] = {}
        compiled = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        async with asyncio.timeout(20):
            await eval(compiled, names)
        await names["ws"].close()
        await names["http"].close()
    printed = capsys.readouterr().out.splitlines()
    assert "ai_stream_begin" in printed[0]
    assert "".join(ast.literal_eval(line)["data"].get("chunk", "") for line in printed).startswith("안녕하세요")

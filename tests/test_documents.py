"""README, docs/, .env.example and the code say the same."""

import ast
import asyncio
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSCloseCode
from dotenv import dotenv_values
from pytest_aiohttp.plugin import AiohttpServer
from support import ScriptedCounsellor, make_settings, serve

from bemore.api import HTTP_ERRORS
from bemore.counsellor import Emotion
from bemore.demo import Demo
from bemore.settings import Settings, read_settings
from bemore_voice import (
    BEGIN,
    COMPLETE,
    INTERRUPTED,
    MAX_FRAME_BYTES,
    MAX_WAITING_FRAMES,
    SENTENCES,
    Failure,
    Frame,
    create_app,
    make_counsellor,
    make_storage,
    pong,
)

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "README.md"])
README = (ROOT / "README.md").read_text(encoding="utf-8")
KOREAN = (ROOT / "README.ko.md").read_text(encoding="utf-8")
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
MOST_LINES = 140  # of README: for somebody who has a minute
BLOCK = "^```.*?^```$"
LINK = r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"|<(http[^>]+)>"
FIGURES = "<!-- speed -->\n.*<!-- /speed -->\n"


class Recorder(Mapping[str, str]):
    """An empty mapping that remembers which names it was asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def rows(document: str, heading: str) -> list[list[str]]:
    """The cells of the tables below a heading, without the rows that name their columns."""
    section = document.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    tables = re.findall(r"^\|.*\n\|[-:| ]+\|\n((?:\|.*\n?)+)", section, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for table in tables for line in table.splitlines()]


def names(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def facts(text: str) -> list[list[str]]:
    """Return what is the same in every language: blocks and spans of code, links and images, numbers.

    All but the blocks is sorted, since another language puts a sentence's words in another order.
    """
    blocks = re.findall(BLOCK, text, re.DOTALL | re.MULTILINE)
    text = re.sub(BLOCK, "", text, flags=re.DOTALL | re.MULTILINE)
    links = ["".join(link) for link in re.findall(LINK, text)]
    numbers = re.findall(r"\d(?:[\d.,]*\d)?", re.sub(f"`[^`]+`|{LINK}", "", text))
    return [blocks, sorted(names(text)), sorted(links), sorted(numbers)]


def points(readme: str) -> list[tuple[str, int, list[str], list[list[str]]]]:
    """Return the facts of each row of a table, with the number of its cells, and of each point of a list."""
    lines = [line for line in readme.splitlines() if line.startswith(("|", "- "))]
    return [(line[0], line.count("|"), names(line), facts(line)) for line in lines]


def prose(document: Path) -> str:
    """A document's text without its blocks of code."""
    return re.sub(BLOCK, "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """What GitHub calls a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Settings


def test_settings_agree() -> None:
    recorder = Recorder()
    read_settings(recorder)
    assert recorder.names == {name.upper() for name in Settings.__dataclass_fields__}
    assert recorder.names == set(dotenv_values(ROOT / ".env.example"))


def test_the_example_holds_the_defaults() -> None:
    example = {name: value or "" for name, value in dotenv_values(ROOT / ".env.example").items()}
    assert read_settings(example) == read_settings({})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_setting_that_is_named_exists(document: Path) -> None:
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", document.read_text(encoding="utf-8")))
    assert named <= {name.upper() for name in Settings.__dataclass_fields__}


# The socket


def test_errors_agree() -> None:
    assert {(names(code)[0], sentence) for code, sentence, _ in rows(PROTOCOL, "Errors")} == set(SENTENCES.items())


def test_frames_of_the_server_agree() -> None:
    chunk = Frame("ai_stream_chunk", {"chunk": "가"})
    frames = [BEGIN, chunk, COMPLETE, INTERRUPTED, pong(0), *(Failure(code).frame() for code in SENTENCES)]
    table = {names(kind)[0]: (data, beside) for kind, data, beside in rows(PROTOCOL, "Frames from the server")}
    assert set(table) == {frame.type for frame in frames}
    for frame in frames:
        data, beside = table[frame.type]
        assert all(f'"{name}"' in data for name in frame.data)
        assert all(name in beside for name in frame.beside)


def test_emotions_agree() -> None:
    fields = {names(field)[0]: text for field, text in rows(PROTOCOL, "A request")}
    assert names(fields["emotion"]) == [*Emotion]


def test_readme_names_the_frames_of_the_protocol() -> None:
    protocol = [cells[0] for side in ("client", "server") for cells in rows(PROTOCOL, f"Frames from the {side}")]
    assert [kind for kind, _ in rows(README, "Frames")] == protocol


async def test_the_server_takes_the_frames_of_the_client(caplog: pytest.LogCaptureFixture) -> None:
    kinds = [names(cells[0])[0] for cells in rows(PROTOCOL, "Frames from the client")]
    assert len(kinds) == 4
    ignored = []
    async with serve(make_settings(), Demo()) as server:
        for kind in [*kinds, "ai_stream_begin"]:
            caplog.clear()
            async with server.connect() as client:  # closing it waits until the server has read all
                await client.send(kind)
            if "unknown type" in caplog.text:
                ignored.append(kind)
    assert ignored == ["ai_stream_begin"]


async def close_when_it_stops() -> int | None:
    async with serve(make_settings(), Demo()) as server, server.connect() as client:
        _, code = await asyncio.gather(server.runner.cleanup(), client.closed())
        return code


async def close_when_too_many_wait() -> int | None:
    counsellor = ScriptedCounsellor()
    talk = counsellor.expect()
    async with serve(make_settings(), counsellor) as server, server.connect() as client:
        for _ in range(1 + MAX_WAITING_FRAMES + 1):
            await client.ask()
        code = await client.closed()
        talk.end()
        return code


async def close_when_a_frame_is_too_large() -> int | None:
    async with serve(make_settings(), Demo()) as server, server.connect() as client:
        await client.ws.send_str(" " * (MAX_FRAME_BYTES + 1))
        return await client.closed()


async def close_when_a_frame_has_no_mask() -> int | None:
    async with serve(make_settings(), Demo()) as server, server.connect() as client:
        client.ws._writer.use_mask = False
        await client.send("ping")
        return await client.closed()


async def test_close_codes_agree() -> None:
    closed = [await close_when_it_stops(), await close_when_a_frame_has_no_mask()]
    closed += [await close_when_too_many_wait(), await close_when_a_frame_is_too_large()]
    assert closed[:2] == [WSCloseCode.GOING_AWAY, WSCloseCode.PROTOCOL_ERROR]
    assert closed[2:] == [WSCloseCode.POLICY_VIOLATION, WSCloseCode.MESSAGE_TOO_BIG]
    assert closed == [int(code) for code, _ in rows(PROTOCOL, "Close codes")]


# HTTP


def test_routes_agree() -> None:
    settings = make_settings()
    app = create_app(settings, make_storage(settings), make_counsellor(settings))
    routes = {
        f"{route.method} {route.resource.canonical}"
        for route in app.router.routes()
        if route.resource is not None and route.method not in ("HEAD", "OPTIONS")
    }
    assert routes == {names(route)[0] for route, _ in rows(PROTOCOL, "Routes")}


def test_refusals_agree() -> None:
    table = {(int(status), names(code)[0]) for status, code, _ in rows(PROTOCOL, "Refusals")}
    assert table == {(status, code) for code, (status, _) in HTTP_ERRORS.items()}


# The documents


@pytest.mark.parametrize("readme", [README, KOREAN], ids=["English", "Korean"])
def test_readme_is_for_somebody_who_has_a_minute(readme: str) -> None:
    assert len(readme.splitlines()) <= MOST_LINES


def test_the_readmes_name_each_other_in_their_first_lines() -> None:
    assert "[한국어](README.ko.md)" in README.splitlines()[:6]
    assert any(line.startswith("[English](README.md)") for line in KOREAN.splitlines()[:6])


def test_the_readmes_say_the_same() -> None:
    english, korean = ([facts(section) for section in readme.split("\n## ")] for readme in (README, KOREAN))
    english[0][2].remove("README.ko.md")
    korean[0][2].remove("README.md")
    assert korean == english


def test_the_readmes_have_the_same_tables_and_lists() -> None:
    assert points(KOREAN) == points(README)


def test_the_readmes_have_the_same_figures() -> None:
    """bench/run.py writes one table into both, its English words too."""
    english, korean = (re.findall(FIGURES, readme, re.DOTALL) for readme in (README, KOREAN))
    assert len(english) == 1
    assert korean == english


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    text = prose(document)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match("[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_file_that_is_named_exists(document: Path) -> None:
    for name in re.findall(r"`([\w./-]+\.(?:py|sql|html|txt|md))`", prose(document)):
        assert (ROOT / name).is_file() or (document.parent / name).is_file(), name


def test_ci_runs_the_very_command_that_readme_gives() -> None:
    command = re.findall(r"```sh\n(.*pytest)\n```", README)
    assert len(command) == 1
    assert command[0] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


async def test_readmes_conversation_by_hand_works(
    aiohttp_server: AiohttpServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) == 5
    settings = make_settings(f"sqlite:///{tmp_path}/a.db")
    server = await aiohttp_server(create_app(settings, make_storage(settings), Demo()))
    await type_in(code[1].replace("127.0.0.1:8000", f"{server.host}:{server.port}"))
    printed = capsys.readouterr().out.splitlines()
    assert "ai_stream_begin" in printed[0]
    assert "".join(ast.literal_eval(line)["data"].get("chunk", "") for line in printed).startswith("안녕하세요")


async def type_in(source: str) -> None:
    """Run lines as `python -m asyncio` does."""
    variables: dict[str, Any] = {}
    compiled = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    async with asyncio.timeout(20):
        await eval(compiled, variables)
    await variables["ws"].close()
    await variables["http"].close()

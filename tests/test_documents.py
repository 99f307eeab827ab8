"""README, docs/, .env.example and the code say the same."""

import ast
import asyncio
import logging
import re
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import WSCloseCode
from aiohttp.test_utils import make_mocked_request
from documents import DOCUMENTS, ROOT, blocks, names, prose, rows, section, tables, text_of_file
from dotenv import dotenv_values
from jsonschema import Draft202012Validator
from page import running_browser
from support import Frontend, ScriptedCounsellor, Server, make_settings, serve

from bemore.counsellor import Emotion, Failed
from bemore.demo import Demo
from bemore.refusals import HTTP_ERRORS
from bemore.settings import Settings, read_settings
from bemore_voice import SENTENCES, create_app, make_counsellor, make_storage

README, PROTOCOL = text_of_file("README.md"), text_of_file("docs/protocol.md")
TYPES = text_of_file("docs/frames.ts")
ASYNCAPI = yaml.safe_load(text_of_file("docs/asyncapi.yaml"))
MOST_LINES = 130  # of README
# Names in capitals that are not settings of this server.
FOREIGN = {"POSTGRES_PASSWORD", "VITE_API_URL", "VITE_WS_URL", "API_URL", "WS_URL", "SESSION_ID", "TIME_SCALE"}
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
in_two_languages = pytest.mark.parametrize(
    ("english", "korean"),
    [
        ("README.md", "README.ko.md"),
        ("docs/deployment.md", "docs/deployment.ko.md"),
        ("docs/safety.md", "docs/safety.ko.md"),
    ],
)

# Settings


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


def test_settings_of_the_code_and_of_the_example_are_the_same() -> None:
    recorder = Recorder()
    read_settings(recorder)
    assert recorder.names == {name.upper() for name in Settings.__dataclass_fields__}
    assert recorder.names == set(dotenv_values(ROOT / ".env.example"))


def test_the_example_holds_the_defaults() -> None:
    example = {name: value or "" for name, value in dotenv_values(ROOT / ".env.example").items()}
    assert read_settings(example) == read_settings({})


@each_document
def test_every_setting_that_is_named_exists(document: Path) -> None:
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", document.read_text(encoding="utf-8")))
    assert named - FOREIGN <= {name.upper() for name in Settings.__dataclass_fields__}


# Frames


@asynccontextmanager
async def connected(counsellor: ScriptedCounsellor, token: str = "", **values: Any) -> AsyncIterator[Frontend]:
    async with serve(make_settings(**values), counsellor) as server:
        async with server.connect(params={"token": token} if token else {}) as client:
            yield client


async def frames_of_every_kind() -> list[dict[str, Any]]:
    """Return what a server sends in all situations that the protocol names."""
    counsellor = ScriptedCounsellor()
    frames = []
    async with connected(counsellor, MAX_AI_REQUESTS_PER_MINUTE=3) as client:
        await client.send("ping")
        frames.append(await client.frame())
        for message in (" ", "가" * 2001, 1):
            await client.ask(message)
            frames.append(await client.frame())
        await client.ask()
        frames += await client.reply()
        talk = counsellor.expect().say("네, ")
        await client.ask()
        frames += [await client.frame(), await client.frame()]
        await client.send("cancel_ai_response")
        frames += await client.reply()
        await talk.closed.wait()
        counsellor.expect().fail(Failed("test"))
        for _ in range(2):
            await client.ask()
            frames += await client.reply()
    async with connected(counsellor, AUTO_CREATE_SESSIONS=0) as client:
        await client.ask()
        frames += await client.reply()
    return frames


@pytest.fixture(scope="module")
def frames() -> list[dict[str, Any]]:
    return asyncio.run(frames_of_every_kind())


def test_the_frames_of_the_test_are_of_every_kind(frames: list[dict[str, Any]]) -> None:
    kinds = {frame["type"] for frame in frames}
    assert kinds == {names(kind)[0] for kind, *_ in rows(PROTOCOL, "Frames from the server")}
    assert {frame["code"] for frame in frames if "code" in frame} == set(SENTENCES)
    assert any(frame.get("interrupted") for frame in frames)


def test_protocol_names_every_field(frames: list[dict[str, Any]]) -> None:
    table = {names(kind)[0]: (data, beside) for kind, data, beside in rows(PROTOCOL, "Frames from the server")}
    for frame in frames:
        data, beside = table[frame["type"]]
        assert all(f'"{name}"' in data for name in frame["data"])
        assert all(name in beside for name in frame.keys() - {"type", "data"})


def test_protocol_has_the_sentence_of_every_error() -> None:
    assert {(names(code)[0], sentence) for code, sentence, _ in rows(PROTOCOL, "Errors")} == set(SENTENCES.items())


def test_emotions_agree() -> None:
    fields = {names(field)[0]: text for field, text in rows(PROTOCOL, "A request")}
    assert names(fields["emotion"]) == [*Emotion]


def test_readme_names_the_frames_of_the_protocol() -> None:
    protocol = [cells[0] for side in ("client", "server") for cells in rows(PROTOCOL, f"Frames from the {side}")]
    assert [kind for kind, _ in rows(README, "Frames")] == protocol


async def test_the_server_takes_the_frames_of_the_client(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "bemore_voice")
    kinds = [names(cells[0])[0] for cells in rows(PROTOCOL, "Frames from the client")]
    assert len(kinds) == 4
    ignored = []
    async with serve(make_settings(), Demo()) as server:
        for kind in [*kinds, "ai_stream_begin"]:
            caplog.clear()
            async with server.connect() as client:  # closing it waits until the server has read all
                await client.send(kind)
            if "unknown frame type" in caplog.text:
                ignored.append(kind)
    assert ignored == ["ai_stream_begin"]


# AsyncAPI and TypeScript


def messages(side: str) -> dict[str, Any]:
    """Return the payload schemas of one side's messages by type, with their references resolved."""
    payloads = {}
    for reference in ASYNCAPI["operations"][side]["messages"]:
        message = resolved({"$ref": resolved(reference, deep=False)["$ref"]})
        payloads[message["payload"]["properties"]["type"]["const"]] = message["payload"]
    return payloads


def resolved(node: Any, *, deep: bool = True) -> Any:
    """Return a part of the document with its references replaced by what they refer to."""
    if isinstance(node, dict) and "$ref" in node:
        target: Any = ASYNCAPI
        for key in node["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        return resolved(target) if deep else target
    if isinstance(node, dict):
        return {key: resolved(value) for key, value in node.items()}
    return [resolved(value) for value in node] if isinstance(node, list) else node


def test_asyncapi_document_is_valid() -> None:
    with warnings.catch_warnings(action="ignore"):  # of pydantic, about names in this library's models
        from asyncapi3 import AsyncAPI3

    AsyncAPI3.model_validate(ASYNCAPI)
    channel = set(ASYNCAPI["channels"]["session"]["messages"])
    assert channel == messages("receive").keys() | messages("send").keys()


def test_every_frame_is_valid_by_asyncapi(frames: list[dict[str, Any]]) -> None:
    payloads = messages("send")
    assert payloads.keys() == {frame["type"] for frame in frames}
    for frame in frames:
        Draft202012Validator(payloads[frame["type"]]).validate(frame)


def test_asyncapi_has_the_names_of_the_code() -> None:
    received, sent = messages("receive"), messages("send")
    assert list(received) == [names(cells[0])[0] for cells in rows(PROTOCOL, "Frames from the client")]
    request = received["request_ai_response"]["properties"]["data"]["properties"]
    assert list(request) == [names(field)[0] for field, _ in rows(PROTOCOL, "A request")]
    assert request["emotion"]["enum"] == [*Emotion, None]
    assert sent["ai_stream_error"]["properties"]["code"]["enum"] == [*SENTENCES]


def fields_in_typescript(name: str) -> dict[str, dict[str, bool]]:
    """Return the top-level fields of each frame of a union of TypeScript types, and whether each is required."""
    union = re.search(rf"export type {name} =\n(.*?);\n\n", TYPES, re.DOTALL)
    assert union is not None
    found = {}
    for line in union[1].splitlines():
        fields = re.findall(r"(\w+)(\??):", re.sub(r"\{ (?!type:)[^{}]*\}", "", line))
        found[re.findall(r'type: "(\w+)"', line)[0]] = {field: not optional for field, optional in fields}
    return found


def test_typescript_types_have_the_fields_of_asyncapi() -> None:
    for name, side in (("ClientFrame", "receive"), ("ServerFrame", "send")):
        expected = {
            kind: {field: field in payload["required"] for field in payload["properties"]}
            for kind, payload in messages(side).items()
        }
        found = fields_in_typescript(name)
        if side == "receive":  # asyncapi.yaml leaves out data that is ignored
            found["status_update"].pop("data")
        assert found == expected


def test_typescript_types_have_the_words_of_the_code() -> None:
    unions = dict(re.findall(r"export type (\w+) =\n((?: *\|? ?\".*\n)+)", TYPES))
    assert re.findall(r'"(\w+)"', unions["Emotion"]) == [*Emotion]
    assert re.findall(r'"(\w+)"', unions["ErrorCode"]) == [*SENTENCES]


# The end of a connection


def test_close_codes_agree() -> None:
    """What closes a connection is tested beside that: shutdown, erasure, a large frame."""
    codes = [WSCloseCode.OK, WSCloseCode.GOING_AWAY, WSCloseCode.MESSAGE_TOO_BIG]
    assert [int(code) for code, _ in rows(PROTOCOL, "Close codes")] == codes


# HTTP


async def test_routes_agree() -> None:
    settings = make_settings()
    app = create_app(settings, make_storage(settings), make_counsellor(settings))
    served = {
        f"{route.method} {route.resource.canonical}"
        for route in app.router.routes()
        if route.resource is not None and route.method not in ("HEAD", "OPTIONS")
    }
    documented = set()
    for cell, _ in rows(PROTOCOL, "Routes"):
        method, path = names(cell)[0].split()
        match = await app.router.resolve(make_mocked_request(method, path.replace("{session_id}", "a")))
        assert match.route.resource is not None, path
        documented.add(f"{method} {match.route.resource.canonical}")
    assert documented == served


def test_refusals_agree() -> None:
    table = {(int(status), names(code)[0]) for status, code, _ in rows(PROTOCOL, "Refusals")}
    assert table == {(status, code) for code, (status, _) in HTTP_ERRORS.items()}


# Messages to the operator


def sources() -> Iterator[ast.Module]:
    for path in (ROOT / "bemore_voice.py", *(ROOT / "bemore").glob("*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


def template(node: ast.AST, constants: Mapping[str, str]) -> str:
    """Return the text that an expression makes, with `...` for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name) | ast.FormattedValue(value=ast.Name(id=name)):
            return constants.get(name, "...")
        case ast.JoinedStr(values=parts):
            return "".join(template(part, constants) for part in parts)
        case ast.BinOp(left=left, right=right):
            return template(left, constants) + template(right, constants)
        case ast.Call(func=ast.Attribute(value=value)):  # a method of a text, such as rstrip()
            return template(value, constants)
    return "..."


def calls_of(module: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name and node.args:
            yield node


def start_messages() -> set[str]:
    """Return the lines with which a start can end, as the code has them."""
    found = set()
    for module in sources():
        constants = {
            node.targets[0].id: template(node.value, {})
            for node in module.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        database = [call.args[0] for call in calls_of(module, "CannotStart")]
        for function in ast.walk(module):
            if isinstance(function, ast.FunctionDef) and function.name == "reason":
                database += [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
        found |= {template(call.args[0], constants) for call in calls_of(module, "ConfigError")}
        found |= {f"DATABASE_URL: {template(node, constants)}" for node in database}
    return {text for text in found if re.search("[a-z]", text.removeprefix("DATABASE_URL: "))}


def troubleshooting() -> list[list[str]]:
    """Return the lines of the two tables: those that end a start, and those of the log."""
    found = tables(section(text_of_file("docs/deployment.md"), "Troubleshooting"))
    return [[names(line)[0] for line, _ in table] for table in found]


def is_shown(line: str, message: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, line.split("..."))), message) is not None


def test_troubleshooting_has_every_line_that_ends_a_start() -> None:
    lines, messages = troubleshooting()[0], start_messages()
    assert len(messages) > 20
    assert not [message for message in messages if not any(is_shown(line, message) for line in lines)]
    assert not [line for line in lines if not any(is_shown(line, message) for message in messages)]


def written(setting: str = "...") -> set[str]:
    """Return all texts of the code, with `...` for what a format fills in."""
    nodes = [node for module in sources() for node in ast.walk(module)]
    texts = [template(node, {}) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)]
    return {re.sub(r"%[\d.]*[a-z]", "...", text.replace("{setting}", setting)) for text in texts}


def test_troubleshooting_has_lines_that_are_logged() -> None:
    asked = [call for module in sources() for call in calls_of(module, "HttpRefusal")]
    logged = {
        template(call.args[0], {}) for call in asked if any(keyword.arg == "setting" for keyword in call.keywords)
    }
    lines = troubleshooting()[1]
    refused = [re.match(r"refused=(\w+) (?:origin=\.\.\. )?setting=\w+$", line) for line in lines]
    assert {line[1] for line in refused if line} == logged
    assert {line for line, refusal in zip(lines, refused, strict=True) if not refusal} <= written()


def test_lines_about_models_are_logged() -> None:
    texts = written("GEMINI_MODEL")
    for cell, _ in rows(text_of_file("docs/models.md"), "When a model fails"):
        parts = [part for line in names(cell) for part in re.split(r" ?\.\.\. ?|: ", line)]
        assert not [part for part in parts if not any(part in text for text in texts)]


# The documents


@pytest.mark.parametrize("readme", ["README.md", "README.ko.md"])
def test_readme_is_short(readme: str) -> None:
    assert len(text_of_file(readme).splitlines()) <= MOST_LINES


@in_two_languages
def test_both_languages_have_the_same_commands(english: str, korean: str) -> None:
    assert blocks(text_of_file(korean)) == blocks(text_of_file(english))


def shape(table: list[list[str]]) -> list[list[str | list[str]]]:
    """Return the cells of a table that has no words in them, and of the others the names in code spans."""
    return [[sorted(names(cell)) if re.search(r"[^\W\d_]", cell) else cell for cell in row] for row in table]


@in_two_languages
def test_both_languages_have_the_same_tables(english: str, korean: str) -> None:
    """All but those of each set of sentences, which are in English alone."""
    text = text_of_file(english)
    for heading in ("Sentences written for it", "Sets that taught nothing"):
        text = re.sub(rf"^### {heading}\n.*?^###", "###", text, flags=re.DOTALL | re.MULTILINE)
    assert list(map(shape, tables(text_of_file(korean)))) == list(map(shape, tables(text)))
    assert f"({Path(korean).name})" in text_of_file("README.md").replace("docs/", "") + text
    assert f"({Path(english).name})" in text_of_file(korean)


def anchors(text: str) -> set[str]:
    """Return what GitHub calls a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_every_link_leads_somewhere(document: Path) -> None:
    text = prose(document.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match("[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


@each_document
def test_every_file_that_is_named_exists(document: Path) -> None:
    if document.name == "CHANGELOG.md":  # it also names files of earlier versions
        return
    for name in re.findall(r"`([\w./-]+\.(?:py|sql|html|css|js|ts|txt|md|yaml|service))`", prose(document.read_text())):
        assert (ROOT / name).is_file() or (document.parent / name).is_file(), name


def test_architecture_names_every_module() -> None:
    named = {
        name for cell, _ in rows(text_of_file("docs/architecture.md"), "Which file does what") for name in names(cell)
    }
    assert {f"bemore/{path.name}" for path in (ROOT / "bemore").glob("[!_]*.py")} <= named


def test_ci_runs_the_command_that_readme_gives() -> None:
    command = [block.strip() for block in blocks(README, "sh") if "pytest" in block]
    assert len(command) == 1
    assert command[0] in text_of_file(".ci/run").splitlines()


# README's examples


def example(language: str, server: Server) -> str:
    [code] = blocks(README, language)
    assert len(code.splitlines()) <= 10
    assert code.count("127.0.0.1:8000") == 1
    return code.replace("127.0.0.1:8000", "{}:{}".format(*server.address))


async def test_readmes_python_works(capsys: pytest.CaptureFixture[str]) -> None:
    async with serve(make_settings(), Demo()) as server:
        await type_in(example("python", server))
    printed = capsys.readouterr().out.splitlines()
    assert "ai_stream_begin" in printed[0]
    assert "체험용" in "".join(ast.literal_eval(line)["data"].get("chunk", "") for line in printed)


async def type_in(source: str) -> None:
    """Run lines as `python -m asyncio` does."""
    variables: dict[str, Any] = {}
    compiled = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    async with asyncio.timeout(20):
        await eval(compiled, variables)
    await variables["ws"].close()
    await variables["http"].close()


async def test_readmes_javascript_works_in_a_browser(tmp_path: Path) -> None:
    """It shows a reply, and after a lost connection it comes back and shows nothing twice."""
    printed: asyncio.Queue[str] = asyncio.Queue()
    async with serve(make_settings(), Demo()) as server, running_browser(tmp_path) as browser, asyncio.timeout(60):
        page = await browser.new_page()
        await page.goto(server.url)
        page.on("console", lambda message: printed.put_nowait(message.text))
        console = await page.context.new_cdp_session(page)

        async def type_into_console(code: str) -> Any:
            """Evaluate as the browser's console does: beside the page's own names, and keeping those of the code."""
            options = {"expression": code, "replMode": True, "awaitPromise": True}
            result = await console.send("Runtime.evaluate", options)
            assert "exceptionDetails" not in result, result
            return result["result"].get("value")

        await type_into_console(example("js", server))
        lines = [await printed.get()]
        while not lines[-1].startswith("ai_stream_complete"):
            lines.append(await printed.get())
        async with page.expect_websocket():
            await type_into_console("ws.close()")
        opened = "ws.readyState === 1 ? done() : ws.addEventListener('open', done)"
        await type_into_console(f"await new Promise((done) => {opened})")
        await type_into_console("say('ping')")
        assert (await printed.get()).startswith("pong")
    assert lines[0].startswith("ai_stream_begin")
    assert "체험용" in "".join(line.removeprefix("ai_stream_chunk ") for line in lines)

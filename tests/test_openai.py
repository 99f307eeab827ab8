"""OpenAI-compatible servers: against a stand-in, with the openai package as the oracle, and through LiteLLM's proxy."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp.test_utils import unused_port
from standin import Answer, GeminiStandIn, chat_event, silent_after, status, stream
from support import kinds_of, started, text_of

from bemore.attempts import CONTINUE, FINISH_SENTENCE, TimeLimits
from bemore.counsellor import MARKERS, Failed, Notice, PastTurn, Prompt
from bemore.openai import OpenAI

KEY = "sk-a-key-that-stays-secret"
PROMPT = Prompt("따뜻하게 답하세요.", "요즘 잠이 안 와요", [PastTurn(n, f"말 {n}", f"답 {n}") for n in range(10)])
WHOLE = "네, 듣고 있어요."
ROLE = b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": null}}]}\n\n'
DONE = b"data: [DONE]\n\n"


def client_for(url: str, *, api_key: str = KEY, first_chunk: float = 15, chunk: float = 10) -> OpenAI:
    limits = TimeLimits(first_chunk, chunk, 60)
    return OpenAI(api_key=api_key, base_url=f"{url}/v1", model="qwen3:8b", max_output_tokens=200, limits=limits)


@pytest.fixture
async def server() -> AsyncIterator[GeminiStandIn]:
    async with GeminiStandIn() as standin:
        standin.default = stream(ROLE, chat_event("네, "), chat_event("듣고 있어요."), chat_event(None, "stop"), DONE)
        yield standin


@pytest.fixture
async def model(server: GeminiStandIn) -> AsyncIterator[OpenAI]:
    async with client_for(server.url) as opened:
        yield opened


async def read(model: OpenAI) -> str:
    texts: list[str | Notice] = []
    await model.reply(PROMPT, texts.append)
    return "".join(text for text in texts if isinstance(text, str))


async def test_the_openai_package_sends_the_same_and_reads_the_same(server: GeminiStandIn, model: OpenAI) -> None:
    """The oracle, given the same conversation and the same answer."""
    server.default = stream(
        ROLE,
        chat_event("첫 조각, "),
        b'data: {"choices": [{"index": 0, "delta": {"reasoning_content": "hm", "content": null}}]}\n\n',
        b": keep-alive\n\n",
        chat_event("둘째 조각 😥"),
        chat_event(None, "stop"),
        b'data: {"choices": [], "usage": {"total_tokens": 9}}\n\n',
        DONE,
    )
    ours = await read(model)
    turns = [text for turn in PROMPT.history for text in (turn.user_message, turn.ai_response)]
    roles = ["user", "assistant"] * 10
    messages: list[Any] = [
        {"role": "system", "content": PROMPT.instruction},
        *({"role": role, "content": text} for role, text in zip(roles, turns, strict=True)),
        {"role": "user", "content": PROMPT.message},
    ]
    theirs = ""
    async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0) as oracle:
        chunks = await oracle.chat.completions.create(model="qwen3:8b", messages=messages, max_tokens=200, stream=True)
        async for chunk in chunks:
            theirs += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    assert ours == theirs == "첫 조각, 둘째 조각 😥"
    our, their = server.requests
    assert (our["path"], our["query"], our["body"]) == (their["path"], their["query"], their["body"])
    assert our["headers"]["Authorization"] == their["headers"]["Authorization"] == f"Bearer {KEY}"


async def test_without_a_key_no_authorization_is_sent(server: GeminiStandIn) -> None:
    async with client_for(server.url, api_key="") as model:
        assert await read(model) == WHOLE
    assert "Authorization" not in server.requests[0]["headers"]


ERROR = b'data: {"error": {"message": "overloaded", "type": "server_error", "code": 503}}\n\n'


@pytest.mark.parametrize(
    "failure",
    [status(429), status(503, '{"error": {"message": "Loading model"}}'), stream(), stream(ERROR), stream(ROLE, DONE)],
)
async def test_a_failure_that_may_pass_is_retried(server: GeminiStandIn, model: OpenAI, failure: Answer) -> None:
    server.answers.append(failure)
    assert await read(model) == WHOLE
    assert len(server.requests) == 2


BEGUN = (chat_event("많이 힘드"), chat_event("셨"))


@pytest.mark.parametrize("cut", [stream(*BEGUN), stream(*BEGUN, ERROR), silent_after(*BEGUN)])
async def test_a_reply_that_breaks_off_is_continued(server: GeminiStandIn, cut: Answer) -> None:
    server.answers.extend([cut, stream(chat_event("힘드셨겠어요."), chat_event(None, "stop"))])
    async with client_for(server.url, chunk=0.5) as model:
        assert await read(model) == "많이 힘드셨겠어요."
    assert server.requests[1]["body"]["messages"][-2:] == [
        {"role": "assistant", "content": "많이 힘드셨"},
        {"role": "user", "content": CONTINUE},
    ]


async def test_length_inside_a_sentence_gets_a_short_end(server: GeminiStandIn, model: OpenAI) -> None:
    server.answers.extend([stream(*BEGUN, chat_event(None, "length"), DONE), stream(chat_event("힘드셨네요.", "stop"))])
    assert await read(model) == "많이 힘드셨네요."
    assert server.requests[1]["body"]["messages"][-1]["content"] == FINISH_SENTENCE


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_reasoning_is_never_shown(server: GeminiStandIn, model: OpenAI, size: int) -> None:
    text = f"<think>\n{'[[위험]] 생각 ' * 9}\n</think>\n\n[[위협]] 네, 말씀해 주세요."
    server.answers.append(stream(*(chat_event(text[at : at + size]) for at in range(0, len(text), size)), DONE))
    texts: list[str | Notice] = []
    await model.reply(PROMPT, texts.append)
    assert [text for text in texts if isinstance(text, Notice)] == [MARKERS["[[위협]]"]]
    assert "".join(text for text in texts if isinstance(text, str)).strip() == "네, 말씀해 주세요."


async def test_reasoning_that_never_ends_is_no_text(server: GeminiStandIn, model: OpenAI) -> None:
    for end in ([chat_event(None, "length"), DONE], []):
        server.answers.append(stream(chat_event("<think>음"), *end))
        assert await read(model) == WHOLE
    server.default = stream(chat_event("<think>음"), chat_event(None, "length"), DONE)
    async with client_for(server.url, first_chunk=0.3) as hurried:
        with pytest.raises(Failed, match="GEMINI_MAX_OUTPUT_TOKENS"):
            await read(hurried)


async def test_max_tokens_under_its_other_name(
    server: GeminiStandIn, model: OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    server.answers.append(status(400, json.dumps({"error": {"message": words, "code": "unsupported_parameter"}})))
    assert await read(model) == await read(model) == WHOLE
    assert [request["body"].get("max_completion_tokens") for request in server.requests] == [None, 200, 200]
    assert [request["body"].get("max_tokens") for request in server.requests] == [200, None, None]
    assert len([message for message in caplog.messages if "max_completion_tokens" in message]) == 1


@pytest.mark.parametrize(
    ("number", "body", "named"),
    [
        (400, "{}", "OPENAI_MODEL"),
        (401, '{"error": {"message": "Incorrect API key"}}', "OPENAI_API_KEY"),
        (403, "", "OPENAI_API_KEY"),
        (404, '{"error": {"message": "model \'qwen3:8b\' not found"}}', "OPENAI_MODEL"),
        (429, '{"error": {"code": "insufficient_quota"}}', "OPENAI_API_KEY"),
        (302, "", "OPENAI_BASE_URL"),
    ],
)
async def test_what_an_operator_must_mend_is_not_retried_and_named(
    server: GeminiStandIn, model: OpenAI, number: int, body: str, named: str
) -> None:
    server.default = status(number, body, Location="http://127.0.0.1:9/elsewhere")
    with pytest.raises(Failed) as caught:
        await read(model)
    assert named in caught.value.cause
    assert KEY not in caught.value.cause
    assert len(server.requests) == 1


# LiteLLM's proxy, a server that people put in front of their models


ANSWER = "많이 지치셨겠어요. 요즘 잠은 얼마나 주무세요?"
CONFIG = {
    "model_list": [
        {"model_name": "local", "litellm_params": {"model": "openai/none", "api_key": "-", "mock_response": ANSWER}},
        {
            "model_name": "thinking",
            "litellm_params": {
                "model": "openai/none",
                "api_key": "-",
                "mock_response": f"<think>\n생각합니다.\n</think>\n\n{ANSWER}",
            },
        },
    ],
    "general_settings": {"master_key": KEY},
}


@pytest.fixture(scope="module")
def litellm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of LiteLLM's proxy, whose two models answer without any other server."""
    folder, port = tmp_path_factory.mktemp("litellm"), unused_port()
    # JSON is YAML.
    (folder / "config.yaml").write_text(json.dumps(CONFIG), encoding="utf-8")
    # The variable keeps it from loading a list of prices from the network.
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    options = f"--config config.yaml --host 127.0.0.1 --port {port} --telemetry False".split()
    command = [sys.executable, "-c", "import litellm; litellm.run_server()", *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text(errors="replace")[-2000:]
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("name", ["local", "thinking"])
async def test_a_turn_through_litellm(litellm: str, tmp_path: Path, name: str) -> None:
    values = {"OPENAI_BASE_URL": litellm, "OPENAI_MODEL": name, "OPENAI_API_KEY": KEY}
    async with started(tmp_path, **values) as program:
        assert f"model {name} at {litellm}" in program.log
        async with program.connect() as client:
            await client.ask("요즘 너무 지쳐요")
            frames = await client.reply()
            assert text_of(frames).strip() == ANSWER
            assert kinds_of(frames)[-1] == "complete"
        async with aiohttp.request("GET", f"{program.url}/health") as response:
            assert (await response.json())["ai"] == name
        await program.wait_for("outcome=complete")
    assert not any(word in program.log for word in (KEY, "지쳐", "지치", "Gemini"))


@pytest.mark.parametrize(("setting", "value"), [("OPENAI_API_KEY", "sk-wrong"), ("OPENAI_MODEL", "unknown-model")])
async def test_litellm_refuses_and_the_log_names_the_setting(
    litellm: str, tmp_path: Path, setting: str, value: str
) -> None:
    values = {"OPENAI_BASE_URL": litellm, "OPENAI_MODEL": "local", "OPENAI_API_KEY": KEY, setting: value}
    async with started(tmp_path, **values) as program:
        async with program.connect() as client:
            await client.ask("요즘 너무 지쳐요")
            assert kinds_of(await client.reply()) == ["error"]
        await program.wait_for(rf"outcome=ai_unavailable .*status 400: check .*{setting}")
    assert not any(word in program.log for word in (KEY, "sk-wrong", "지쳐"))

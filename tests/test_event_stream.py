"""Streams of both wire formats as text, without a socket: any cut, any line end, any shape."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standin import chat_event, event

from bemore import gemini_stream, openai
from bemore.attempts import Action, RetryableError
from bemore.counsellor import Blocked
from bemore.event_stream import MAX_SILENT_BYTES, AnswerParser, End

READERS = {"gemini": gemini_stream.read_event, "openai": openai.read_event}
WRITERS: dict[str, Callable[..., bytes]] = {"gemini": event, "openai": chat_event}
FINISH = {"gemini": "STOP", "openai": "stop"}


def parser(kind: str) -> AnswerParser:
    return AnswerParser(
        READERS[kind], lambda status, _: RetryableError(f"status {status}", Action.RETRY), "raise THE_SETTING"
    )


def read(kind: str, blocks: Sequence[bytes]) -> tuple[str, str]:
    """Return an answer's text, and how it ended."""
    answer = parser(kind)
    text = "".join([answer.feed(block) for block in blocks]) + answer.close()
    try:
        answer.check(text)
    except Blocked:
        return text, "blocked"
    except RetryableError as error:
        return text, error.cause
    return text, "whole"


def cuts(data: st.DataObject, stream: bytes) -> list[bytes]:
    """Cut a stream into blocks at any bytes."""
    places = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    return [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]


def rewritten(data: st.DataObject, events: list[bytes]) -> bytes:
    """Write events in another of the ways that the format permits."""
    line_end = data.draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    stream = b"\xef\xbb\xbf" if data.draw(st.booleans()) else b""
    for written in events:
        content = json.loads(written.removeprefix(b"data:"))
        indent, ascii_only = data.draw(st.sampled_from([None, 1])), data.draw(st.booleans())
        lines = json.dumps(content, ensure_ascii=ascii_only, indent=indent).encode().split(b"\n")
        stream += data.draw(st.sampled_from([b"", b": keep-alive" + line_end * 2, b"event: x" + line_end]))
        stream += b"".join(b"data:" + data.draw(st.sampled_from([b"", b" "])) + line + line_end for line in lines)
        stream += line_end
    return stream


@pytest.mark.parametrize("kind", READERS)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=6), max_size=5), data=st.data())
def test_any_cut_of_any_writing_gives_the_same_text(kind: str, texts: list[str], data: st.DataObject) -> None:
    whole = "".join(texts) + "네."
    events = [*(WRITERS[kind](text) for text in texts), WRITERS[kind]("네.", FINISH[kind])]
    assert read(kind, cuts(data, rewritten(data, events))) == (whole, "whole")


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_an_event_of_several_lines_is_read_byte_by_byte(line_end: bytes) -> None:
    lines = json.dumps(content("gemini", "가😥"), indent=1, ensure_ascii=False).encode().split(b"\n")
    stream = b"".join(b"data: " + line + line_end for line in lines) + line_end + event("네.", "STOP")
    assert read("gemini", [bytes([byte]) for byte in stream]) == ("가😥네.", "whole")


@pytest.mark.parametrize("kind", READERS)
@given(text=st.text(max_size=8), data=st.data())
def test_halves_of_a_character_in_two_events_are_joined(kind: str, text: str, data: st.DataObject) -> None:
    """JSON may escape a character outside of the basic plane as two halves, and a server may cut between them."""
    whole = f"{text}😥{text}네.".encode("utf-8", "replace").decode()
    units = whole.encode("utf-16-be")
    halves = [units[at : at + 2].decode("utf-16-be", "surrogatepass") for at in range(0, len(units), 2)]
    events = [b"data: %s\n\n" % json.dumps(content(kind, half)).encode() for half in halves]
    assert read(kind, cuts(data, b"".join([*events, WRITERS[kind]("", FINISH[kind])]))) == (whole, "whole")


def content(kind: str, text: str) -> dict[str, Any]:
    if kind == "gemini":
        return {"candidates": [{"content": {"parts": [{"text": text}]}}]}
    return {"choices": [{"delta": {"content": text}}]}


NAMES = (
    "error code candidates content parts text thought finishReason promptFeedback blockReason "
    "choices delta message finish_reason refusal object"
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES.split()), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", READERS)
@given(values=st.lists(JSON, max_size=3))
def test_an_event_of_any_shape_gives_text_or_an_error(kind: str, values: list[Any]) -> None:
    text, _ = read(kind, [b"data: %s\n\n" % json.dumps(value).encode() for value in values])
    text.encode()


def error(code: object, **beside: object) -> bytes:
    return json.dumps({"error": {"code": code, **beside}}).encode()


THOUGHT = b'data: {"candidates": [{"content": {"parts": [{"text": "hm", "thought": true}]}}]}\n\n'
USAGE = b'data: {"usageMetadata": {"totalTokenCount": 9}}\n\n'
NO_REASON = "the stream ended without a finish reason"
NO_TEXT = "an answer without any text"
GEMINI = {
    "no events": ([], "", NO_REASON),
    "usage alone": ([USAGE], "", NO_REASON),
    "HTML": ([b"<html>\n<p>data: x</p>\n"], "", NO_REASON),
    "STOP without text": ([event("", "STOP")], "", NO_TEXT),
    "STOP without content": ([event(finish="STOP")], "", NO_TEXT),
    "thoughts alone": ([THOUGHT, event(finish="STOP")], "", NO_TEXT),
    "RECITATION without text": ([event(finish="RECITATION")], "", NO_TEXT),
    "RECITATION with text": ([event("가"), event(finish="RECITATION")], "가", "whole"),
    "LANGUAGE with text": ([event("가", "LANGUAGE")], "가", "whole"),
    "MALFORMED_FUNCTION_CALL with text": ([event("가", "MALFORMED_FUNCTION_CALL")], "가", "whole"),
    "a finish reason of a later year": ([event("가", "NEW_REASON")], "가", "whole"),
    "MAX_TOKENS without text": ([event(finish="MAX_TOKENS")], "", f"{NO_TEXT}: raise THE_SETTING"),
    "MAX_TOKENS after a sentence": ([event("네. "), event("", "MAX_TOKENS")], "네. ", "whole"),
    "MAX_TOKENS inside a sentence": (
        [event("네. 그"), event("", "MAX_TOKENS")],
        "네. 그",
        "the tokens ended inside a sentence",
    ),
    "SAFETY after text": ([event("가"), event(finish="SAFETY")], "가", "blocked"),
    "PROHIBITED_CONTENT": ([event(finish="PROHIBITED_CONTENT")], "", "blocked"),
    "a blocked prompt": (
        [b'data: {"promptFeedback": {"blockReason": "OTHER"}, "usageMetadata": {}}\n\n'],
        "",
        "blocked",
    ),
    "text after an early STOP": ([event("가", "STOP"), event("나", "STOP"), event("다")], "가나다", "whole"),
    "an unspecified finish reason": ([event("가", "FINISH_REASON_UNSPECIFIED")], "가", NO_REASON),
    "a null text": (
        [b'data: {"candidates": [{"content": {"parts": [{"text": null}]}}]}\n\n', event("가", "STOP")],
        "가",
        "whole",
    ),
    "a part without text": (
        [b'data: {"candidates": [{"content": {"parts": [{"inlineData": {}}]}}]}\n\n', event("가", "STOP")],
        "가",
        "whole",
    ),
    "not JSON": ([event("가"), b"data: {nonsense}\n\n"], "가", "an event that is not JSON"),
    "another shape": ([event("가"), b"data: [1]\n\n"], "가", "an event of another shape"),
    "an error event": ([b"data: " + error(503) + b"\n\n"], "", "status 503"),
    "an error event with its code as text": ([b"data: " + error("429") + b"\n\n"], "", "status 429"),
    "an error event without a code": ([event("가"), b'data: {"error": "overloaded"}\n\n'], "가", "status 500"),
    "a bare error": ([error(503)], "", "status 503"),
    "a bare error over several lines": (
        [json.dumps({"error": {"code": 429}}, indent=2).encode() + b"\n"],
        "",
        "status 429",
    ),
    "a bare list of an error": ([b"[" + error(500) + b"]"], "", "status 500"),
    "a bare error after STOP": ([event("가", "STOP"), error(503)], "가", "status 503"),
    "a bare error before [DONE]": ([event("가"), error(503) + b"\n\ndata: [DONE]\n\n"], "가", "status 503"),
    "an answer that is no stream": (
        [json.dumps(json.loads(event("가", "STOP")[5:]), indent=1).encode()],
        "가",
        "whole",
    ),
    "no blank line at the end": ([event("가"), event("", "STOP").rstrip()], "가", "whole"),
    "an end inside an event": ([event("가"), event("나", "STOP")[:-9]], "가", NO_REASON),
}


@pytest.mark.parametrize("shape", GEMINI)
def test_gemini_shapes(shape: str) -> None:
    blocks, text, outcome = GEMINI[shape]
    assert read("gemini", blocks) == (text, outcome)


ROLE = b'data: {"choices": [{"delta": {"role": "assistant", "content": null}}]}\n\n'
DONE = b"data: [DONE]\n\n"
OPENAI = {
    "a role first": ([ROLE, chat_event("가"), chat_event("", "stop"), DONE], "가", "whole"),
    "reasoning_content": (
        [b'data: {"choices": [{"delta": {"reasoning_content": "hm", "content": null}}]}\n\n', chat_event("가", "stop")],
        "가",
        "whole",
    ),
    "reasoning alone": (
        [b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\n\n', chat_event(None, "length"), DONE],
        "",
        f"{NO_TEXT}: raise THE_SETTING",
    ),
    "usage without choices": (
        [chat_event("가", "stop"), b'data: {"choices": [], "usage": {}}\n\n', DONE],
        "가",
        "whole",
    ),
    "no [DONE]": ([chat_event("가", "stop")], "가", "whole"),
    "[DONE] without a finish reason": ([chat_event("가"), DONE], "가", "whole"),
    "neither": ([chat_event("가")], "가", NO_REASON),
    "[DONE] alone": ([DONE], "", NO_TEXT),
    "length": ([chat_event("네. 그", "length")], "네. 그", "the tokens ended inside a sentence"),
    "content_filter": ([chat_event("가"), chat_event(None, "content_filter")], "가", "blocked"),
    "a refusal": ([b'data: {"choices": [{"delta": {"refusal": "I cannot"}}]}\n\n', DONE], "", "blocked"),
    "an error object": ([chat_event("가"), b"data: " + error(None, message="x") + b"\n\n", DONE], "가", "status 500"),
    "an error object with a code": ([b"event: error\ndata: " + error("503") + b"\n\n"], "", "status 503"),
    "vLLM's error object": ([b'data: {"object": "error", "message": "x", "code": 400}\n\n'], "", "status 400"),
    "a null error": (
        [b'data: {"error": null, "choices": [{"delta": {"content": "\\uac00"}, "finish_reason": "stop"}]}\n\n'],
        "가",
        "whole",
    ),
    "an answer that is no stream": (
        [b'{"choices": [{"message": {"content": "\\uac00"}, "finish_reason": "stop"}]}'],
        "가",
        "whole",
    ),
}


@pytest.mark.parametrize("shape", OPENAI)
def test_openai_shapes(shape: str) -> None:
    blocks, text, outcome = OPENAI[shape]
    assert read("openai", blocks) == (text, outcome)


def test_an_error_after_a_finish_reason_may_end_the_reply() -> None:
    for blocks, may_end in (([event("가", "STOP"), error(503)], True), ([event("가"), error(503)], False)):
        answer = parser("gemini")
        text = "".join(map(answer.feed, blocks)) + answer.close()
        with pytest.raises(RetryableError) as caught:
            answer.check(text)
        assert caught.value.may_end is may_end


def test_an_event_with_900_kib_of_signature_is_read() -> None:
    part = json.dumps({"text": "가", "thoughtSignature": "A" * 900 * 1024})
    long = f'data: {{"candidates": [{{"content": {{"parts": [{part}]}}}}]}}\r\n\r\n'.encode()
    stream = long + event("나", "STOP")
    assert read("gemini", [stream[at : at + 16384] for at in range(0, len(stream), 16384)]) == ("가나", "whole")


@pytest.mark.parametrize("filler", [event(""), b": comment\n", b"data: A", b"data: 1\n", b"{"])
def test_a_stream_without_text_is_given_up_at_its_limit(filler: bytes) -> None:
    answer = parser("gemini")
    block = filler * (16384 // len(filler))
    for _ in range(MAX_SILENT_BYTES // len(block)):
        answer.feed(block)
    with pytest.raises(RetryableError, match="2 MiB") as caught:
        answer.feed(block + block)
    assert caught.value.action is Action.FAIL


def test_a_finish_reason_is_known_before_the_stream_ends() -> None:
    answer = parser("gemini")
    assert answer.feed(event("가", "STOP")) == "가"
    assert answer.end is End.COMPLETE

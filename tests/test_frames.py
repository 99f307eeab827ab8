"""The rules for frames, as functions."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bemore.conversation import Utterance
from bemore.counsellor import Emotion
from bemore.failures import ErrorCode, Failure
from bemore.outbox import Frame, Kind
from bemore_voice import SENTENCES, TokenBucket, encode, encode_frame, parse_frame, parse_utterance, storable

NOW = 1_800_000_000_000


def parse(**data: object) -> Utterance:
    return parse_utterance(data, NOW)


def code_of(text: str) -> ErrorCode:
    with pytest.raises(Failure) as caught:
        parse_utterance(parse_frame(text)[1], NOW)
    return caught.value.code


@pytest.mark.parametrize(
    "text",
    [
        "",
        "안녕",
        "{",
        "[]",
        "null",
        "3",
        '"ping"',
        "{}",
        '{"type": 1}',
        '{"type": null}',
        '{"data": {}}',
        '{"type": "ping"} x',
        '{"type": "ping", "data": NaN}',
        "[" * 60_000,
        '{"a":' * 10_000,
        "\ufeff{}",
    ],
)
def test_text_that_is_no_frame_is_invalid(text: str) -> None:
    assert code_of(text) is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize(
    "data",
    [
        "",
        ', "data": null',
        ', "data": []',
        ', "data": {}',
        ', "data": {"message": null}',
        ', "data": {"message": 3}',
        ', "data": {"message": ["가"]}',
        ', "data": "가"',
    ],
)
def test_request_without_a_message_is_invalid(data: str) -> None:
    assert code_of(f'{{"type": "request_ai_response"{data}}}') is ErrorCode.INVALID_REQUEST


# ECMA-262, 12.2 and 12.3: what trim() takes away, written out so as not to test a list against itself.
JS_SPACE = "\t\n\v\f\r \xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff"
JS_SPACE += "\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"


@pytest.mark.parametrize("blank", ["", " ", JS_SPACE, *JS_SPACE])
def test_blanks_are_an_empty_message(blank: str) -> None:
    with pytest.raises(Failure) as caught:
        parse(message=blank)
    assert caught.value.code is ErrorCode.EMPTY_MESSAGE


def test_message_is_trimmed_as_by_a_browser() -> None:
    assert parse(message=f"{JS_SPACE} 안녕 하세요 {JS_SPACE}").message == "안녕 하세요"
    for kept in ("\x1c", "\x85", "\u200b", "\u180e"):  # Python's strip() takes the first two away
        assert parse(message=kept).message == kept


def test_message_is_composed() -> None:
    """macOS sends a syllable as up to three letters; 667 of them are a message of 2,001 code points."""
    assert parse(message=unicodedata.normalize("NFD", "닭" * 667)).message == "닭" * 667


@pytest.mark.parametrize("emotion", list(Emotion))
def test_emotion_is_taken(emotion: str) -> None:
    assert parse(message="가", emotion=str(emotion)).emotion is Emotion(emotion)


@pytest.mark.parametrize("emotion", [None, "", "HAPPY", "joy", " sad", 1, True, [], {}, ["happy"], "sad'; --", "행복"])
def test_unknown_emotion_counts_as_none(emotion: object) -> None:
    assert parse(message="가", emotion=emotion).emotion is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1704902400000", 1704902400000),
        ("1704902400000.0", 1704902400000),
        ("1e3", 1000),
        ("9223372036854775807", 2**63 - 1),
    ]
    + [
        (odd, NOW)
        for odd in (
            "-1",
            "9223372036854775808",
            "1.5",
            "1e400",
            "-0.5",
            "true",
            "null",
            '"1"',
            "[]",
            "9" * 5000,
            "1e19",
        )
    ],
)
def test_timestamp_is_as_sent_or_the_servers(text: str, expected: int) -> None:
    kind, data = parse_frame(f'{{"type": "request_ai_response", "data": {{"message": "가", "timestamp": {text}}}}}')
    assert kind == "request_ai_response"
    assert parse_utterance(data, NOW).timestamp == expected


def test_unstorable_characters_are_replaced() -> None:
    text = json.loads('"\\ud83d\\ude25 \\ud83d 가 \\udc00 \\u0000"')
    assert parse(message=text).message == "😥 � 가 � �"


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_any_text_becomes_storable(text: str) -> None:
    kept = storable(text)
    assert len(kept) == len(text)
    assert "\0" not in kept
    encoded = encode_frame(Frame(Kind.CHUNK, 7, kept))
    assert encoded == encode("ai_stream_chunk", {"chunk": kept}, seq=7)
    assert json.loads(encoded.decode())["data"]["chunk"] == kept


LEAVES = st.none() | st.booleans() | st.floats() | st.integers() | st.text()
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)


@given(st.dictionaries(st.sampled_from(["message", "emotion", "timestamp"]) | st.text(max_size=8), JSON))
def test_any_data_is_parsed_or_refused(data: dict[str, object]) -> None:
    try:
        request = parse_utterance({"message": "가", **data}, NOW)
    except Failure:
        return
    assert request.message


def test_sentences_are_not_taken_for_an_expired_session() -> None:
    assert set(SENTENCES) == set(ErrorCode)
    for sentence in SENTENCES.values():
        assert not any(word in sentence.lower() for word in ("foreign key", "conversations", "session_id"))


@pytest.mark.parametrize("now", [0.0, 477.161583, 41.095132, 85.871639, 2039.020738, 86_400 * 365 / 3])
def test_a_token_bucket_holds_its_capacity_at_any_clock(now: float) -> None:
    """Most of these clocks refused a token of a full bucket before it allowed for rounding."""
    for capacity in (1, 3, 10, 60):
        bucket = TokenBucket(capacity, capacity / 60)
        assert [bucket.take(1, now) for _ in range(capacity)] == [0.0] * capacity
        assert bucket.take(1, now) == pytest.approx(60 / capacity)
        assert not bucket.is_full(now)
        assert bucket.take(1, now + 60 / capacity) == 0.0
        assert bucket.is_full(now + 61 + 60 / capacity)

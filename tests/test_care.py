"""What asks for a helpline: the decisions, their file, their time, and the prepared sentences."""

import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from train import read_sets, train

from bemore.care import (
    BLOCKED_REPLY,
    BLOCKED_SHORT,
    DETECTOR,
    FIRST,
    SHORT,
    WEIGHTS,
    Detector,
    Signal,
    plain,
    runs_of,
    signal_in,
    windows,
)

ROOT = Path(__file__).parent.parent
SETS = read_sets()
EVERYDAY = "오늘은 회사에서 회의를 세 번 했어요. 점심에는 동료들과 국수를 먹었고요. 저녁에는 공원을 걸었어요. "


@pytest.mark.parametrize(
    ("message", "signal"),
    [
        ("죽고 싶어요", Signal.EXPLICIT),
        ("자살하고 싶어요", Signal.EXPLICIT),
        ("어젯밤에 손목을 그었어요", Signal.EXPLICIT),
        ("지금 옥상에 서 있어요 뛰어내리려고요", Signal.EXPLICIT),
        ("주거버리고 시퍼", Signal.EXPLICIT),
        ("죽 고 싶 다", Signal.EXPLICIT),
        ("wnrrh tlvek", Signal.EXPLICIT),  # 죽고 싶다 with the keyboard switched
        ("제가 없어지면 다들 편해질 거예요", Signal.INDIRECT),
        ("그 인간 죽여버리고 싶어요", Signal.VIOLENCE),
        ("안녕하세요", None),
        ("배고파 죽겠다", None),
        ("요즘 잠이 안 와요", None),
        ("오늘 점심 뭐 먹지", None),
        ("🙂", None),
        ("", None),
    ],
)
def test_plain_cases(message: str, signal: Signal | None) -> None:
    assert signal_in(message) is signal


@pytest.mark.parametrize("place", [0, 200, 600, 1200])
def test_one_sentence_in_a_long_story_counts_whole(place: int) -> None:
    story = EVERYDAY * 30
    at = story.index(". ", place) + 2
    assert signal_in(story[:1900]) is None
    assert signal_in((story[:at] + "사실은 매일 죽고 싶다는 생각을 해요. " + story[at:])[:2000]) is Signal.EXPLICIT


def test_in_speech_without_punctuation_too() -> None:
    told = "어제는 시장에 다녀왔는데 사람이 많아서 한참 걸었고 집에 와서 밥을 먹고 "
    assert signal_in(told * 3 + "사실은 매일 죽고 싶다는 생각을 하는데 " + told * 3) is Signal.EXPLICIT


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_every_unicode_form_of_a_text_is_read_alike(form: str) -> None:
    for message in ("죽고 싶어요", "ㅈㅅ하고 싶다", "그만 살고 싶어요"):
        normal = unicodedata.normalize(form, message)  # type: ignore[arg-type]
        assert plain(normal) == plain(message)


def test_windows_cover_every_letter_of_a_text() -> None:
    for message in ("가", EVERYDAY, "가나다 " * 200, (EVERYDAY * 30)[:2000]):
        text = runs_of(message).text
        covered = {at for start, end in windows(text) for at in range(start, end)}
        assert covered == set(range(len(text)))


LONGEST = {
    "syllables": "".join(chr(0xAC00 + at * 7919 % 11172) for at in range(2000)),
    "a plea over and over": ("죽고 싶어요 " * 300)[:2000],
    "sentences of one letter": "죽. " * 666,
    "full stops that are no end": "…" * 1999 + "x",
    "a letter that becomes 18": "\ufdfa" * 2000,
    "letters that become three": "㈀" * 2000,
    "Latin": "wnrrh " * 333,
    "nothing to hear": "\u200b!? " * 500,
}


@pytest.mark.parametrize("name", LONGEST)
def test_the_longest_message_is_read_without_holding_others_up(name: str) -> None:
    """A bound that only a runaway passes: bench/care.py measures the time."""
    began = time.process_time()
    signal_in(LONGEST[name])
    assert time.process_time() - began < 0.2


def test_training_anew_gives_the_same_decisions() -> None:
    anew = Detector(train(SETS))
    sentences = [sentence for rows in SETS.values() for _, sentence in rows][::7]
    assert len(sentences) > 1500
    assert [anew.signal_in(sentence) for sentence in sentences] == [signal_in(sentence) for sentence in sentences]


def test_the_file_is_small() -> None:
    assert WEIGHTS.stat().st_size <= 256 * 1024
    assert DETECTOR.signal_in("죽고 싶어요") is Signal.EXPLICIT


def test_the_sets_are_labelled_and_say_nothing_twice() -> None:
    groups = {"explicit", "obfuscated", "indirect", "homicidal", "negated", "others", "neutral", "idiom", "death_grief"}
    for name, rows in SETS.items():
        assert {group for group, _ in rows} <= groups, name
        assert len({sentence for _, sentence in rows}) == len(rows), name
    assert sum(map(len, SETS.values())) > 2 * 4700


def test_a_clinician_can_see_what_spoke() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "bemore.care", "요즘 죽고 싶어요", "안녕하세요"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    first, why, second = ran.stdout.splitlines()
    assert first == "explicit: 요즘 죽고 싶어요"
    assert why.startswith("  explicit by ")
    assert "죽고 +" in why
    assert second == "none: 안녕하세요"


# The helpline sentences


@pytest.mark.parametrize("sentences", [FIRST, SHORT])
def test_helpline_sentences_name_the_right_numbers_for_eye_and_ear(sentences: dict[Signal, str]) -> None:
    numbers = {
        Signal.EXPLICIT: ("109", "119", "112", "문자"),
        Signal.INDIRECT: ("109", "문자"),
        Signal.VIOLENCE: ("112", "109"),
    }
    for signal, sentence in sentences.items():
        assert all(number in sentence for number in numbers[signal])
        assert "109, 일공구" in sentence
        assert sentence.endswith(" ")
        assert not any(sign in sentence for sign in "*#()\n")
        assert len(sentence) <= 120
        assert len(SHORT[signal]) < len(FIRST[signal])


@pytest.mark.parametrize("text", [*FIRST.values(), *SHORT.values(), BLOCKED_REPLY, BLOCKED_SHORT])
def test_prepared_texts_are_three_sentences_at_most_and_promise_nothing(text: str) -> None:
    assert len(re.findall(r"[.?!](?:\s|$)", text)) <= 3
    assert "무료" not in text
    assert "화가" not in text


def test_reply_in_place_of_a_blocked_one_names_the_numbers_once() -> None:
    assert all(number in BLOCKED_REPLY for number in ("109, 일공구", "1366", "119", "112"))
    assert not any(character.isdigit() for character in BLOCKED_SHORT)

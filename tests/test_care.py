"""What asks for a helpline: the decisions, their file, their measure, and the helpline sentences."""

import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import measure
import pytest
from train import HARMLESS, SIGNS, read_sets, train

from bemore import anchors
from bemore.anchors import Tier, anchors_in
from bemore.care import (
    BLOCKED_REPLY,
    BLOCKED_SHORT,
    DETECTOR,
    FIRST,
    LONGEST,
    SHORT,
    THRESHOLDS,
    WEIGHTS,
    Detector,
    Signal,
    runs_of,
    signal_in,
    windows,
)
from bemore.sounds import heard, plain

ROOT = Path(__file__).parent.parent
SETS = read_sets()
EVERYDAY = "오늘은 회사에서 회의를 세 번 했어요. 점심에는 동료들과 국수를 먹었고요. 저녁에는 공원을 걸었어요. "
PLEA = "죽고 싶어요"


# Decisions


@pytest.mark.parametrize(
    ("message", "signal"),
    [
        (PLEA, Signal.EXPLICIT),
        ("자살하고 싶어요", Signal.EXPLICIT),
        ("어젯밤에 손목을 그었어요", Signal.EXPLICIT),
        ("지금 옥상에 서 있어요 뛰어내리려고요", Signal.EXPLICIT),
        ("유서 다 썼어, 이제 편해", Signal.EXPLICIT),
        ("살기 싫어요", Signal.EXPLICIT),
        ("제가 없어지면 다들 편해질 거예요", Signal.INDIRECT),
        ("그 인간 죽여버리고 싶어요", Signal.VIOLENCE),
        ("I want to die", Signal.EXPLICIT),
    ],
)
def test_signs_raise_their_signal(message: str, signal: Signal) -> None:
    assert signal_in(message) is signal


HARMLESS_KINDS = {
    "nothing said": ["", "🙂", "안녕하세요", "아니야 농담이야"],
    "a wish": ["술 마시고 싶다", "사표 던지고 나오고 싶어", "우울증 약을 끊고 싶어요"],
    "words that sound like another": ["나는 꼼꼼한데 여친은 안 꼼꼼해", "혼자 살고 싶다", "사유서를 써야 해요"],
    "everyday talk": ["이제 느긋하게 수익만 기다리면 돼. 기분 좋다.", "오늘 점심 뭐 먹지", "투자해서 돈 좀 벌었어"],
    "the talk itself": ["그다음 이야기예요", "한 가지 더 있어요"],
    "an idiom": ["배고파 죽겠다", "게임에서 또 죽었다", "더워 죽겠네"],
    "distress": ["요즘 잠이 안 와요", "회사 가기 싫어요"],
    "grief": ["자살한 동생이 보고 싶어요", "엄마가 돌아가신 지 일 년 됐어요"],
    "a past that is over": ["예전에 자해했는데 지금은 괜찮아요"],
    "a worry about a friend": ["죽고 싶다는 친구를 어떻게 도와줘야 해요", "자해하는 친구가 있어요"],
    "a victim": ["아빠가 칼 들고 죽여버린다고 해요", "오빠가 저를 죽인대요 살려주세요", "남편이 목을 졸랐어요"],
    "an intrusive thought": ["아기를 보면 던져버리고 싶은 생각이 들어요"],
}


@pytest.mark.parametrize("kind", HARMLESS_KINDS)
def test_harmless_talk_raises_nothing(kind: str) -> None:
    assert {message: signal_in(message) for message in HARMLESS_KINDS[kind]} == dict.fromkeys(HARMLESS_KINDS[kind])


DISGUISES = {
    "spelling": "주꼬 시퍼요",
    "spaces": "죽 고 싶 어 요",
    "dots": "죽.고.싶.어.요",
    "emoji": "죽🙂고🙂싶어요",
    "initials": "ㅈㅅ하고 싶어요",
    "jamo": "ㅈㅜㄱㄱㅗ 싶어요",
    "a switched keyboard": "wnrrh tlvdjdy",
    "capitals on it": "WNRRH TLVDJDY",
    "decomposed": unicodedata.normalize("NFD", PLEA),
    "a Hangul filler": "죽\u3164고\u3164싶\u3164어요",
    "jungseong and choseong fillers": "죽\u115f고 싶\u1160어요",
    "a halfwidth filler": "죽\uffa0고 싶어요",
    "zero-width signs": "죽\u200b고\u200d 싶\ufeff어요",
    "zero-width signs between jamo": "\u200b".join(unicodedata.normalize("NFD", PLEA)),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_disguised_sign_is_heard(disguise: str) -> None:
    assert signal_in(DISGUISES[disguise]) is Signal.EXPLICIT


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_every_unicode_form_of_a_text_is_read_alike(form: str) -> None:
    for message in (PLEA, "ㅈㅅ하고 싶다", "그만 살고 싶어요"):
        normal = unicodedata.normalize(form, message)  # type: ignore[arg-type]
        assert plain(normal) == plain(message)


@pytest.mark.parametrize(
    ("word", "korean"), [("wnrrh", "죽고"), ("tlvek", "싶다"), ("rhkdghk", "광화"), ("dkswdk", "앉아")]
)
def test_switched_keyboard_is_read_as_korean(word: str, korean: str) -> None:
    assert plain(word) == korean


@pytest.mark.parametrize("word", ["hello", "want", "myself", "wn", "end"])
def test_word_that_writes_no_korean_stays_latin(word: str) -> None:
    assert plain(word) == word


def test_sentence_ends_at_a_full_stop_without_a_space() -> None:
    assert plain("그렇게 생각합니다.그래서 했죠?네.") == "그렇게 생각합니다|그래서 했죠|네"
    assert plain("죽.고.싶.어.요") == "죽 고 싶 어 요"


def test_letters_drawn_out_count_twice() -> None:
    assert plain("ㅅㅅㅅㅅㅅㅅ 싫어어어어어") == "ㅅㅅ 싫어어"


# Anchors


def found(message: str) -> list[tuple[str, Tier]]:
    return [(anchor.word, anchor.tier) for anchor in anchors_in(heard(plain(message)))]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("죽고 싶다", [("죽고싶", Tier.STRONG)]),
        ("죽고 시퍼", [("죽고싶", Tier.STRONG)]),
        ("저 자살 생각해요", [("자살", Tier.STRONG)]),
        ("약을 먹고", [("약을", Tier.WEAK)]),
        ("혼자 살아요", []),
        ("자. 살살", []),
        ("기죽지 마", []),
        ("사람들을 사랑해", []),
        ("제목을 고쳐요", []),
        ("목을 다쳤어요", [("목을", Tier.WEAK)]),
        ("내일 만나자 해도", []),
        ("때려죽일 놈", [("때려죽", Tier.STRONG)]),
        ("채워주길 바라요", []),
    ],
)
def test_anchor_is_found_as_it_sounds(message: str, expected: list[tuple[str, Tier]]) -> None:
    assert found(message) == expected


def test_anchors_are_words_of_their_own_and_found_by_themselves() -> None:
    for words, tier in ((anchors.STRONG, Tier.STRONG), (anchors.WEAK, Tier.WEAK)):
        missing = [word for word in words.split() if [kind for _, kind in found(word.rstrip("~"))] != [tier]]
        assert missing == []
    assert [word for word in anchors.NO_ANCHORS.split() if found(word.rstrip("~"))] == []


def test_less_evidence_is_asked_beside_a_stronger_anchor() -> None:
    for thresholds in THRESHOLDS.values():
        assert thresholds[Tier.NONE] > thresholds[Tier.WEAK] > thresholds[Tier.STRONG]


# Long messages


@pytest.mark.parametrize("place", [0, 200, 600, 1200])
def test_one_sentence_in_a_long_story_counts_whole(place: int) -> None:
    story = EVERYDAY * 30
    at = story.index(". ", place) + 2
    assert signal_in(story[:1900]) is None
    assert signal_in((story[:at] + "사실은 매일 죽고 싶다는 생각을 해요. " + story[at:])[:2000]) is Signal.EXPLICIT


def test_sign_in_speech_without_punctuation_is_found() -> None:
    told = "어제는 시장에 다녀왔는데 사람이 많아서 한참 걸었고 집에 와서 밥을 먹고 "
    assert signal_in(told * 3 + "사실은 매일 죽고 싶다는 생각을 하는데 " + told * 3) is Signal.EXPLICIT


def test_longer_story_must_say_more_beside_a_weak_anchor_only() -> None:
    def score(sign: str, sentences: int) -> float:
        """Return what the sign's own window scores after so many sentences."""
        story = EVERYDAY * (sentences // 3) + sign
        return {judgement.end - judgement.start: judgement.score for judgement in DETECTOR.judgements(story)}[len(sign)]

    weak, strong = "칼을 샀어요 제 배를 찌르려고요", PLEA
    assert score(weak, 3) > score(weak, 12) > 0
    assert score(strong, 3) == pytest.approx(score(strong, 12))


def test_windows_cover_every_letter_and_are_short() -> None:
    for message in ("가", EVERYDAY, "가나다 " * 200, (EVERYDAY * 30)[:2000], "죽. " * 100):
        text = runs_of(message).text
        covered = {at for start, end in windows(text) for at in range(start, end)}
        assert covered == set(range(len(text)))
        assert all(end - start <= LONGEST for start, end in windows(text))


EXTREMES = {
    "syllables": "".join(chr(0xAC00 + at * 7919 % 11172) for at in range(2000)),
    "a sign over and over": ("죽고 싶어요 " * 300)[:2000],
    "sentences of one letter": "죽. " * 666,
    "full stops that are no end": "…" * 1999 + "x",
    "a letter that becomes 18": "\ufdfa" * 2000,
    "letters that become three": "㈀" * 2000,
    "a switched keyboard": "wnrrh " * 333,
    "one Latin word": "wk" * 1000,
    "nothing to hear": "\u200b!? " * 500,
}


@pytest.mark.parametrize("name", EXTREMES)
def test_longest_message_is_read_without_holding_others_up(name: str) -> None:
    """A bound that only a runaway passes: bench/care.py measures the time."""
    began = time.process_time()
    signal_in(EXTREMES[name])
    assert time.process_time() - began < 0.2


# The file of weights, and its measure


def test_training_anew_gives_the_same_decisions() -> None:
    anew = Detector(train(SETS))
    sentences = [sentence for rows in SETS.values() for _, sentence in rows][::7]
    assert len(sentences) > 1500
    assert [anew.signal_in(sentence) for sentence in sentences] == [signal_in(sentence) for sentence in sentences]


def test_file_of_weights_is_small() -> None:
    assert WEIGHTS.stat().st_size <= 256 * 1024


def test_sets_are_labelled_and_say_nothing_twice() -> None:
    groups = {*SIGNS, *HARMLESS, "negated"}
    for name, rows in SETS.items():
        assert {group for group, _ in rows} <= groups, name
        assert len({sentence for _, sentence in rows}) == len(rows), name


def test_clinician_can_see_what_spoke() -> None:
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
    assert why.endswith("anchors: 죽고싶 (strong)")
    assert second == "none: 안녕하세요"


def test_measure_prints_what_a_folder_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "talk.tsv").write_text(f"explicit\t{PLEA}\nneutral\t안녕하세요\nneutral\t{PLEA}!\n", encoding="utf-8")
    measure.main(["--real", str(tmp_path), "--misses", "5"])
    _, _, signs, harmless, *errors = capsys.readouterr().out.splitlines()
    assert signs == "| talk | explicit | 1 | 100.0% | 100.0% | 0.0% | 0.0% |"
    assert harmless == "| talk | neutral | 2 | 50.0% | 50.0% | 0.0% | 0.0% |"
    assert [error.rpartition(": ")[2] for error in errors] == [f"{PLEA}!"]


def test_measure_judges_each_set_by_what_the_others_teach() -> None:
    few = {name: SETS[name] for name in ("first", "hard", "mixed")}
    results = measure.left_out(few)
    assert {name: len(rows) for name, rows in results.items()} == {name: len(rows) for name, rows in few.items()}
    head, _, first, *_ = measure.written_table(results)
    assert head.startswith("| set | explicit |")
    assert first.startswith("| first | ")
    assert first.count(" of ") == len({group for group, _ in few["first"]})
    # A detector that has seen the set finds more in it.
    unseen = sum(row.wrong for row in results["hard"])
    assert sum(row.wrong for row in measure.judge(Detector(train(few)), few["hard"])) < unseen


def test_document_publishes_the_figures_of_the_unseen_sets() -> None:
    unseen = {name: measure.judge(DETECTOR, rows) for name, rows in read_sets(ROOT / "care" / "unseen").items()}
    published = (ROOT / "docs" / "safety.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in measure.real_table(unseen) if line not in published] == []


def test_bench_measures_every_message() -> None:
    ran = subprocess.run(
        [sys.executable, "bench/care.py", "--rounds", "1"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(re.fullmatch(r".+: [\d.]+ ms", line) for line in ran.stdout.splitlines())
    assert len(ran.stdout.splitlines()) > 5


# The helpline sentences


@pytest.mark.parametrize("sentences", [FIRST, SHORT])
def test_sentences_name_the_right_numbers_for_eye_and_ear(sentences: dict[Signal, str]) -> None:
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
def test_prepared_texts_are_short_and_promise_nothing(text: str) -> None:
    assert len(re.findall(r"[.?!](?:\s|$)", text)) <= 3
    assert "무료" not in text
    assert "화가" not in text


def test_reply_in_place_of_a_blocked_one_names_the_numbers_once() -> None:
    assert all(number in BLOCKED_REPLY for number in ("109, 일공구", "1366", "119", "112"))
    assert not any(character.isdigit() for character in BLOCKED_SHORT)

"""MarkerFilter: markers become notices however a stream cuts them, and no other text is changed or delayed."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bemore.counsellor import MARKERS, MarkerFilter, Notice

MARKER = re.compile("|".join(map(re.escape, MARKERS)))
BEGINNINGS = {marker[:size] for marker in MARKERS for size in range(len(marker))}
PIECES = st.sampled_from(["네, ", "가", " ", "위", "]", *sorted(BEGINNINGS), *MARKERS, *(m[1:] for m in MARKERS)])


def text_of(pieces: list[str | Notice]) -> str:
    return "".join(piece for piece in pieces if isinstance(piece, str))


@given(st.lists(PIECES), st.data())
def test_any_cut_gives_the_same_text_and_notices(pieces: list[str], data: st.DataObject) -> None:
    text, marker, at = "".join(pieces), MarkerFilter(), 0
    told: list[str | Notice] = []
    while at < len(text):
        size = data.draw(st.integers(1, 8))
        told += marker.feed(text[at : at + size])
        at = min(at + size, len(text))
        # Only the beginning of a marker is held.
        so_far = MARKER.sub("", text[:at])
        assert so_far.startswith(text_of(told))
        held = so_far[len(text_of(told)) :]
        assert held in BEGINNINGS
    # A marker that the end breaks off is not shown.
    *before, last = MARKER.split(text)
    assert text_of(told) + marker.rest() == "".join(before) + re.sub(r"\[\[(위((험|협)\]?)?)?\Z", "", last)
    assert [piece for piece in told if isinstance(piece, Notice)] == [MARKERS[found] for found in MARKER.findall(text)]
    assert "" not in told


@pytest.mark.parametrize("text", MARKERS)
def test_a_marker_in_two_pieces_is_one_notice_before_the_text(text: str) -> None:
    for cut in range(1, len(text)):
        marker = MarkerFilter()
        assert marker.feed(text[:cut]) == []
        assert marker.feed(text[cut:] + "네.") == [MARKERS[text], "네."]
        assert marker.rest() == ""


def test_text_that_can_begin_no_marker_is_not_delayed() -> None:
    marker = MarkerFilter()
    for text in ("네", ", 알겠", "어요]", "[가", "109"):
        assert marker.feed(text) == [text]

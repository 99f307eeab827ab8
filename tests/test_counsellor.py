"""The marker by which a model tells of a danger: taken out of a stream however it is cut, and nothing else with it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bemore.counsellor import RISK_MARKER, MarkerFilter, Notice

# Words, whole markers, and beginnings and ends of them.
PIECES = st.sampled_from(
    ["네, ", "가", " ", "[", "]", "[[", "1", RISK_MARKER[:-1], RISK_MARKER[1:], RISK_MARKER, RISK_MARKER + RISK_MARKER]
)


def text_of(pieces: list[str | Notice]) -> str:
    return "".join(piece for piece in pieces if isinstance(piece, str))


@given(st.lists(PIECES), st.data())
def test_whatever_the_cuts_the_marker_goes_and_all_else_stays(pieces: list[str], data: st.DataObject) -> None:
    text, marker, at = "".join(pieces), MarkerFilter(), 0
    told: list[str | Notice] = []
    while at < len(text):
        size = data.draw(st.integers(1, 8))
        told += marker.feed(text[at : at + size])
        at = min(at + size, len(text))
        # Nothing is held back but what may still become a marker.
        so_far = text[:at].replace(RISK_MARKER, "")
        held = so_far[len(text_of(told)) :]
        assert so_far == text_of(told) + held
        assert RISK_MARKER.startswith(held)
        assert len(held) < len(RISK_MARKER)
    assert text_of(told) + marker.rest() == text.replace(RISK_MARKER, "")
    assert told.count(Notice.RISK) == text.count(RISK_MARKER)
    assert "" not in told


@pytest.mark.parametrize("cut", range(1, len(RISK_MARKER)))
def test_a_marker_in_two_pieces_is_one_notice_before_the_text(cut: int) -> None:
    marker = MarkerFilter()
    assert marker.feed(RISK_MARKER[:cut]) == []
    assert marker.feed(RISK_MARKER[cut:] + "네.") == [Notice.RISK, "네."]
    assert marker.rest() == ""


def test_text_that_can_begin_no_marker_is_not_held_back_at_all() -> None:
    marker = MarkerFilter()
    for text in ("네", ", 알겠", "어요]", "[가", "109"):
        assert marker.feed(text) == [text]

"""Who may connect, as rules over strings."""

import jwt
import pytest

from bemore.access import (
    fresh_token,
    is_loopback,
    is_own_name,
    is_session_id,
    is_welcome,
    issue_token,
    last_forwarded,
    rate_limit_key,
    token_expiry,
    token_in,
)

APP = "https://app.example"
SECRET = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("text", ["a", "test-session-123", "한글 세션", "a" * 255, "가" * 255, "a/b", "..%2F", "'--"])
def test_a_session_id_is_printable_text(text: str) -> None:
    assert is_session_id(text)


@pytest.mark.parametrize("text", ["", "a" * 256, "가" * 256, "\0", "a\nb", "a\x7fb", "\u202e", "\xa0", "\ud800"])
def test_any_other_text_is_no_session_id(text: str) -> None:
    assert not is_session_id(text)


@pytest.mark.parametrize(
    ("origin", "own", "guarded", "welcome"),
    [
        (None, "http://127.0.0.1:8000", True, True),
        (APP, "http://127.0.0.1:8000", True, True),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000", True, True),
        ("http://localhost:8000", "http://localhost:8000", True, True),
        ("http://[::1]:8000", "http://[::1]:8000", True, True),
        ("null", "http://127.0.0.1:8000", True, False),
        ("http://app.example", "http://127.0.0.1:8000", True, False),  # another scheme
        ("https://app.example:444", "http://127.0.0.1:8000", True, False),  # another port
        ("https://app.example.evil.example", "http://127.0.0.1:8000", True, False),
        ("HTTPS://APP.EXAMPLE", "http://127.0.0.1:8000", True, False),  # browsers write lower case
        ("", "http://127.0.0.1:8000", True, False),
        ("http://evil.example", "http://evil.example", True, False),  # a name that points here
        (None, "http://evil.example", True, False),
        ("http://voice.example", "http://voice.example", False, True),
    ],
)
def test_allowed_and_own_origins_are_welcome(origin: str | None, own: str, guarded: bool, welcome: bool) -> None:
    assert is_welcome(origin, own, frozenset({APP}), guard_name=guarded) is welcome


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("localhost", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("app.example", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("[oops", False),
        ("", False),
    ],
)
def test_a_strangers_name_for_this_machine_is_told_from_its_own(host: str, own: bool) -> None:
    assert is_own_name(host, frozenset({APP})) is own


def test_the_name_in_host_is_the_servers_own() -> None:
    assert is_own_name("mybox:8000", frozenset(), "MyBox")
    assert not is_own_name("evil.example:8000", frozenset(), "MyBox")
    assert not is_own_name("", frozenset(), "")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.255.0.9", True),
        ("127.1", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("::1", True),
        ("0:0:0:0:0:0:0:1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("127.evil.invalid", False),
    ],
)
def test_a_host_is_loopback_by_what_it_resolves_to(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_a_name_with_one_public_address_is_not_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(2, 1, 6, "", ("127.0.0.1", 0)), (2, 1, 6, "", ("192.0.2.1", 0))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    assert not is_loopback("both.example")
    del found[1]
    assert is_loopback("alias.example")


@pytest.mark.parametrize(
    ("peer", "forwarded", "counted"),
    [
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.5", "203.0.113.5"),
        ("10.0.0.1", "203.0.113.5:1234", "203.0.113.5"),
        ("10.0.0.1", "[2001:db8::1]:80", "2001:db8::/64"),
        ("2001:db8::2", "", "2001:db8::/64"),
        ("10.0.0.1", "::ffff:10.0.0.9", "10.0.0.9"),
        ("10.0.0.1", "nonsense", "10.0.0.1"),
        ("", "", ""),
    ],
)
def test_addresses_are_counted_by_household(peer: str, forwarded: str, counted: str) -> None:
    assert rate_limit_key(peer, forwarded) == counted


def test_of_a_forwarded_header_only_the_last_word_counts() -> None:
    assert last_forwarded(["10.0.0.1", "10.0.0.2, 10.0.0.9"]) == "10.0.0.9"
    assert last_forwarded([]) == ""


GOOD = {"sub": "가", "exp": 1}


def test_a_token_tells_when_it_expires_also_afterwards() -> None:
    assert token_expiry("가", issue_token(SECRET, "가", 1), [SECRET]) == 1


@pytest.mark.parametrize(
    "token",
    [
        jwt.encode({**GOOD, "sub": "나"}, SECRET, algorithm="HS256"),
        jwt.encode(GOOD, SECRET[::-1], algorithm="HS256"),
        jwt.encode(GOOD, "", algorithm="none"),
        jwt.encode(GOOD, SECRET * 2, algorithm="HS512"),
        jwt.encode({"exp": 1}, SECRET, algorithm="HS256"),
        jwt.encode({"sub": "가"}, SECRET, algorithm="HS256"),
        jwt.encode({**GOOD, "exp": "1"}, SECRET, algorithm="HS256"),
        issue_token(SECRET, "가", 1) + "x",
        "x",
        "",
        "가.나.다",
        "\udcff\udcfe.a.b",
    ],
)
def test_any_other_token_is_not_the_sessions(token: str) -> None:
    assert token_expiry("가", token, [SECRET]) is None
    assert fresh_token("가", token, [SECRET], ttl_seconds=100, now=0) == ""


def test_tokens_of_the_old_secret_are_still_ours() -> None:
    token = issue_token(SECRET, "가", 2**40)
    assert token_expiry("가", token, [SECRET[::-1], SECRET]) == 2**40


@pytest.mark.parametrize(("left", "due"), [(101, False), (51, False), (50, False), (49, True), (-1, True)])
def test_a_token_is_renewed_after_half_of_its_life(left: int, due: bool) -> None:
    token = issue_token(SECRET, "가", 1000 + left)
    fresh = fresh_token("가", token, [SECRET[::-1], SECRET], ttl_seconds=100, now=1000)
    assert bool(fresh) is due
    if due:
        assert token_expiry("가", fresh, [SECRET[::-1]]) == 1100


@pytest.mark.parametrize(
    ("authorization", "query", "token"),
    [("Bearer a", "b", "a"), ("bearer a", "", "a"), ("Basic a", "b", "b"), ("", "b", "b"), ("", "", "")],
)
def test_a_token_comes_by_header_or_query(authorization: str, query: str, token: str) -> None:
    assert token_in(authorization, query) == token

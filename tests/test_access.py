"""Who may connect, as rules over strings."""

import pytest

from bemore.access import (
    AddressLimit,
    is_loopback,
    is_own_name,
    is_token_for,
    is_welcome,
    issue_token,
    last_forwarded,
    rate_limit_key,
    token_in,
)

APP = "https://app.example"
SECRET = "0123456789abcdef0123456789abcdef"


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
        ("http://evil.example", "http://evil.example", True, False),  # a name that points here
        (None, "http://evil.example", True, False),
        ("http://voice.example", "http://voice.example", False, True),
    ],
)
def test_pages_of_allowed_origins_and_the_servers_own_are_welcome(
    origin: str | None, own: str, guarded: bool, welcome: bool
) -> None:
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


def test_the_name_that_a_server_was_told_to_listen_on_is_its_own() -> None:
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


def test_a_name_of_which_one_address_is_reached_by_others_is_not_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_address_has_a_minutes_worth_at_once_and_then_one_at_a_time() -> None:
    now = [1000.0]
    limit = AddressLimit(3, lambda: now[0])
    assert [limit.take("10.0.0.1") for _ in range(4)] == [0, 0, 0, 20]
    assert limit.take("10.0.0.2") == 0
    now[0] += 19.5
    assert limit.take("10.0.0.1") == 1
    now[0] += 0.5
    assert [limit.take("10.0.0.1") for _ in range(2)] == [0, 20]


def test_an_address_that_is_quiet_again_is_forgotten() -> None:
    now = [0.0]
    limit = AddressLimit(60, lambda: now[0])
    for number in range(1000):
        assert limit.take(f"10.0.0.{number}") == 0
    assert len(limit) == 1000
    now[0] += 2
    assert limit.take("10.0.0.0") == 0
    assert len(limit) == 1


def test_a_token_is_good_for_its_session_alone() -> None:
    token = issue_token(SECRET, "가", 2**40)
    assert is_token_for("가", token, SECRET)
    assert not is_token_for("나", token, SECRET)
    assert not is_token_for("가", token, SECRET[::-1])
    assert not is_token_for("가", issue_token(SECRET, "가", 1), SECRET)  # long over
    assert not is_token_for("가", "", SECRET)


@pytest.mark.parametrize(
    ("authorization", "query", "token"),
    [("Bearer a", "b", "a"), ("bearer a", "", "a"), ("Basic a", "b", "b"), ("", "b", "b"), ("", "", "")],
)
def test_a_token_comes_by_header_or_query(authorization: str, query: str, token: str) -> None:
    assert token_in(authorization, query) == token

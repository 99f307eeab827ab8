"""Postgres URLs as hosts hand them out, without a server."""

import pytest

from bemore.database_url import parse_database_url
from bemore.storage import CannotStart

# What Neon, Supabase, Heroku, Prisma, Vercel, Node and libpq hand out or document.
HANDED_OUT = {
    "postgresql://u:p@ep-a-pooler.eu.aws.neon.tech/neondb?sslmode=require&channel_binding=require": "sslmode=require",
    "postgresql://u.ref:p@aws-0.pooler.supabase.com:6543/postgres?pgbouncer=true": "",
    "postgres://u:p@ec2-1.compute.amazonaws.com:5432/d1": "",
    "postgresql://u:p@h:5432/d?connection_limit=1&pool_timeout=10&socket_timeout=5": "",
    "postgresql://u:p@h/d?connect_timeout=10&keepalives=1&keepalives_idle=30&keepalives_count=5": "",
    "postgresql://u:p@h/d?application_name=app&target_session_attrs=read-write": (
        "application_name=app&target_session_attrs=read-write"
    ),
    "postgres://u:p@h/d?sslmode=require&supa=base-pooler.x": "sslmode=require",
    "postgres://u:p@h/d?ssl=true": "sslmode=require",
    "postgres://u:p@h/d?sslmode=no-verify": "sslmode=require",
    "postgres://u:p@h/d?ssl=true&sslmode=verify-full": "sslmode=verify-full",
    "postgresql://u:p@h/d?options=endpoint%3Dep-a": "options=endpoint%3Dep-a",
    "postgresql://u:p@h/d?prepareThreshold=0&gssencmode=disable": "",
}


@pytest.mark.parametrize("url", HANDED_OUT)
def test_parameters_of_hosts_are_used_or_passed_over(url: str) -> None:
    read = parse_database_url(url)
    assert read.for_asyncpg.partition("?")[2] == HANDED_OUT[url]
    assert read.for_asyncpg.partition("?")[0] == url.partition("?")[0]
    assert not read.unknown


@pytest.mark.parametrize(
    ("query", "schema", "rest"),
    [
        ("options=-csearch_path%3Dvoice", "voice", ""),
        ("options=-c%20search_path%3DVoice,public", "voice", ""),
        ("options=--search_path%3D%22My%5C%20Voice%22", "My Voice", ""),
        ("options=-c%20statement_timeout%3D1%20-c%20search_path%3Dvoice", "voice", "options=-c+statement_timeout%3D1"),
        ("options=-csearch_path%3D%22%24user%22", "", ""),
        ("schema=voice&connection_limit=1", "voice", ""),
        ("currentSchema=voice", "voice", ""),
        ("sslmode=require", "", "sslmode=require"),
    ],
)
def test_the_schema_is_taken_out_of_the_url(query: str, schema: str, rest: str) -> None:
    read = parse_database_url(f"postgresql://h/d?{query}")
    assert (read.schema, read.for_asyncpg.partition("?")[2]) == (schema, rest)


def test_unknown_parameters_are_named_but_no_password() -> None:
    """A name is left out where it may be part of a password."""
    assert parse_database_url("postgresql://h/d?sslmod=require&foo=1").unknown == ("foo", "sslmod")
    assert parse_database_url("postgresql://h/d?password=hush&more=1").unknown == ()


@pytest.mark.parametrize("sign", "/?#@[]")
@pytest.mark.parametrize("form", ["hu{}sh", "{}hush", "hush{}", "hu@{}sh", "12{}34"])
def test_an_unencoded_password_is_refused_and_not_quoted(sign: str, form: str) -> None:
    password = form.format(sign)
    with pytest.raises(CannotStart, match="percent-encod") as caught:
        parse_database_url(f"postgresql://me:{password}@db.example:5432/app?sslmode=require")
    assert not any(part in str(caught.value) for part in ("hu", "sh", "12", "34", "me:", "db.example"))
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("sign", ":%&=+$!*")
def test_a_password_with_other_signs_is_taken_as_it_is(sign: str) -> None:
    read = parse_database_url(f"postgresql://me:hu{sign}sh@db.example:5432/app")
    assert read.place == "db.example:5432/app"
    assert f"hu{sign}sh" in read.for_asyncpg
    assert "hu" not in repr(read)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://postgres:@/postgres?host=/tmp/pg", "(local socket)/postgres"),
        ("postgresql:///d", "(local socket)/d"),
        ("postgresql://u:p@%2Ftmp%2Fpg/d", "(local socket)/d"),
        ("postgresql://u:p@[::1]:5433/d", "[::1]:5433/d"),
        ("postgresql://u:p@a:1,b:2/d", "a:1,b:2/d"),
        ("postgresql://?host=db&dbname=d", "db/d"),
    ],
)
def test_the_place_is_told_without_a_login(url: str, place: str) -> None:
    assert parse_database_url(url).place == place


@pytest.mark.parametrize("url", ["postgresql://u:hush@h:port/d", "postgresql://u:hush@[oops/d", "postgresql://u:hush"])
def test_a_url_that_cannot_be_read_is_not_quoted(url: str) -> None:
    with pytest.raises(CannotStart) as caught:
        parse_database_url(url)
    assert "hush" not in str(caught.value)

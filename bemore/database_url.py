"""Postgres URLs as hosts hand them out: which parts are used, and how to name the place without a password."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from bemore.storage import CannotStart

UNREADABLE = (
    "takes postgresql://user:password@host:port/name, which this is not;"
    " in a password / ? # @ : % [ ] are written as %2F %3F %23 %40 %3A %25 %5B %5D (percent-encoding)"
)

# Parameters of libpq that asyncpg reads from a URL, and two that it hands to the server.
USED = (
    "host port dbname database user password passfile service sslmode sslcert sslkey sslrootcert sslcrl sslpassword"
    " sslnegotiation ssl_min_protocol_version ssl_max_protocol_version target_session_attrs krbsrvname gsslib"
    " application_name options"
)
# Parameters of libpq, Prisma, SQLAlchemy, Supabase and Vercel that change nothing here. asyncpg would hand them to the
# server, which refuses what it does not know.
PASSED_OVER = (
    "channel_binding client_encoding connect_timeout fallback_application_name gssencmode gssdelegation hostaddr"
    " keepalives keepalives_idle keepalives_interval keepalives_count load_balance_hosts max_protocol_version"
    " min_protocol_version replication require_auth requirepeer requiressl sslcertmode sslcompression sslsni"
    " tcp_user_timeout connection_limit max_connections pool_max_conns pool_min_conns pool_size pool_timeout pool_mode"
    " pgbouncer prepared_statements prepareThreshold prepared_statement_cache_size socket_timeout sslaccept"
    " sslidentity statement_cache_size supa uselibpqcompat"
)
# Other clients' names for the schema that search_path begins with.
SCHEMA_NAMES = frozenset({"schema", "currentSchema", "search_path"})
SEARCH_PATH = re.compile(r"(?:-c\s*|--)search_path=((?:\\.|\S)*)")
HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:]*)(:\d{1,5})?")


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """What a URL says, checked."""

    for_asyncpg: str = field(repr=False)
    place: str  # host and database, for people to read
    schema: str  # of our tables; empty for the server's choice
    unknown: tuple[str, ...]  # names of parameters that are passed over, unless they may belong to a password


def parse_database_url(url: str) -> DatabaseUrl:
    """Read a Postgres URL; raise CannotStart without quoting any part of it."""
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
    except ValueError:
        raise CannotStart(UNREADABLE) from None
    login, _, hosts = parts.netloc.rpartition("@")
    # An @ or # that is left over belongs to a password whose / ? or # ended the part of the URL that holds it.
    misread = "@" in f"{login}{parts.path}{parts.query}" or parts.fragment
    if misread or not all(HOST.fullmatch(host) for host in hosts.split(",")):
        raise CannotStart(UNREADABLE)
    query, schema = taken_schema(query)
    # Node's spellings; neither verifies a certificate.
    if query.pop("ssl", "") in ("true", "1"):
        query.setdefault("sslmode", "require")
    if query.get("sslmode") == "no-verify":
        query["sslmode"] = "require"
    secret = not query.keys().isdisjoint({"password", "sslpassword"})
    used = {name: value for name, value in query.items() if name in USED.split()}
    for name in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
        if name in used and not Path(used[name]).is_file():
            raise CannotStart(f"{name} names a file that is not there: {used[name]}")
    unknown = tuple(sorted(query.keys() - used.keys() - set(PASSED_OVER.split())))
    host = unquote(hosts) or query.get("host", "")
    if not host or host.startswith("/"):
        host = "(local socket)"
    return DatabaseUrl(
        for_asyncpg=parts._replace(query=urlencode(used)).geturl(),
        place=f"{host}/{unquote(parts.path).removeprefix('/') or query.get('dbname', '')}",
        schema=schema,
        unknown=() if secret else unknown,
    )


def taken_schema(query: dict[str, str]) -> tuple[dict[str, str], str]:
    """Return the parameters without those that name a schema, and the schema.

    A pooler in transaction mode refuses or ignores `options`, so that the statements name the schema themselves.
    """
    path = next((value for name, value in query.items() if name in SCHEMA_NAMES), "")
    rest = {name: value for name, value in query.items() if name not in SCHEMA_NAMES}
    if found := SEARCH_PATH.search(rest.get("options", "")):
        path = found[1].replace("\\", "")
        rest["options"] = SEARCH_PATH.sub("", rest["options"]).strip()
    first = path.split(",")[0].strip()
    schema = first.strip('"').replace('""', '"') if first.startswith('"') else first.lower()
    if not rest.get("options"):
        rest.pop("options", None)
    return rest, "" if schema == "$user" else schema

"""The start on Postgres: why a connection fails, in words for an operator, and whose tables are there."""

from __future__ import annotations

import re
import socket
import ssl
from typing import Any

import asyncpg

from bemore.storage import ADD_TURN, ADMIT, CONVERSATIONS, MARK_AT_RISK, PING, SCHEMA, CannotStart
from bemore.tables import BIGINT, BOOLEAN, NEEDED, NUMBER, TEXT, TIME, is_earlier_version, missing_column

FAULTS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
WAY_OUT = (
    "For tables in a schema of its own, append ?options=-csearch_path%3Dvoice to DATABASE_URL"
    " (& in place of ? if it has parameters)"
)

# Any constant will do. Replicas that start together on an empty database take turns by it.
SCHEMA_LOCK = 0x62656D6F7265
SCHEMA_SECONDS = 600  # an index on a large table takes its time
TABLE = re.compile(rf"\b(FROM|INTO|JOIN|UPDATE|EXISTS|TABLE|REFERENCES|ON) ({'|'.join(NEEDED)})\b(?!\.)")

COLUMNS = """
SELECT name, attname::text AS column, typname::text AS type, typcategory::text AS category,
    attnotnull AND NOT atthasdef AND attidentity = '' AS must_be_filled
FROM unnest($1::text[], $2::text[]) AS asked (name, place)
JOIN pg_attribute ON attrelid = to_regclass(place) AND attnum > 0 AND NOT attisdropped
JOIN pg_type ON pg_type.oid = atttypid ORDER BY attnum
"""
CASCADES = """
SELECT EXISTS (SELECT FROM pg_constraint WHERE contype = 'f' AND confdeltype = 'c'
    AND conrelid = to_regclass($1::text) AND confrelid = to_regclass($2::text))
"""
CATEGORIES = {TEXT: "S", NUMBER: "N", BOOLEAN: "B", TIME: "D"}  # of pg_type

# A turn's statements, with values of their types. EXPLAIN checks columns, types, unique constraints and privileges.
TURN: tuple[tuple[str, tuple[object, ...]], ...] = (
    (PING, ()),
    (ADMIT, ("", 0, 1, 1, 1)),
    (MARK_AT_RISK, ("",)),
    (ADD_TURN, ("", "", "", "", "", 0)),
    (CONVERSATIONS, ("", 0, 1)),
)


def quoted(schema: str) -> str:
    return '"' + schema.replace('"', '""') + '"'


def table_name(table: str, schema: str) -> str:
    return f"{quoted(schema)}.{table}" if schema else table


def qualified(sql: str, schema: str) -> str:
    """Name the schema of each table, since a pooler in transaction mode keeps no search_path."""
    return TABLE.sub(lambda found: f"{found[1]} {table_name(found[2], schema)}", sql)


# Why a connection fails


def is_temporary(error: Exception) -> bool:
    """Tell whether an error may be over in a moment: the server starts, restarts, or has lent all its connections."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "")[:2] in ("08", "53", "57") and "startup parameter" not in str(error)
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    return (
        isinstance(error, OSError | TimeoutError) and not isinstance(error, ssl.SSLError) and not offers_no_tls(error)
    )


def offers_no_tls(error: Exception) -> bool:
    return "rejected SSL upgrade" in str(error)


def message_of(error: Exception) -> str:
    """Return the first line of what Postgres or asyncpg says; neither quotes a password."""
    return str(error).partition("\n")[0].rstrip(".")


def reason(error: Exception, place: str) -> str:
    """Say why there is no connection, for an operator who does not know Python."""
    if offers_no_tls(error):
        return f"{place} offers no TLS, which sslmode demands"
    match error:
        case socket.gaierror():
            return f"no such host: {place}"
        case ssl.SSLCertVerificationError():
            return f"TLS: the certificate of {place} is not trusted ({error.verify_message}); see sslrootcert"
        case ssl.SSLError():
            return f"TLS with {place} failed ({(error.reason or 'handshake').replace('_', ' ').lower()})"
        case TimeoutError():
            return f"{place} does not answer"
        case ConnectionRefusedError() | FileNotFoundError():
            return f"{place} refuses connections; is Postgres running there?"
        case OSError():
            return f"no connection to {place} ({error.strerror or 'refused'})"
        case asyncpg.InvalidPasswordError():
            return f"wrong user or password for {place}"
        case asyncpg.InvalidCatalogNameError():
            return f"no such database: {place}"
        case asyncpg.PostgresError():
            return f"{place} refuses: {message_of(error)}"
    return message_of(error)


# Tables


async def prepare_tables(connection: Any, schema: str) -> None:
    """Make what is missing, in `schema` if one is named; raise CannotStart if a table belongs to another program."""
    found = await columns_found(connection, schema)
    for table, columns in found.items():
        if columns and (fault := foreign(table, columns)):
            raise CannotStart(f"the table {table} belongs to another program: {fault}. {WAY_OUT}")
    if not all(columns and not is_earlier_version(table, columns.keys()) for table, columns in found.items()):
        await apply_schema(connection, schema)
    for table in NEEDED.keys() - {"sessions"}:
        if not await connection.fetchval(CASCADES, table_name(table, schema), table_name("sessions", schema)):
            raise CannotStart(
                f"the table {table} has no foreign key to sessions ON DELETE CASCADE,"
                " so that erasing a session would leave what it said. See schema.sql"
            )
    for sql, values in TURN:
        try:
            await connection.fetch(f"EXPLAIN {qualified(sql, schema)}", *values)
        except asyncpg.PostgresError as error:
            raise CannotStart(f"its tables cannot be used: {message_of(error)}. {WAY_OUT}") from None


async def columns_found(connection: Any, schema: str) -> dict[str, dict[str, Any]]:
    """Return the columns of each of our tables, by name; none where there is no such table."""
    found: dict[str, dict[str, Any]] = {table: {} for table in NEEDED}
    for row in await connection.fetch(COLUMNS, list(NEEDED), [table_name(table, schema) for table in NEEDED]):
        found[row["name"]][row["column"]] = row
    return found


def foreign(table: str, columns: dict[str, Any]) -> str | None:
    """Say by which column a table is not ours."""
    if (missing := missing_column(table, columns.keys())) is not None:
        return f"it has no column {missing}"
    for name, kind in NEEDED[table].items():
        column = columns.get(name)
        if column and not is_of(kind, column):
            return f"its column {name} has the type {column['type']}, not {kind}"
    for name, column in columns.items():
        if table != "sessions" and column["must_be_filled"] and name not in NEEDED[table]:
            return f"its column {name} must be filled"
    return None


def is_of(kind: str, column: Any) -> bool:
    return bool(column["type"] == "int8" if kind == BIGINT else column["category"] == CATEGORIES[kind])


async def apply_schema(connection: Any, schema: str) -> None:
    """Apply schema.sql under a lock, as one simple query and so in one transaction."""
    steps = [f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK})"]
    if schema and await connection.fetchval("SELECT to_regnamespace($1::text) IS NULL", quoted(schema)):
        steps.append(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}")
    steps.append(qualified(SCHEMA.read_text(encoding="utf-8"), schema))
    try:
        await connection.execute(";\n".join(steps), timeout=SCHEMA_SECONDS)
    except asyncpg.PostgresError as error:
        where = f"the schema {schema}" if schema else "its tables"
        raise CannotStart(f"cannot create {where}: {message_of(error)}. {'' if schema else WAY_OUT}".rstrip()) from None

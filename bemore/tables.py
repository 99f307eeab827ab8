"""Which tables schema.sql makes, and how to recognise a table of the same name that belongs to another program."""

from __future__ import annotations

from collections.abc import Set

TEXT, NUMBER, BIGINT, BOOLEAN, TIME = "text", "a number", "bigint", "boolean", "a time"

# The columns that the statements in storage.py need, and their types. Another service may own sessions.
NEEDED = {
    "sessions": {"session_id": TEXT},
    "token_buckets": {"session_id": TEXT, "full_at": BIGINT, "at_risk": BOOLEAN},
    "conversations": {
        "session_id": TEXT,
        "user_message": TEXT,
        "ai_response": TEXT,
        "emotion": TEXT,
        "timestamp": BIGINT,
        "id": NUMBER,
        "created_at": TIME,
        "turn_key": TEXT,
    },
}
# Columns that schema.sql adds to the table of an earlier version of this server.
ADDED_LATER = {"token_buckets": "at_risk", "conversations": "turn_key"}


def is_earlier_version(table: str, columns: Set[str]) -> bool:
    """Tell whether schema.sql completes this table; a table with any other columns is not altered."""
    added = ADDED_LATER.get(table)
    return added is not None and columns == NEEDED[table].keys() - {added}


def missing_column(table: str, columns: Set[str]) -> str | None:
    """Return a needed column that the table lacks, which shows that it belongs to another program."""
    if is_earlier_version(table, columns):
        return None
    return next((column for column in NEEDED[table] if column not in columns), None)

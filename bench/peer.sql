-- The peers' tables in SQLite, as this server's: sessions with a bucket of tokens, and turns.

PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA foreign_keys = ON;

CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY,
    full_at INTEGER NOT NULL DEFAULT 0 -- milliseconds since the epoch
);

CREATE TABLE conversations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    session_id TEXT NOT NULL REFERENCES sessions (session_id) ON DELETE CASCADE,
    user_message TEXT NOT NULL,
    ai_response TEXT NOT NULL,
    emotion TEXT,
    timestamp INTEGER NOT NULL,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);

CREATE INDEX idx_conversations_session ON conversations (session_id, id);
CREATE INDEX idx_conversations_timestamp ON conversations (timestamp);
CREATE INDEX idx_conversations_created_at ON conversations (created_at);

-- Tables of BeMore voice, for Postgres as it stands (psql -f schema.sql) and, by the few
-- replacements in bemore/storage.py, for SQLite. Applied at a start that finds something missing; safe to apply again.
-- The order of the tables is the order in which a request takes them: no start of a replica gets in the way of one.

-- May belong to another service and have more columns: only session_id is read and referenced.
CREATE TABLE IF NOT EXISTS sessions (
    session_id VARCHAR(255) PRIMARY KEY,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now()
);

-- The rate limit: a bucket that refills at a constant rate is told whole by when it is full again.
CREATE TABLE IF NOT EXISTS token_buckets (
    session_id VARCHAR(255) PRIMARY KEY,
    full_at BIGINT NOT NULL, -- microseconds since the epoch
    at_risk BOOLEAN NOT NULL DEFAULT FALSE, -- whether the session was ever told of a helpline
    CONSTRAINT token_buckets_session_id_fkey
        FOREIGN KEY (session_id) REFERENCES sessions (session_id) ON DELETE CASCADE
);

-- A database of an earlier version has no mark, and no keys of turns.
ALTER TABLE token_buckets ADD COLUMN IF NOT EXISTS at_risk BOOLEAN NOT NULL DEFAULT FALSE;

-- One row a turn, written before the person is told that the reply is complete.
CREATE TABLE IF NOT EXISTS conversations (
    id BIGSERIAL PRIMARY KEY,
    session_id VARCHAR(255) NOT NULL,
    user_message TEXT NOT NULL,
    ai_response TEXT NOT NULL,
    emotion VARCHAR(20),
    timestamp BIGINT NOT NULL, -- the client's clock, milliseconds since the epoch
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    turn_key VARCHAR(32), -- the turn's own: it is stored once, however often that is tried
    CONSTRAINT conversations_session_id_fkey
        FOREIGN KEY (session_id) REFERENCES sessions (session_id) ON DELETE CASCADE
);

ALTER TABLE conversations ADD COLUMN IF NOT EXISTS turn_key VARCHAR(32);
CREATE UNIQUE INDEX IF NOT EXISTS idx_conversations_turn_key ON conversations (session_id, turn_key);

CREATE INDEX IF NOT EXISTS idx_conversations_session ON conversations (session_id, id);
CREATE INDEX IF NOT EXISTS idx_conversations_timestamp ON conversations (timestamp);
CREATE INDEX IF NOT EXISTS idx_conversations_created_at ON conversations (created_at);

-- Portable: TEXT and BIGINT only; ids are text, times µs since the epoch, JSON is text.

-- What somebody asked for. No secret is in any column.
CREATE TABLE session (
    id              TEXT   NOT NULL PRIMARY KEY,
    provider        TEXT   NOT NULL,
    flow            TEXT   NOT NULL,
    user_id         TEXT   NOT NULL,
    image_alias     TEXT   NOT NULL,
    state           TEXT   NOT NULL,
    -- Raised by whoever is about to change the row: that holds it.
    revision        BIGINT NOT NULL,
    created_at      BIGINT NOT NULL,
    updated_at      BIGINT NOT NULL,
    deadline_at     BIGINT,
    login_timeout_s BIGINT NOT NULL,
    machine_id      TEXT,
    image_digest    TEXT,
    -- Chosen with the row, so that sealing twice is sealing once.
    credential_id   TEXT   NOT NULL,
    -- When the agent held a complete credential. A fact of the session; it survives the VM.
    captured_at     BIGINT,
    sealed_at       BIGINT,
    account         TEXT,
    -- JSON of a Verdict.
    failure         TEXT,
    -- The newest event's number.
    event_seq       BIGINT NOT NULL
);
CREATE INDEX session_by_deadline ON session (deadline_at);

CREATE TABLE session_event (
    session_id TEXT   NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    seq        BIGINT NOT NULL,
    at         BIGINT NOT NULL,
    -- JSON of a SessionEventKind.
    kind       TEXT   NOT NULL,
    PRIMARY KEY (session_id, seq)
);

-- One life of a VM, as its runner last reported it.
CREATE TABLE machine (
    id           TEXT   NOT NULL PRIMARY KEY,
    session_id   TEXT,
    image_alias  TEXT   NOT NULL,
    image_digest TEXT   NOT NULL,
    memory_mib   BIGINT NOT NULL,
    vcpus        BIGINT NOT NULL,
    state        TEXT   NOT NULL,
    -- Raised by the runner only; an older report changes nothing.
    generation   BIGINT NOT NULL,
    -- The newest runner event that was taken in.
    last_seq     BIGINT NOT NULL,
    created_at   BIGINT NOT NULL,
    launched_at  BIGINT,
    ready_at     BIGINT,
    -- When nothing of it was left on the host. Until then it holds a place.
    gone_at      BIGINT,
    -- JSON of a Finding.
    failure      TEXT
);
CREATE INDEX machine_by_gone ON machine (gone_at);

-- The outbox: what is to be done about a transition, written in its transaction.
CREATE TABLE effect (
    id         TEXT   NOT NULL PRIMARY KEY,
    session_id TEXT   NOT NULL,
    -- Order within the session.
    seq        BIGINT NOT NULL,
    kind       TEXT   NOT NULL,
    created_at BIGINT NOT NULL,
    attempts   BIGINT NOT NULL,
    not_before BIGINT NOT NULL,
    done_at    BIGINT,
    last_error TEXT
);
CREATE INDEX effect_by_done ON effect (done_at, not_before);

-- Sessions that retention removed: 410 instead of 404.
CREATE TABLE session_gone (
    id      TEXT   NOT NULL PRIMARY KEY,
    gone_at BIGINT NOT NULL
);

-- Dashboards that are signed in, by the SHA-256 of their cookie.
CREATE TABLE dashboard_login (
    token_hash TEXT   NOT NULL PRIMARY KEY,
    expires_at BIGINT NOT NULL
);

-- Who may ask. No password and no token is in any column, only what they are recognised by.
CREATE TABLE organisation (
    id         TEXT   NOT NULL PRIMARY KEY,
    name       TEXT   NOT NULL UNIQUE,
    -- Sessions at a time; none: what the configuration says.
    max_live   BIGINT,
    created_at BIGINT NOT NULL,
    -- Raised by whoever counts the organisation's sessions: that holds the row.
    revision   BIGINT NOT NULL DEFAULT 0
);

CREATE TABLE app_user (
    id              TEXT   NOT NULL PRIMARY KEY,
    name            TEXT   NOT NULL UNIQUE,
    role            TEXT   NOT NULL,
    organisation_id TEXT   REFERENCES organisation (id),
    -- Argon2id in PHC's string format.
    password_hash   TEXT   NOT NULL,
    created_at      BIGINT NOT NULL,
    last_login_at   BIGINT,
    revision        BIGINT NOT NULL DEFAULT 0
);

CREATE TABLE service_token (
    id              TEXT   NOT NULL PRIMARY KEY,
    name            TEXT   NOT NULL UNIQUE,
    role            TEXT   NOT NULL,
    organisation_id TEXT   REFERENCES organisation (id),
    -- SHA-256: a token has 256 random bits.
    token_hash      TEXT   NOT NULL UNIQUE,
    created_by      TEXT   NOT NULL,
    created_at      BIGINT NOT NULL,
    expires_at      BIGINT,
    last_used_at    BIGINT,
    revision        BIGINT NOT NULL DEFAULT 0
);

-- None: the local admin.
ALTER TABLE dashboard_login ADD COLUMN user_id TEXT REFERENCES app_user (id) ON DELETE CASCADE;

-- Whose it is: a user's or token's id, or `local`; and of which organisation, or none.
ALTER TABLE session ADD COLUMN owner_id TEXT NOT NULL DEFAULT 'local';
ALTER TABLE session ADD COLUMN organisation_id TEXT NOT NULL DEFAULT '';
-- 1: its owner confirms the account before the credential is fetched.
ALTER TABLE session ADD COLUMN confirm_account BIGINT NOT NULL DEFAULT 0;
CREATE INDEX session_by_owner ON session (owner_id);
CREATE INDEX session_by_organisation ON session (organisation_id);
ALTER TABLE session_gone ADD COLUMN owner_id TEXT NOT NULL DEFAULT 'local';
ALTER TABLE session_gone ADD COLUMN organisation_id TEXT NOT NULL DEFAULT '';

-- Written with the session, and kept as long as the credential. One that is not here is the local admin's.
CREATE TABLE credential_owner (
    credential_id   TEXT NOT NULL PRIMARY KEY,
    owner_id        TEXT NOT NULL,
    organisation_id TEXT NOT NULL
);

-- Hosts that share the database: each is one home, with the VMs and the vault of its own machine.
CREATE TABLE host (
    id          TEXT   NOT NULL PRIMARY KEY,
    name        TEXT   NOT NULL,
    -- Where other controllers reach its controller; none: nowhere.
    address     TEXT,
    -- Which directory of which running machine the home is: a lock on it says that one process has it.
    home        TEXT   NOT NULL,
    -- Until when its controller acts for it, by the database's clock; none: as long as it has the home's lock (SQLite).
    lease_until BIGINT,
    -- Raised by whoever takes the lease. Who holds an older one acts no more.
    generation  BIGINT NOT NULL,
    created_at  BIGINT NOT NULL
);

-- Whose machine it runs on; none: wherever a scheduler puts it, until a host claims it.
ALTER TABLE machine ADD COLUMN host_id TEXT;
CREATE INDEX machine_by_host ON machine (host_id);
CREATE INDEX machine_by_session ON machine (session_id);
-- Whose controller carries it out.
ALTER TABLE effect ADD COLUMN host_id TEXT;
CREATE INDEX effect_by_host ON effect (host_id, done_at);

-- In whose vault a credential is. One that is not here is in the vault of whoever asks.
CREATE TABLE credential_host (
    credential_id TEXT NOT NULL PRIMARY KEY,
    host_id       TEXT NOT NULL
);

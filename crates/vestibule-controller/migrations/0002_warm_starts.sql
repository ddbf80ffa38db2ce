-- How the session's VM may begin: pool, restore or cold. A start that fails lowers it.
ALTER TABLE session ADD COLUMN start_at_most TEXT NOT NULL DEFAULT 'pool';

-- The snapshot that it begins from; none: it boots.
ALTER TABLE machine ADD COLUMN snapshot_id TEXT;
-- 1: made for the pool. The session that took it stands in session_id, for ever.
ALTER TABLE machine ADD COLUMN pooled BIGINT NOT NULL DEFAULT 0;
-- Why nobody gets it out of the pool any more: it is about to be ended.
ALTER TABLE machine ADD COLUMN retired TEXT;
CREATE INDEX machine_by_snapshot ON machine (snapshot_id);

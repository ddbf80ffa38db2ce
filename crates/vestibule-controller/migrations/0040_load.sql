-- What the reconcilers look for again and again, among many rows of sessions and machines that are over.
CREATE INDEX session_by_state ON session (state);
DROP INDEX machine_by_host;
CREATE INDEX machine_by_host ON machine (host_id, gone_at);

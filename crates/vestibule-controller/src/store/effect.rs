//! The outbox: effects that are due, done, or to be tried again.
use super::{Store, StoreError, row};
use crate::state::Effect;
use sqlx::{Any, Transaction};
use std::time::Duration;
use vestibule_api::{
    ids::{HostId, MachineId, SessionId},
    time::Timestamp,
};

/// An effect of this host whose time has come. Per session only its oldest open one is due: they are carried out in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DueEffect {
    pub(crate) id: String,
    pub(crate) session: SessionId,
    pub(crate) kind: Effect,
    /// Times it was tried before.
    pub(crate) attempts: u32,
    pub(crate) created_at: Timestamp,
}

/// Writes an effect down, after those that the session has: for the host of `machine`, else for `host`.
pub(super) async fn insert(
    tx: &mut Transaction<'static, Any>,
    session: SessionId,
    effect: Effect,
    machine: Option<MachineId>,
    host: HostId,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO effect (id, session_id, seq, kind, created_at, attempts, not_before, host_id) \
         SELECT $1, $2, COALESCE(MAX(seq), 0) + 1, $3, $4, 0, $4, \
         COALESCE((SELECT host_id FROM machine WHERE id = $5), $6) FROM effect WHERE session_id = $2",
    )
    .bind(uuid::Uuid::now_v7().to_string())
    .bind(session.to_string())
    .bind(effect.id())
    .bind(now.as_micros())
    .bind(machine.map(|id| id.to_string()))
    .bind(host.to_string())
    .execute(&mut **tx)
    .await
    .map(|_| ())
    .map_err(StoreError::query("insert an effect"))
}

impl Store {
    /// Effects that this host carries out now.
    pub(crate) async fn due_effects(&self, now: Timestamp) -> Result<Vec<DueEffect>, StoreError> {
        sqlx::query(
            "SELECT * FROM effect WHERE host_id = $2 AND done_at IS NULL AND not_before <= $1 AND NOT EXISTS (\
             SELECT 1 FROM effect older WHERE older.session_id = effect.session_id AND older.host_id = effect.host_id \
             AND older.done_at IS NULL AND older.seq < effect.seq) ORDER BY id",
        )
        .bind(now.as_micros())
        .bind(self.host.to_string())
        .fetch_all(self.pool())
        .await
        .map_err(StoreError::query("list due effects"))?
        .iter()
        .map(|found| {
            Ok(DueEffect {
                id: row::text(found, "id")?,
                session: row::id(found, "session_id")?,
                kind: row::word(found, "kind", Effect::from_id)?,
                attempts: row::count(found, "attempts")?,
                created_at: row::time(found, "created_at")?,
            })
        })
        .collect()
    }

    /// The moment, later than `after`, at which the next effect or deadline of this host is due; none: there is none.
    pub(crate) async fn next_due(&self, after: Timestamp) -> Result<Option<Timestamp>, StoreError> {
        let found = sqlx::query(
            "SELECT MIN(at) AS at FROM (SELECT not_before AS at FROM effect WHERE host_id = $1 AND done_at IS NULL \
             AND NOT EXISTS (SELECT 1 FROM effect older WHERE older.session_id = effect.session_id \
             AND older.host_id = effect.host_id AND older.done_at IS NULL AND older.seq < effect.seq) \
             UNION ALL SELECT at FROM (SELECT deadline_at AS at FROM session \
             LEFT JOIN machine ON machine.id = session.machine_id \
             WHERE deadline_at > $2 AND (host_id IS NULL OR host_id = $1) ORDER BY deadline_at LIMIT 1) AS first) AS due \
             WHERE at > $2",
        )
        .bind(self.host.to_string())
        .bind(after.as_micros())
        .fetch_one(self.pool())
        .await
        .map_err(StoreError::query("look for what is due next"))?;
        row::maybe_time(&found, "at")
    }

    /// The effect is done. Doing it again would change nothing. Returns whether it was not done before.
    pub(crate) async fn effect_done(&self, id: &str, now: Timestamp) -> Result<bool, StoreError> {
        let done = sqlx::query("UPDATE effect SET done_at = $2 WHERE id = $1 AND done_at IS NULL")
            .bind(id)
            .bind(now.as_micros())
            .execute(self.writer())
            .await
            .map_err(StoreError::query("finish an effect"))?
            .rows_affected();
        self.signals.wake();
        Ok(done > 0)
    }

    /// Whether this effect of a session has still to be carried out.
    pub(crate) async fn is_open(
        &self,
        session: SessionId,
        kind: Effect,
    ) -> Result<bool, StoreError> {
        sqlx::query("SELECT id FROM effect WHERE session_id = $1 AND kind = $2 AND done_at IS NULL")
            .bind(session.to_string())
            .bind(kind.id())
            .fetch_optional(self.pool())
            .await
            .map(|row| row.is_some())
            .map_err(StoreError::query("look for an open effect"))
    }

    /// The effect is tried again after `delay`; `error` (a chain without secrets) stands in its row.
    pub(crate) async fn effect_failed(
        &self,
        id: &str,
        now: Timestamp,
        delay: Duration,
        error: &str,
    ) -> Result<(), StoreError> {
        sqlx::query("UPDATE effect SET attempts = attempts + 1, not_before = $2, last_error = $3 WHERE id = $1")
            .bind(id)
            .bind(now.plus(delay).as_micros())
            .bind(error)
            .execute(self.writer())
            .await
            .map(|_| ())
            .map_err(StoreError::query("put an effect off"))
    }
}

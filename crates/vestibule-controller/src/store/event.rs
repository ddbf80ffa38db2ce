//! A session's events: numbered from 1 without gaps, never changed.
use super::{Store, StoreError, row};
use sqlx::{Any, Transaction};
use vestibule_api::{
    ids::SessionId,
    session::{SessionEvent, SessionEventKind},
    time::Timestamp,
};

/// Inserts one event. The caller gives the number and writes it into the session's row in the same transaction.
pub(super) async fn insert(
    tx: &mut Transaction<'static, Any>,
    session: SessionId,
    seq: u64,
    now: Timestamp,
    kind: &SessionEventKind,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO session_event (session_id, seq, at, kind) VALUES ($1, $2, $3, $4)")
        .bind(session.to_string())
        .bind(row::signed(seq))
        .bind(now.as_micros())
        .bind(row::to_json("kind", kind)?)
        .execute(&mut **tx)
        .await
        .map(|_| ())
        .map_err(StoreError::query("insert a session's event"))
}

impl Store {
    /// Events after number `after`, at most `limit`.
    pub(crate) async fn events(
        &self,
        session: SessionId,
        after: u64,
        limit: u32,
    ) -> Result<Vec<SessionEvent>, StoreError> {
        sqlx::query(
            "SELECT seq, at, kind FROM session_event WHERE session_id = $1 AND seq > $2 ORDER BY seq LIMIT $3",
        )
        .bind(session.to_string())
        .bind(row::signed(after))
        .bind(i64::from(limit))
        .fetch_all(self.pool())
        .await
        .map_err(StoreError::query("read a session's events"))?
        .iter()
        .map(|found| {
            Ok(SessionEvent {
                seq: row::count(found, "seq")?,
                at: row::time(found, "at")?,
                event: row::json(found, "kind")?,
            })
        })
        .collect()
    }
}

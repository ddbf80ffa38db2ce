//! The pool's rows: machines that were made for nobody yet. A session takes one in the transaction that places it, and
//! keeps it; nothing ever puts one back.
use super::{
    Store, StoreError,
    machine::{self, MachineRow, is_snapshots},
    row, session,
};
use vestibule_api::{
    finding::Finding,
    ids::{MachineId, SessionId, SnapshotId},
    time::Timestamp,
};

/// Of the failures of one snapshot, so many are looked at.
const LOOKED_AT: i64 = 32;

impl Store {
    /// Gives a machine of the pool to a waiting session, with the session's state and effect in the same transaction.
    /// `false`: the session does not wait any more, or the machine is not in stock any more.
    pub(crate) async fn take(
        &self,
        machine: MachineId,
        session: SessionId,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        self.fence(&mut tx).await?;
        let Some(machine) = machine::lock(&mut tx, machine).await? else {
            return Ok(false);
        };
        let Some(mut row) = session::lock(&mut tx, session).await? else {
            return Ok(false);
        };
        if !machine.is_stock() || !self.give(&mut tx, &mut row, &machine, None, now).await? {
            return Ok(false);
        }
        sqlx::query("UPDATE machine SET session_id = $2 WHERE id = $1")
            .bind(machine.id.to_string())
            .bind(session.to_string())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("take a machine out of the pool"))?;
        self.commit(tx, Some(session)).await?;
        Ok(true)
    }

    /// Whether a session had a VM before, which is then not its any more.
    pub(crate) async fn had_a_vm(&self, session: SessionId) -> Result<bool, StoreError> {
        sqlx::query("SELECT id FROM machine WHERE session_id = $1 LIMIT 1")
            .bind(session.to_string())
            .fetch_optional(self.pool())
            .await
            .map(|row| row.is_some())
            .map_err(StoreError::query("look for a session's first machine"))
    }

    /// Writes down a machine that is about to be made for the pool, or that somebody else started.
    pub(crate) async fn add_machine(&self, machine: &MachineRow) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        self.fence(&mut tx).await?;
        machine::insert(&mut tx, machine, self.host).await?;
        self.commit(tx, None).await
    }

    /// Takes a machine out of stock, for the pool to end it. `false`: it was not in stock.
    pub(crate) async fn retire(&self, id: MachineId, why: &str) -> Result<bool, StoreError> {
        let retired = sqlx::query(
            "UPDATE machine SET retired = $2 WHERE id = $1 AND pooled = 1 AND session_id IS NULL \
             AND retired IS NULL AND gone_at IS NULL",
        )
        .bind(id.to_string())
        .bind(why)
        .execute(self.writer())
        .await
        .map_err(StoreError::query("take a machine out of stock"))?
        .rows_affected();
        self.signals.wake();
        Ok(retired > 0)
    }

    /// The newest machines that were made for the pool under an alias, newest first, gone ones too.
    pub(crate) async fn pool_history(
        &self,
        alias: &str,
        limit: u32,
    ) -> Result<Vec<MachineRow>, StoreError> {
        sqlx::query(
            "SELECT * FROM machine WHERE pooled = 1 AND image_alias = $1 ORDER BY id DESC LIMIT $2",
        )
        .bind(alias)
        .bind(i64::from(limit))
        .fetch_all(self.pool())
        .await
        .map_err(StoreError::query("list what was made for the pool"))?
        .iter()
        .map(MachineRow::read)
        .collect()
    }

    /// The newest time after `since` that a machine could not begin from this snapshot, and why.
    pub(crate) async fn snapshot_failure(
        &self,
        snapshot: &SnapshotId,
        since: Timestamp,
    ) -> Result<Option<(Timestamp, Finding)>, StoreError> {
        let rows = sqlx::query(
            "SELECT created_at, failure FROM machine WHERE snapshot_id = $1 AND failure IS NOT NULL \
             AND created_at >= $2 ORDER BY id DESC LIMIT $3",
        )
        .bind(snapshot.as_str().to_owned())
        .bind(since.as_micros())
        .bind(LOOKED_AT)
        .fetch_all(self.pool())
        .await
        .map_err(StoreError::query("look for a snapshot's failures"))?;
        for found in &rows {
            let finding: Finding = row::json(found, "failure")?;
            if is_snapshots(finding.cause) {
                return Ok(Some((row::time(found, "created_at")?, finding)));
            }
        }
        Ok(None)
    }
}

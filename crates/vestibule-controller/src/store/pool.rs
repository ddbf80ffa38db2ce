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

/// Of the machines that began from one snapshot, so many are looked at.
const LOOKED_AT: i64 = 32;
/// A snapshot is not used any more after so many VMs in a row that did not become ready.
const IN_A_ROW: u32 = 2;

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

    /// When the newest of the machines failed that began from this snapshot after `since`, and why; none: the snapshot can be
    /// used. Since the last that came up from it, one has to have failed for the snapshot itself, or [`IN_A_ROW`] for whatever
    /// reason: a VM that loads and never becomes ready says nothing of its snapshot, and costs everybody a deadline.
    pub(crate) async fn snapshot_failure(
        &self,
        snapshot: &SnapshotId,
        since: Timestamp,
    ) -> Result<Option<(Timestamp, Finding)>, StoreError> {
        let rows = sqlx::query(
            "SELECT created_at, launched_at, ready_at, failure FROM machine WHERE snapshot_id = $1 AND created_at >= $2 \
             AND (failure IS NOT NULL OR ready_at IS NOT NULL) ORDER BY id DESC LIMIT $3",
        )
        .bind(snapshot.as_str().to_owned())
        .bind(since.as_micros())
        .bind(LOOKED_AT)
        .fetch_all(self.pool())
        .await
        .map_err(StoreError::query("look for a snapshot's failures"))?;
        let (mut newest, mut in_a_row) = (None, 0);
        for found in &rows {
            if row::maybe_time(found, "ready_at")?.is_some() {
                break;
            }
            let finding: Finding = row::json(found, "failure")?;
            let its_own = is_snapshots(finding.cause);
            // Without a runner the snapshot was not even looked at.
            if !its_own && row::maybe_time(found, "launched_at")?.is_none() {
                continue;
            }
            newest.get_or_insert((row::time(found, "created_at")?, finding));
            in_a_row += 1;
            if its_own || in_a_row == IN_A_ROW {
                return Ok(newest);
            }
        }
        Ok(None)
    }
}

//! Hosts: homes whose controllers share a database, and the lease by which each acts for its own machines.
//!
//! A lease is held by the database's clock, so that hosts need not agree on the time. Whoever takes it raises the host's
//! generation; a transaction that makes or moves a machine for an older one is refused ([`StoreError::Fenced`]). With SQLite
//! there is one host, whose controller holds the lock of its home, and no lease.
use super::{Ingested, Kind, Store, StoreError, machine, row, session};
use camino::Utf8Path;
use sqlx::{Any, Transaction};
use std::{fs::OpenOptions, io::Write as _, sync::atomic::Ordering, time::Duration};
use vestibule_api::{
    finding::Finding,
    ids::{CredentialId, HostId, MachineId, SessionId},
    machine::MachineState,
    time::Timestamp,
};

/// Where a home keeps its host's id, for ever.
const FILE: &str = "host-id";

/// What a host says about itself.
#[derive(Clone, Debug)]
pub(crate) struct OwnHost {
    pub(crate) name: String,
    /// Where other controllers reach its controller.
    pub(crate) address: Option<String>,
    /// Which directory of which running machine its home is. Who has the same one, and the home's lock, is its successor.
    pub(crate) home: String,
}

/// A host, as its row says.
#[derive(Clone, Debug)]
pub(crate) struct HostRow {
    pub(crate) id: HostId,
    pub(crate) name: String,
    pub(crate) address: Option<String>,
    pub(crate) lease_until: Option<Timestamp>,
    pub(crate) generation: u64,
    /// Whether its controller may act now, by the database's clock.
    pub(crate) live: bool,
    /// Machines of which something may be left.
    pub(crate) machines: u64,
}

/// What the removal of a host came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Forgotten {
    Yes,
    Missing,
    /// Its controller acts for it.
    Live,
    /// Sessions that have not ended have machines on it.
    InUse,
}

/// Reads the id of the home's host, or makes it.
pub(super) fn own_id(home: &Utf8Path) -> std::io::Result<HostId> {
    let path = home.join(FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(std::io::Error::other),
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
            let id = HostId::generate();
            let staged = home.join("host-id.new");
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .open(&staged)?;
            writeln!(file, "{id}")?;
            file.sync_all()?;
            std::fs::rename(&staged, &path)?;
            Ok(id)
        }
        Err(err) => Err(err),
    }
}

impl Store {
    /// The host of this home.
    pub(crate) fn host(&self) -> HostId {
        self.host
    }

    /// Whether other hosts may share the database.
    pub(crate) fn is_shared(&self) -> bool {
        #[cfg(test)]
        if self.simulated.is_some() {
            return true;
        }
        self.kind == Kind::Postgres
    }

    /// The database's clock.
    pub(super) async fn database_now(
        &self,
        connection: &mut sqlx::AnyConnection,
    ) -> Result<Timestamp, StoreError> {
        #[cfg(test)]
        if let Some(simulated) = &self.simulated {
            return Ok(simulated.clock.now());
        }
        let sql = match self.kind {
            Kind::Sqlite => "SELECT CAST(unixepoch('subsec') * 1000000 AS INTEGER) AS now",
            Kind::Postgres => {
                "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT) AS now"
            }
        };
        let found = sqlx::query(sql)
            .fetch_one(connection)
            .await
            .map_err(StoreError::query("ask for the database's time"))?;
        row::time(&found, "now")
    }

    /// Takes the lease of this host for so long: from nobody, from a controller whose lease ran out, or from one on this very
    /// home that is gone. `false`: another controller holds it.
    pub(crate) async fn take_lease(
        &self,
        own: &OwnHost,
        length: Duration,
    ) -> Result<bool, StoreError> {
        let failed = || StoreError::query("take the host's lease");
        let mut tx = self.begin().await?;
        let now = self.database_now(&mut tx).await?;
        let known = sqlx::query("SELECT COUNT(*) AS known FROM host")
            .fetch_one(&mut *tx)
            .await
            .map_err(failed())?;
        let first = row::int(&known, "known")? == 0;
        // A host that was forgotten and comes back gets no generation that it had before.
        sqlx::query(
            "INSERT INTO host (id, name, home, lease_until, generation, created_at) VALUES ($1, '', '', 0, $2, $2) \
             ON CONFLICT (id) DO NOTHING",
        )
        .bind(self.host.to_string())
        .bind(now.as_micros())
        .execute(&mut *tx)
        .await
        .map_err(failed())?;
        let until = self.is_shared().then(|| now.plus(length).as_micros());
        let taken = sqlx::query(
            "UPDATE host SET name = $2, address = $3, home = $4, lease_until = $5, generation = generation + 1 \
             WHERE id = $1 AND (lease_until IS NULL OR lease_until < $6 OR home = $4) RETURNING generation",
        )
        .bind(self.host.to_string())
        .bind(own.name.clone())
        .bind(own.address.clone())
        .bind(own.home.clone())
        .bind(until)
        .bind(now.as_micros())
        .fetch_optional(&mut *tx)
        .await
        .map_err(failed())?;
        let Some(taken) = taken else {
            return Ok(false);
        };
        if first || !self.is_shared() {
            self.adopt_all(&mut tx).await?;
        }
        let generation = row::int(&taken, "generation")?;
        tx.commit()
            .await
            .map_err(StoreError::query("commit a transaction"))?;
        if self.is_shared() {
            self.generation.store(generation, Ordering::Relaxed);
        }
        Ok(true)
    }

    /// Rows of before there were hosts, and with SQLite those of the home that a backup was of, are this host's.
    async fn adopt_all(&self, tx: &mut Transaction<'static, Any>) -> Result<(), StoreError> {
        let sqls = if self.is_shared() {
            [
                "UPDATE machine SET host_id = $1 WHERE gone_at IS NULL AND host_id IS NULL",
                "UPDATE effect SET host_id = $1 WHERE done_at IS NULL AND host_id IS NULL",
            ]
            .as_slice()
        } else {
            [
                "UPDATE machine SET host_id = $1 WHERE gone_at IS NULL",
                "UPDATE effect SET host_id = $1 WHERE done_at IS NULL",
                "DELETE FROM credential_host WHERE host_id <> $1",
                "DELETE FROM host WHERE id <> $1",
            ]
            .as_slice()
        };
        for sql in sqls {
            sqlx::query(*sql)
                .bind(self.host.to_string())
                .execute(&mut **tx)
                .await
                .map_err(StoreError::query("adopt what no host has"))?;
        }
        Ok(())
    }

    /// Holds the lease for so long from now on. `false`: it ran out, or somebody else took it.
    pub(crate) async fn renew_lease(&self, length: Duration) -> Result<bool, StoreError> {
        let mut connection = self.connection().await?;
        let now = self.database_now(&mut connection).await?;
        let renewed = sqlx::query(
            "UPDATE host SET lease_until = $3 WHERE id = $1 AND generation = $2 AND lease_until >= $4",
        )
        .bind(self.host.to_string())
        .bind(self.generation.load(Ordering::Relaxed))
        .bind(now.plus(length).as_micros())
        .bind(now.as_micros())
        .execute(&mut *connection)
        .await
        .map_err(StoreError::query("renew the host's lease"))?;
        Ok(renewed.rows_affected() > 0)
    }

    /// Refuses what a controller would do to machines that has lost its lease to another one.
    pub(super) async fn fence(&self, tx: &mut Transaction<'static, Any>) -> Result<(), StoreError> {
        let generation = self.generation.load(Ordering::Relaxed);
        if generation == 0 {
            return Ok(());
        }
        let found = sqlx::query("SELECT id FROM host WHERE id = $1 AND generation = $2")
            .bind(self.host.to_string())
            .bind(generation)
            .fetch_optional(&mut **tx)
            .await
            .map_err(StoreError::query("look whether the lease is still held"))?;
        found.map(drop).ok_or(StoreError::Fenced)
    }

    /// As [`Store::fence`], for what a controller is about to do outside of the database.
    pub(crate) async fn check_fence(&self) -> Result<(), StoreError> {
        if self.generation.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        self.fence(&mut tx).await
    }

    /// Every host that ever shared the database, oldest first.
    pub(crate) async fn hosts(&self) -> Result<Vec<HostRow>, StoreError> {
        let mut connection = self.connection().await?;
        let now = self.database_now(&mut connection).await?;
        sqlx::query(
            "SELECT host.*, (SELECT COUNT(*) FROM machine WHERE machine.host_id = host.id AND gone_at IS NULL) AS machines \
             FROM host ORDER BY id",
        )
        .fetch_all(&mut *connection)
        .await
        .map_err(StoreError::query("list hosts"))?
        .iter()
        .map(|found| {
            let lease_until = row::maybe_time(found, "lease_until")?;
            Ok(HostRow {
                id: row::id(found, "id")?,
                name: row::text(found, "name")?,
                address: row::maybe_text(found, "address")?,
                lease_until,
                generation: row::count(found, "generation")?,
                live: lease_until.is_none_or(|until| now <= until),
                machines: row::count(found, "machines")?,
            })
        })
        .collect()
    }

    /// Machines that sessions still have on hosts whose lease ran out more than `after` ago, with the host's name.
    pub(crate) async fn machines_of_lost_hosts(
        &self,
        after: Duration,
    ) -> Result<Vec<(MachineId, String)>, StoreError> {
        let mut connection = self.connection().await?;
        let before = self.before(&mut connection, after).await?;
        sqlx::query(
            "SELECT machine.id, host.name FROM host JOIN machine ON machine.host_id = host.id \
             JOIN session ON session.machine_id = machine.id \
             WHERE host.lease_until < $1 AND machine.state <> 'lost' AND session.deadline_at IS NOT NULL ORDER BY machine.id",
        )
        .bind(before)
        .fetch_all(&mut *connection)
        .await
        .map_err(StoreError::query("look for sessions of lost hosts"))?
        .iter()
        .map(|found| Ok((row::id(found, "id")?, row::text(found, "name")?)))
        .collect()
    }

    /// The machine's host is lost: what that means for its session, unless the host came back meanwhile. Returns what
    /// [`Store::ingest`] does.
    pub(crate) async fn host_lost(
        &self,
        id: MachineId,
        after: Duration,
        finding: Finding,
        now: Timestamp,
    ) -> Result<Option<Ingested>, StoreError> {
        let mut tx = self.begin().await?;
        let machine = machine::lock(&mut tx, id).await?;
        let Some(mut machine) = machine.filter(|m| m.state != MachineState::Lost) else {
            return Ok(None);
        };
        let before = self.before(&mut tx, after).await?;
        let lost = sqlx::query("SELECT id FROM host WHERE id = $1 AND lease_until < $2")
            .bind(machine.host_id.map(|id| id.to_string()))
            .bind(before)
            .fetch_optional(&mut *tx)
            .await
            .map_err(StoreError::query("look whether a host is lost"))?;
        if lost.is_none() {
            return Ok(None);
        }
        machine.state = MachineState::Lost;
        self.write_failed(tx, &machine, finding, now).await
    }

    /// Removes a host that never comes back: its machines are gone, and what was to be done there is done, but for credentials
    /// that are to be discarded.
    pub(crate) async fn forget_host(
        &self,
        id: HostId,
        now: Timestamp,
    ) -> Result<Forgotten, StoreError> {
        let failed = || StoreError::query("remove a host");
        let mut tx = self.begin().await?;
        self.one_at_a_time(&mut tx).await?;
        let found = sqlx::query(
            "UPDATE host SET generation = generation + 1 WHERE id = $1 RETURNING lease_until",
        )
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await
        .map_err(failed())?;
        let Some(found) = found else {
            return Ok(Forgotten::Missing);
        };
        let database_now = self.database_now(&mut tx).await?;
        let until = row::maybe_time(&found, "lease_until")?;
        if id == self.host || until.is_none_or(|until| database_now <= until) {
            return Ok(Forgotten::Live);
        }
        let used = sqlx::query(
            "SELECT session.id FROM session JOIN machine ON machine.id = session.machine_id \
             WHERE machine.host_id = $1 AND session.deadline_at IS NOT NULL LIMIT 1",
        )
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await
        .map_err(failed())?;
        if used.is_some() {
            return Ok(Forgotten::InUse);
        }
        for sql in [
            "UPDATE machine SET state = 'lost', gone_at = $2 WHERE host_id = $1 AND gone_at IS NULL",
            // Should it come back all the same, a credential that its session did not get is still to be removed there.
            "UPDATE effect SET done_at = $2 WHERE host_id = $1 AND done_at IS NULL AND kind <> 'discard'",
        ] {
            sqlx::query(sql)
                .bind(id.to_string())
                .bind(now.as_micros())
                .execute(&mut *tx)
                .await
                .map_err(failed())?;
        }
        for sql in [
            "DELETE FROM credential_host WHERE host_id = $1",
            "DELETE FROM host WHERE id = $1",
        ] {
            sqlx::query(sql)
                .bind(id.to_string())
                .execute(&mut *tx)
                .await
                .map_err(failed())?;
        }
        self.commit(tx, None).await?;
        Ok(Forgotten::Yes)
    }

    async fn before(
        &self,
        connection: &mut sqlx::AnyConnection,
        after: Duration,
    ) -> Result<i64, StoreError> {
        let now = self.database_now(connection).await?;
        let after = i64::try_from(after.as_micros()).unwrap_or(i64::MAX);
        Ok(now.as_micros().saturating_sub(after))
    }

    /// Claims a machine that a scheduler put on this host. `false`: it is another host's, or there is none.
    pub(crate) async fn claim_machine(&self, id: MachineId) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        self.fence(&mut tx).await?;
        let claimed = sqlx::query(
            "UPDATE machine SET host_id = $2 WHERE id = $1 AND (host_id IS NULL OR host_id = $2)",
        )
        .bind(id.to_string())
        .bind(self.host.to_string())
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("claim a machine"))?
        .rows_affected();
        self.commit(tx, None).await?;
        Ok(claimed > 0)
    }

    /// Whose controller serves a session: the host of its machine; none: it has none, or there is no such session.
    pub(crate) async fn host_of_session(
        &self,
        id: SessionId,
    ) -> Result<Option<HostId>, StoreError> {
        let sql = "SELECT machine.host_id FROM session JOIN machine ON machine.id = session.machine_id WHERE session.id = $1";
        self.host_by(sql, id.to_string()).await
    }

    /// Whose a machine is; none: nobody's yet, or there is no such machine.
    pub(crate) async fn host_of_machine(
        &self,
        id: MachineId,
    ) -> Result<Option<HostId>, StoreError> {
        self.host_by("SELECT host_id FROM machine WHERE id = $1", id.to_string())
            .await
    }

    /// In whose vault a credential is; none: that is not known.
    pub(crate) async fn host_of_credential(
        &self,
        id: CredentialId,
    ) -> Result<Option<HostId>, StoreError> {
        let sql = "SELECT host_id FROM credential_host WHERE credential_id = $1";
        self.host_by(sql, id.to_string()).await
    }

    async fn host_by(&self, sql: &'static str, id: String) -> Result<Option<HostId>, StoreError> {
        let found = sqlx::query(sql)
            .bind(id)
            .fetch_optional(self.pool())
            .await
            .map_err(StoreError::query("look up a host"))?;
        Ok(found
            .map(|row| row::maybe_id(&row, "host_id"))
            .transpose()?
            .flatten())
    }
}

/// Remembers in whose vault a session's credential was sealed.
pub(super) async fn sealed_at(
    tx: &mut Transaction<'static, Any>,
    host: HostId,
    session: &session::SessionRow,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO credential_host (credential_id, host_id) VALUES ($1, $2) ON CONFLICT (credential_id) DO NOTHING",
    )
    .bind(session.credential_id.to_string())
    .bind(host.to_string())
    .execute(&mut **tx)
    .await
    .map(drop)
    .map_err(StoreError::query("remember a credential's host"))
}

//! Machine rows: what each VM's runner last reported. Only its runner raises the generation.
use super::{
    Store, StoreError, row,
    session::{self, Applied, Facts, Fallback, Given, SessionRow},
};
use crate::state::Event;
use sqlx::{Any, Transaction, any::AnyRow};
use vestibule_api::{
    cause::Cause,
    finding::Finding,
    ids::{HostId, ImageDigest, MachineId, SessionId, SnapshotId},
    machine::{MachineState, MachineView},
    session::{NotPooled, SessionEventKind, SessionState, StartKind},
    time::Timestamp,
};

/// A machine, as its row says.
#[derive(Clone, Debug)]
pub(crate) struct MachineRow {
    pub(crate) id: MachineId,
    pub(crate) session_id: Option<SessionId>,
    /// Whose it is, once it is in the database; none: wherever a scheduler puts it.
    pub(crate) host_id: Option<HostId>,
    pub(crate) image_alias: String,
    pub(crate) image_digest: ImageDigest,
    /// The snapshot that it begins from; none: it boots.
    pub(crate) snapshot_id: Option<SnapshotId>,
    /// Whether it was made for the pool. A session that took it keeps it.
    pub(crate) pooled: bool,
    /// Why nobody gets it out of the pool any more.
    pub(crate) retired: Option<String>,
    pub(crate) memory_mib: u32,
    pub(crate) vcpus: u32,
    pub(crate) state: MachineState,
    pub(crate) generation: u64,
    pub(crate) last_seq: u64,
    pub(crate) created_at: Timestamp,
    /// When its runner was started; none: not yet, or never.
    pub(crate) launched_at: Option<Timestamp>,
    pub(crate) ready_at: Option<Timestamp>,
    pub(crate) gone_at: Option<Timestamp>,
    pub(crate) failure: Option<Finding>,
}

/// What one event of a runner means, to be taken in with one transaction.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reported {
    pub(crate) state: Option<(MachineState, u64)>,
    pub(crate) failure: Option<Finding>,
    pub(crate) events: Vec<SessionEventKind>,
    pub(crate) event: Option<(Event, Facts)>,
}

/// What came of a runner's event, or of its end, for the session of the VM.
#[derive(Clone, Debug)]
pub(crate) struct Ingested {
    pub(crate) start: StartKind,
    /// When the session was asked for.
    pub(crate) asked_at: Timestamp,
    /// The state that the session went into.
    pub(crate) moved: Option<SessionState>,
    /// Why the session was sent back for another VM.
    pub(crate) fell_back: Option<Cause>,
}

fn state_id(state: MachineState) -> String {
    match serde_json::to_value(state) {
        Ok(serde_json::Value::String(id)) => id,
        // A unit variant is a string; this is what the database would refuse to read back.
        Ok(_) | Err(_) => String::new(),
    }
}

fn state_from_id(id: &str) -> Option<MachineState> {
    serde_json::from_value(serde_json::Value::String(id.to_owned())).ok()
}

impl MachineRow {
    pub(super) fn read(row: &AnyRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: row::id(row, "id")?,
            session_id: row::maybe_id(row, "session_id")?,
            host_id: row::maybe_id(row, "host_id")?,
            image_alias: row::text(row, "image_alias")?,
            image_digest: row::id(row, "image_digest")?,
            snapshot_id: row::maybe_id(row, "snapshot_id")?,
            pooled: row::int(row, "pooled")? != 0,
            retired: row::maybe_text(row, "retired")?,
            memory_mib: row::count(row, "memory_mib")?,
            vcpus: row::count(row, "vcpus")?,
            state: row::word(row, "state", state_from_id)?,
            generation: row::count(row, "generation")?,
            last_seq: row::count(row, "last_seq")?,
            created_at: row::time(row, "created_at")?,
            launched_at: row::maybe_time(row, "launched_at")?,
            ready_at: row::maybe_time(row, "ready_at")?,
            gone_at: row::maybe_time(row, "gone_at")?,
            failure: row::maybe_json(row, "failure")?,
        })
    }

    /// A machine that is about to be made, with a boot, for nobody yet.
    pub(crate) fn new(alias: String, digest: ImageDigest, memory_mib: u32, vcpus: u32) -> Self {
        Self {
            id: MachineId::generate(),
            session_id: None,
            host_id: None,
            image_alias: alias,
            image_digest: digest,
            snapshot_id: None,
            pooled: false,
            retired: None,
            memory_mib,
            vcpus,
            state: MachineState::Creating,
            generation: 0,
            last_seq: 0,
            created_at: Timestamp::now(),
            launched_at: None,
            ready_at: None,
            gone_at: None,
            failure: None,
        }
    }

    /// A machine that somebody else started and its runner shows.
    pub(crate) fn found(view: &MachineView) -> Self {
        Self {
            id: view.machine_id,
            session_id: view.session_id,
            host_id: None,
            image_alias: String::new(),
            image_digest: view.image_digest.clone(),
            snapshot_id: view.snapshot_id.clone(),
            pooled: false,
            retired: None,
            memory_mib: view.memory_mib,
            vcpus: view.vcpus,
            state: view.state,
            generation: view.generation,
            last_seq: 0,
            created_at: view.started_at,
            launched_at: Some(view.started_at),
            ready_at: view.ready_at,
            gone_at: None,
            failure: view.failure.clone(),
        }
    }

    /// How it begins, or began.
    pub(crate) fn start(&self) -> StartKind {
        match (&self.snapshot_id, self.pooled) {
            (None, _) => StartKind::Cold,
            (Some(_), false) => StartKind::Restore,
            (Some(_), true) => StartKind::Pool,
        }
    }

    /// Whether it is in the pool: nobody's yet, and not about to be ended.
    pub(crate) fn is_stock(&self) -> bool {
        self.pooled && self.session_id.is_none() && self.retired.is_none() && !self.is_over()
    }

    /// Whether its runner has said, or it was seen, that it will not serve anybody any more.
    pub(crate) fn is_over(&self) -> bool {
        self.failure.is_some()
            || matches!(
                self.state,
                MachineState::Stopping | MachineState::Gone | MachineState::Lost
            )
    }
}

/// What the failure of `machine` means for the session that it was given to. One that began from a snapshot and was not
/// ready yet is replaced: a VM of the pool by one of the session's own, and that by one that boots.
fn failed(machine: &MachineRow, session: &SessionRow, finding: Finding) -> (Event, Facts) {
    let from = machine.start();
    let refused = is_snapshots(finding.cause);
    let to = if from == StartKind::Pool && !refused {
        StartKind::Restore
    } else {
        StartKind::Cold
    };
    let again = from != StartKind::Cold && session.state == SessionState::Starting;
    let facts = Facts {
        finding: Some(finding),
        fallback: again.then_some(Fallback { from, to }),
        ..Facts::default()
    };
    if again {
        (Event::StartFailed, facts)
    } else {
        (Event::MachineFailed, facts)
    }
}

/// Whether the snapshot itself is what failed.
pub(super) fn is_snapshots(cause: Cause) -> bool {
    matches!(cause, Cause::SnapshotRefused | Cause::SnapshotFailed)
}

impl Store {
    /// Gives a waiting session a machine, `why` none of the pool, with state and effect at once. `false`: it waits no more.
    pub(crate) async fn place(
        &self,
        machine: &MachineRow,
        why: NotPooled,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let Some(id) = machine.session_id else {
            return Ok(false);
        };
        let mut tx = self.begin().await?;
        self.fence(&mut tx).await?;
        let Some(mut session) = session::lock(&mut tx, id).await? else {
            return Ok(false);
        };
        if !self
            .give(&mut tx, &mut session, machine, Some(why), now)
            .await?
        {
            return Ok(false);
        }
        insert(&mut tx, machine, self.host).await?;
        self.commit(tx, Some(id)).await?;
        Ok(true)
    }

    /// Writes into a held session's row that it has this machine. `false`: it does not wait for one.
    pub(super) async fn give(
        &self,
        tx: &mut Transaction<'static, Any>,
        session: &mut SessionRow,
        machine: &MachineRow,
        why: Option<NotPooled>,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let facts = Facts {
            given: Some(Given {
                machine: machine.id,
                image: machine.image_digest.clone(),
                start: machine.start(),
                snapshot: machine.snapshot_id.clone(),
                why,
            }),
            ..Facts::default()
        };
        let applied = self.step(tx, session, Event::Placed, &facts, now).await?;
        if matches!(applied, Applied::Ignored(_)) {
            return Ok(false);
        }
        session::write(tx, session).await?;
        Ok(true)
    }

    /// The machine's row.
    pub(crate) async fn machine(&self, id: MachineId) -> Result<Option<MachineRow>, StoreError> {
        sqlx::query("SELECT * FROM machine WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(self.pool())
            .await
            .map_err(StoreError::query("read a machine"))?
            .map(|row| MachineRow::read(&row))
            .transpose()
    }

    /// Machines of this host of which something may be left on it, oldest first.
    pub(crate) async fn own_machines(&self) -> Result<Vec<MachineRow>, StoreError> {
        sqlx::query("SELECT * FROM machine WHERE gone_at IS NULL AND host_id = $1 ORDER BY id")
            .bind(self.host.to_string())
            .fetch_all(self.pool())
            .await
            .map_err(StoreError::query("list the host's machines"))?
            .iter()
            .map(MachineRow::read)
            .collect()
    }

    /// Ids of the machines of this host whose runners say more, oldest first.
    pub(crate) async fn launched_machines(&self) -> Result<Vec<MachineId>, StoreError> {
        sqlx::query(
            "SELECT id FROM machine WHERE gone_at IS NULL AND host_id = $1 AND launched_at IS NOT NULL \
             AND state NOT IN ('gone', 'lost') ORDER BY id",
        )
        .bind(self.host.to_string())
        .fetch_all(self.pool())
        .await
        .map_err(StoreError::query("list the host's runners"))?
        .iter()
        .map(|found| row::id(found, "id"))
        .collect()
    }

    /// Machines of this host that were made for the pool, that no session has, and of which something is left, oldest first.
    pub(crate) async fn nobodys_machines(&self) -> Result<Vec<MachineRow>, StoreError> {
        sqlx::query(
            "SELECT * FROM machine WHERE gone_at IS NULL AND host_id = $1 AND pooled = 1 AND session_id IS NULL ORDER BY id",
        )
        .bind(self.host.to_string())
        .fetch_all(self.pool())
        .await
        .map_err(StoreError::query("list the pool's machines"))?
        .iter()
        .map(MachineRow::read)
        .collect()
    }

    /// How many machines of this host there are of which something may be left on it.
    pub(crate) async fn count_own_machines(&self) -> Result<usize, StoreError> {
        let found = sqlx::query(
            "SELECT COUNT(*) AS machines FROM machine WHERE gone_at IS NULL AND host_id = $1",
        )
        .bind(self.host.to_string())
        .fetch_one(self.pool())
        .await
        .map_err(StoreError::query("count the host's machines"))?;
        row::count(&found, "machines")
    }

    /// Machines of all hosts of which something may be left, oldest first.
    pub(crate) async fn machines(&self) -> Result<Vec<MachineRow>, StoreError> {
        sqlx::query("SELECT * FROM machine WHERE gone_at IS NULL ORDER BY id")
            .fetch_all(self.pool())
            .await
            .map_err(StoreError::query("list machines"))?
            .iter()
            .map(MachineRow::read)
            .collect()
    }

    /// Machines of this host, or of none yet, that this session was given and of which something may be left, oldest first.
    pub(crate) async fn machines_of(
        &self,
        session: SessionId,
    ) -> Result<Vec<MachineRow>, StoreError> {
        let sql = "SELECT * FROM machine WHERE session_id = $1 AND gone_at IS NULL AND (host_id IS NULL OR host_id = $2) \
                   ORDER BY id";
        sqlx::query(sql)
            .bind(session.to_string())
            .bind(self.host.to_string())
            .fetch_all(self.pool())
            .await
            .map_err(StoreError::query("list a session's machines"))?
            .iter()
            .map(MachineRow::read)
            .collect()
    }

    /// The newest machines, gone ones too.
    pub(crate) async fn all_machines(&self, limit: u32) -> Result<Vec<MachineRow>, StoreError> {
        sqlx::query("SELECT * FROM machine ORDER BY id DESC LIMIT $1")
            .bind(i64::from(limit))
            .fetch_all(self.pool())
            .await
            .map_err(StoreError::query("list all machines"))?
            .iter()
            .map(MachineRow::read)
            .collect()
    }

    /// Takes in event number `seq` of a machine's runner, once: a number that was seen before changes nothing. What it
    /// meant for the session that has the machine now; none: there is none, or the event is not new.
    pub(crate) async fn ingest(
        &self,
        id: MachineId,
        seq: u64,
        reported: &Reported,
        now: Timestamp,
    ) -> Result<Option<Ingested>, StoreError> {
        let mut tx = self.begin().await?;
        self.fence(&mut tx).await?;
        let Some(machine) = lock(&mut tx, id).await? else {
            return Ok(None);
        };
        if seq <= machine.last_seq {
            return Ok(None);
        }
        update(&mut tx, &machine, seq, reported, now).await?;
        let ingested = self.tell_session(&mut tx, &machine, reported, now).await?;
        self.commit_words(tx, machine.session_id).await?;
        let moved = ingested.as_ref().is_some_and(|told| told.moved.is_some());
        if moved || reported.state.is_some() || reported.failure.is_some() {
            self.signals.wake();
        }
        Ok(ingested)
    }

    /// What a machine's event means for its session. A machine that the session has given up has nothing to tell it.
    pub(super) async fn tell_session(
        &self,
        tx: &mut Transaction<'static, Any>,
        machine: &MachineRow,
        reported: &Reported,
        now: Timestamp,
    ) -> Result<Option<Ingested>, StoreError> {
        let Some(id) = machine.session_id else {
            return Ok(None);
        };
        let Some(mut session) = session::lock(tx, id).await? else {
            return Ok(None);
        };
        if session.state.is_terminal() || session.machine_id != Some(machine.id) {
            return Ok(None);
        }
        session::add(tx, &mut session, &reported.events, now).await?;
        let mut ingested = Ingested {
            start: machine.start(),
            asked_at: session.created_at,
            moved: None,
            fell_back: None,
        };
        if let Some((event, facts)) = &reported.event {
            let (event, facts) = match (event, &facts.finding) {
                (Event::MachineFailed, Some(finding)) => failed(machine, &session, finding.clone()),
                _ => (*event, facts.clone()),
            };
            let applied = self.step(tx, &mut session, event, &facts, now).await?;
            if let Applied::Moved(state) = applied {
                ingested.moved = Some(state);
                let why = facts.fallback.and(facts.finding);
                ingested.fell_back = why.map(|finding| finding.cause);
            }
        }
        session::write(tx, &session).await?;
        Ok(Some(ingested))
    }

    /// The machine's runner was started.
    pub(crate) async fn machine_launched(
        &self,
        id: MachineId,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        sqlx::query("UPDATE machine SET launched_at = $2 WHERE id = $1 AND launched_at IS NULL")
            .bind(id.to_string())
            .bind(now.as_micros())
            .execute(self.writer())
            .await
            .map_err(StoreError::query("write a machine's start"))?;
        self.signals.wake();
        Ok(())
    }

    /// The runner disappeared without a word. Returns what [`Store::ingest`] does.
    pub(crate) async fn machine_lost(
        &self,
        id: MachineId,
        finding: Finding,
        now: Timestamp,
    ) -> Result<Option<Ingested>, StoreError> {
        self.fail(id, finding, true, now).await
    }

    /// The machine can't serve its session, whatever its runner says. Returns what [`Store::ingest`] does.
    pub(crate) async fn machine_failed(
        &self,
        id: MachineId,
        finding: Finding,
        now: Timestamp,
    ) -> Result<Option<Ingested>, StoreError> {
        self.fail(id, finding, false, now).await
    }

    async fn fail(
        &self,
        id: MachineId,
        finding: Finding,
        lost: bool,
        now: Timestamp,
    ) -> Result<Option<Ingested>, StoreError> {
        let mut tx = self.begin().await?;
        self.fence(&mut tx).await?;
        let machine = lock(&mut tx, id).await?;
        let Some(mut machine) = machine.filter(|machine| machine.gone_at.is_none()) else {
            return Ok(None);
        };
        if lost {
            machine.state = MachineState::Lost;
        }
        self.write_failed(tx, &machine, finding, now).await
    }

    /// Writes a machine that failed, tells its session, and commits.
    pub(super) async fn write_failed(
        &self,
        mut tx: Transaction<'static, Any>,
        machine: &MachineRow,
        finding: Finding,
        now: Timestamp,
    ) -> Result<Option<Ingested>, StoreError> {
        let facts = Facts::from(finding.clone());
        let reported = Reported {
            failure: machine.failure.is_none().then_some(finding),
            event: Some((Event::MachineFailed, facts)),
            ..Reported::default()
        };
        update(&mut tx, machine, machine.last_seq, &reported, now).await?;
        let ingested = self.tell_session(&mut tx, machine, &reported, now).await?;
        self.commit(tx, machine.session_id).await?;
        Ok(ingested)
    }

    /// Nothing of the machine is left on the host: its place is free.
    pub(crate) async fn machine_gone(
        &self,
        id: MachineId,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        // A lost machine stays a lost one, whatever is cleaned up after it.
        sqlx::query(
            "UPDATE machine SET state = CASE state WHEN 'lost' THEN 'lost' ELSE $2 END, gone_at = $3 \
             WHERE id = $1 AND gone_at IS NULL",
        )
        .bind(id.to_string())
        .bind(state_id(MachineState::Gone))
        .bind(now.as_micros())
        .execute(self.writer())
        .await
        .map_err(StoreError::query("write a machine's end"))?;
        self.signals.wake();
        Ok(())
    }
}

/// The row, held until the transaction ends. Who holds a session's row as well takes this one first.
pub(super) async fn lock(
    tx: &mut Transaction<'static, Any>,
    id: MachineId,
) -> Result<Option<MachineRow>, StoreError> {
    sqlx::query("UPDATE machine SET last_seq = last_seq WHERE id = $1 RETURNING *")
        .bind(id.to_string())
        .fetch_optional(&mut **tx)
        .await
        .map_err(StoreError::query("hold a machine's row"))?
        .map(|row| MachineRow::read(&row))
        .transpose()
}

pub(super) async fn insert(
    connection: &mut sqlx::AnyConnection,
    machine: &MachineRow,
    host: HostId,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO machine (id, session_id, image_alias, image_digest, memory_mib, vcpus, state, generation, \
         last_seq, created_at, launched_at, snapshot_id, pooled, host_id) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, 0, 0, $8, $9, $10, $11, $12) ON CONFLICT (id) DO NOTHING",
    )
    .bind(machine.id.to_string())
    .bind(machine.session_id.map(|id| id.to_string()))
    .bind(&machine.image_alias)
    .bind(machine.image_digest.as_str())
    .bind(i64::from(machine.memory_mib))
    .bind(i64::from(machine.vcpus))
    .bind(state_id(machine.state))
    .bind(machine.created_at.as_micros())
    .bind(machine.launched_at.map(Timestamp::as_micros))
    .bind(machine.snapshot_id.as_ref().map(|id| id.as_str().to_owned()))
    .bind(i64::from(machine.pooled))
    .bind(host.to_string())
    .execute(connection)
    .await
    .map(|_| ())
    .map_err(StoreError::query("insert a machine"))
}

pub(super) async fn update(
    connection: &mut sqlx::AnyConnection,
    machine: &MachineRow,
    seq: u64,
    reported: &Reported,
    now: Timestamp,
) -> Result<(), StoreError> {
    // One that was given up stays so, also when its runner lives and its host comes back; so does one that is gone, whatever
    // its runner's last words were.
    let over = machine.state == MachineState::Lost || machine.gone_at.is_some();
    let newer = reported
        .state
        .filter(|(_, generation)| *generation > machine.generation && !over);
    let (state, generation) = newer.unwrap_or((machine.state, machine.generation));
    let ready_at = match machine.ready_at {
        None if state == MachineState::Up => Some(now),
        before => before,
    };
    let failure = reported.failure.as_ref().or(machine.failure.as_ref());
    let failure = failure.map(|f| row::to_json("failure", f)).transpose()?;
    sqlx::query(
        "UPDATE machine SET state = $2, generation = $3, last_seq = $4, ready_at = $5, failure = $6 WHERE id = $1",
    )
    .bind(machine.id.to_string())
    .bind(state_id(state))
    .bind(row::signed(generation))
    .bind(row::signed(seq))
    .bind(ready_at.map(Timestamp::as_micros))
    .bind(failure)
    .execute(connection)
    .await
    .map(|_| ())
    .map_err(StoreError::query("write a machine"))
}

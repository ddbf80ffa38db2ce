//! Machine rows: what each VM's runner last reported. Only its runner raises the generation.
use super::{
    Store, StoreError, row,
    session::{self, Applied, Facts},
};
use crate::state::Event;
use sqlx::any::AnyRow;
use vestibule_api::{
    finding::Finding,
    ids::{ImageDigest, MachineId, SessionId},
    machine::{MachineState, MachineView},
    session::SessionEventKind,
    time::Timestamp,
};

/// A machine, as its row says.
#[derive(Clone, Debug)]
pub(crate) struct MachineRow {
    pub(crate) id: MachineId,
    pub(crate) session_id: Option<SessionId>,
    pub(crate) image_alias: String,
    pub(crate) image_digest: ImageDigest,
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
    fn read(row: &AnyRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: row::id(row, "id")?,
            session_id: row::maybe_id(row, "session_id")?,
            image_alias: row::text(row, "image_alias")?,
            image_digest: row::id(row, "image_digest")?,
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

    /// A machine that is about to be made for a session.
    pub(crate) fn new(
        session: SessionId,
        alias: String,
        digest: ImageDigest,
        memory_mib: u32,
        vcpus: u32,
    ) -> Self {
        Self {
            id: MachineId::generate(),
            session_id: Some(session),
            image_alias: alias,
            image_digest: digest,
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
            image_alias: String::new(),
            image_digest: view.image_digest.clone(),
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
}

impl Store {
    /// Gives a waiting session its machine: row, state and effect in one transaction. `false`: it does not wait any more.
    pub(crate) async fn place(
        &self,
        machine: &MachineRow,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let Some(id) = machine.session_id else {
            return Ok(false);
        };
        let mut tx = self.begin().await?;
        let Some(mut session) = session::lock(&mut tx, id).await? else {
            return Ok(false);
        };
        let facts = Facts {
            machine: Some((machine.id, machine.image_digest.clone())),
            ..Facts::default()
        };
        let applied = self
            .step(&mut tx, &mut session, Event::Placed, &facts, now)
            .await?;
        if matches!(applied, Applied::Ignored(_)) {
            return Ok(false);
        }
        session::write(&mut tx, &session).await?;
        insert(&mut tx, machine).await?;
        self.commit(tx, Some(id)).await?;
        Ok(true)
    }

    /// Writes down a machine that somebody else started.
    pub(crate) async fn adopt(&self, machine: &MachineRow) -> Result<(), StoreError> {
        let mut connection = self
            .pool
            .acquire()
            .await
            .map_err(StoreError::query("reach the database"))?;
        insert(&mut connection, machine).await
    }

    /// The machine's row.
    pub(crate) async fn machine(&self, id: MachineId) -> Result<Option<MachineRow>, StoreError> {
        sqlx::query("SELECT * FROM machine WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await
            .map_err(StoreError::query("read a machine"))?
            .map(|row| MachineRow::read(&row))
            .transpose()
    }

    /// Machines of which something may be left on the host, oldest first.
    pub(crate) async fn machines(&self) -> Result<Vec<MachineRow>, StoreError> {
        sqlx::query("SELECT * FROM machine WHERE gone_at IS NULL ORDER BY id")
            .fetch_all(&self.pool)
            .await
            .map_err(StoreError::query("list machines"))?
            .iter()
            .map(MachineRow::read)
            .collect()
    }

    /// The newest machines, gone ones too.
    pub(crate) async fn all_machines(&self, limit: u32) -> Result<Vec<MachineRow>, StoreError> {
        sqlx::query("SELECT * FROM machine ORDER BY id DESC LIMIT $1")
            .bind(i64::from(limit))
            .fetch_all(&self.pool)
            .await
            .map_err(StoreError::query("list all machines"))?
            .iter()
            .map(MachineRow::read)
            .collect()
    }

    /// Takes in event number `seq` of a machine's runner, once: a number that was seen before changes nothing.
    pub(crate) async fn ingest(
        &self,
        id: MachineId,
        seq: u64,
        reported: &Reported,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        let Some(machine) = read(&mut tx, id).await? else {
            return Ok(());
        };
        if seq <= machine.last_seq {
            return Ok(());
        }
        update(&mut tx, &machine, seq, reported, now).await?;
        if let Some(session) = machine.session_id {
            self.tell_session(&mut tx, session, reported, now).await?;
        }
        self.commit(tx, machine.session_id).await
    }

    /// What a runner's event means for its session.
    async fn tell_session(
        &self,
        tx: &mut sqlx::Transaction<'static, sqlx::Any>,
        id: SessionId,
        reported: &Reported,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let Some(mut session) = session::lock(tx, id).await? else {
            return Ok(());
        };
        if session.state.is_terminal() {
            return Ok(());
        }
        session::add(tx, &mut session, &reported.events, now).await?;
        if let Some((event, facts)) = &reported.event {
            self.step(tx, &mut session, *event, facts, now).await?;
        }
        session::write(tx, &session).await
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
            .execute(&self.pool)
            .await
            .map_err(StoreError::query("write a machine's start"))?;
        self.signals.wake();
        Ok(())
    }

    /// The runner disappeared without a word.
    pub(crate) async fn machine_lost(&self, id: MachineId) -> Result<(), StoreError> {
        self.set_machine_state(id, MachineState::Lost, None).await
    }

    /// Nothing of the machine is left on the host: its place is free.
    pub(crate) async fn machine_gone(
        &self,
        id: MachineId,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        self.set_machine_state(id, MachineState::Gone, Some(now))
            .await
    }

    async fn set_machine_state(
        &self,
        id: MachineId,
        state: MachineState,
        gone_at: Option<Timestamp>,
    ) -> Result<(), StoreError> {
        // A lost machine stays a lost one, whatever is cleaned up after it.
        sqlx::query(
            "UPDATE machine SET state = CASE state WHEN 'lost' THEN 'lost' ELSE $2 END, gone_at = $3 \
             WHERE id = $1 AND gone_at IS NULL",
        )
        .bind(id.to_string())
        .bind(state_id(state))
        .bind(gone_at.map(Timestamp::as_micros))
        .execute(&self.pool)
        .await
        .map_err(StoreError::query("write a machine's end"))?;
        self.signals.wake();
        Ok(())
    }
}

async fn read(
    connection: &mut sqlx::AnyConnection,
    id: MachineId,
) -> Result<Option<MachineRow>, StoreError> {
    sqlx::query("SELECT * FROM machine WHERE id = $1")
        .bind(id.to_string())
        .fetch_optional(connection)
        .await
        .map_err(StoreError::query("read a machine"))?
        .map(|row| MachineRow::read(&row))
        .transpose()
}

async fn insert(
    connection: &mut sqlx::AnyConnection,
    machine: &MachineRow,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO machine (id, session_id, image_alias, image_digest, memory_mib, vcpus, state, generation, \
         last_seq, created_at, launched_at) VALUES ($1, $2, $3, $4, $5, $6, $7, 0, 0, $8, $9) ON CONFLICT (id) DO NOTHING",
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
    .execute(connection)
    .await
    .map(|_| ())
    .map_err(StoreError::query("insert a machine"))
}

async fn update(
    connection: &mut sqlx::AnyConnection,
    machine: &MachineRow,
    seq: u64,
    reported: &Reported,
    now: Timestamp,
) -> Result<(), StoreError> {
    let newer = reported
        .state
        .filter(|(_, generation)| *generation > machine.generation);
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

//! Session rows: made once, changed only by [`crate::state::next`].
use super::{
    Store, StoreError, effect, event, host,
    owner::{self, Created, Quota, Scope},
    row,
};
use crate::{
    people::Owner,
    state::{self, Current, Event, Illegal},
};
use sqlx::{Any, Transaction, any::AnyRow};
use std::time::Duration;
use vestibule_api::{
    finding::{Finding, Verdict},
    ids::{CredentialId, ImageDigest, MachineId, ProviderId, SessionId, SnapshotId},
    session::{NotPooled, SessionEventKind, SessionState, StartKind},
    time::Timestamp,
};

/// A guest that reports without end fills no database: beyond so many events only states are added.
const EVENTS_LIMIT: u64 = 5000;

/// A session, as its row says.
#[derive(Clone, Debug)]
pub(crate) struct SessionRow {
    pub(crate) id: SessionId,
    pub(crate) provider: ProviderId,
    pub(crate) flow: String,
    pub(crate) user_id: String,
    pub(crate) image_alias: String,
    pub(crate) state: SessionState,
    pub(crate) created_at: Timestamp,
    pub(crate) updated_at: Timestamp,
    pub(crate) deadline_at: Option<Timestamp>,
    pub(crate) login_timeout: Duration,
    /// How its VM may begin; a start that failed has lowered it.
    pub(crate) start_at_most: StartKind,
    pub(crate) machine_id: Option<MachineId>,
    pub(crate) image_digest: Option<ImageDigest>,
    pub(crate) credential_id: CredentialId,
    pub(crate) captured_at: Option<Timestamp>,
    pub(crate) sealed_at: Option<Timestamp>,
    pub(crate) account: Option<String>,
    pub(crate) failure: Option<Verdict>,
    /// Whether its owner confirms the account before the credential is fetched.
    pub(crate) confirm_account: bool,
    /// The id of its owner.
    pub(crate) owner_id: String,
    event_seq: u64,
}

/// A session to be made.
#[derive(Clone, Debug)]
pub(crate) struct NewSession {
    pub(crate) id: SessionId,
    pub(crate) provider: ProviderId,
    pub(crate) flow: String,
    pub(crate) user_id: String,
    pub(crate) image_alias: String,
    pub(crate) login_timeout: Duration,
    pub(crate) start_at_most: StartKind,
    pub(crate) owner: Owner,
    pub(crate) quota: Quota,
    pub(crate) confirm_account: bool,
}

/// The VM that a session was given.
#[derive(Clone, Debug)]
pub(crate) struct Given {
    pub(crate) machine: MachineId,
    pub(crate) image: ImageDigest,
    pub(crate) start: StartKind,
    pub(crate) snapshot: Option<SnapshotId>,
    pub(crate) why: Option<NotPooled>,
}

/// A start that failed, and what is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fallback {
    pub(crate) from: StartKind,
    pub(crate) to: StartKind,
}

/// What comes with an event and is kept in the row when the event takes effect.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    pub(crate) given: Option<Given>,
    pub(crate) account: Option<String>,
    /// With [`Event::StartFailed`], which is not the session's end: the finding is why.
    pub(crate) fallback: Option<Fallback>,
    pub(crate) finding: Option<Finding>,
}

impl From<Finding> for Facts {
    fn from(finding: Finding) -> Self {
        Self {
            finding: Some(finding),
            ..Self::default()
        }
    }
}

/// What came of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Applied {
    Moved(SessionState),
    /// It does not fit the state; nothing changed.
    Ignored(Illegal),
    /// There is no such session.
    Missing,
}

impl SessionRow {
    fn read(row: &AnyRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: row::id(row, "id")?,
            provider: row::id(row, "provider")?,
            flow: row::text(row, "flow")?,
            user_id: row::text(row, "user_id")?,
            image_alias: row::text(row, "image_alias")?,
            state: row::word(row, "state", SessionState::from_id)?,
            created_at: row::time(row, "created_at")?,
            updated_at: row::time(row, "updated_at")?,
            deadline_at: row::maybe_time(row, "deadline_at")?,
            login_timeout: Duration::from_secs(row::count(row, "login_timeout_s")?),
            start_at_most: row::word(row, "start_at_most", StartKind::from_id)?,
            machine_id: row::maybe_id(row, "machine_id")?,
            image_digest: row::maybe_id(row, "image_digest")?,
            credential_id: row::id(row, "credential_id")?,
            captured_at: row::maybe_time(row, "captured_at")?,
            sealed_at: row::maybe_time(row, "sealed_at")?,
            account: row::maybe_text(row, "account")?,
            failure: row::maybe_json(row, "failure")?,
            confirm_account: row::int(row, "confirm_account")? != 0,
            owner_id: row::text(row, "owner_id")?,
            event_seq: row::count(row, "event_seq")?,
        })
    }

    /// Takes over what `event` brings, in the row's copy.
    fn take(&mut self, event: Event, facts: &Facts, now: Timestamp) {
        if let Some(given) = &facts.given {
            self.machine_id = Some(given.machine);
            self.image_digest = Some(given.image.clone());
        }
        if let Some(fallback) = facts.fallback {
            self.machine_id = None;
            self.image_digest = None;
            self.start_at_most = fallback.to;
            return;
        }
        if let Some(account) = &facts.account {
            self.account = Some(account.clone());
        }
        if let Some(finding) = &facts.finding {
            self.failure = Some(Verdict::of(finding.clone(), vec!["events".to_owned()]));
        }
        if matches!(event, Event::CredentialComplete | Event::AccountToConfirm) {
            self.captured_at = Some(now);
        }
        if event == Event::CredentialSealed {
            self.sealed_at = Some(now);
        }
    }
}

impl Store {
    /// Makes the row of a session and its first event, if its owner may have another one.
    pub(crate) async fn create_session(
        &self,
        new: &NewSession,
        now: Timestamp,
    ) -> Result<Created, StoreError> {
        let state = SessionState::Requested;
        let mut tx = self.begin().await?;
        let room = owner::room(&mut tx, new).await?;
        if room != Created::Yes {
            return Ok(room);
        }
        let credential = CredentialId::generate();
        sqlx::query(
            "INSERT INTO session (id, provider, flow, user_id, image_alias, state, revision, created_at, updated_at, \
             deadline_at, login_timeout_s, credential_id, start_at_most, event_seq, owner_id, organisation_id, \
             confirm_account) VALUES ($1, $2, $3, $4, $5, $6, 0, $7, $7, $8, $9, $10, $11, 1, $12, $13, $14)",
        )
        .bind(new.id.to_string())
        .bind(new.provider.as_str())
        .bind(&new.flow)
        .bind(&new.user_id)
        .bind(&new.image_alias)
        .bind(state.id())
        .bind(now.as_micros())
        .bind(self.deadlines.of(state, now, new.login_timeout).map(Timestamp::as_micros))
        .bind(row::signed(new.login_timeout.as_secs()))
        .bind(credential.to_string())
        .bind(new.start_at_most.id())
        .bind(&new.owner.id)
        .bind(&new.owner.organisation)
        .bind(i64::from(new.confirm_account))
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("insert a session"))?;
        owner::remember(&mut tx, credential, &new.owner).await?;
        event::insert(&mut tx, new.id, 1, now, &SessionEventKind::State { state }).await?;
        self.commit(tx, Some(new.id)).await?;
        Ok(Created::Yes)
    }

    /// The session's row.
    pub(crate) async fn session(&self, id: SessionId) -> Result<Option<SessionRow>, StoreError> {
        sqlx::query("SELECT * FROM session WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(self.pool())
            .await
            .map_err(StoreError::query("read a session"))?
            .map(|row| SessionRow::read(&row))
            .transpose()
    }

    /// Sessions of this scope, newest first: at most `limit`, older than `before`.
    pub(crate) async fn sessions(
        &self,
        scope: &Scope,
        before: Option<SessionId>,
        limit: u32,
    ) -> Result<Vec<SessionRow>, StoreError> {
        let (owner, organisation) = scope.columns();
        // UUIDv7: the order of ids is the order of creation. `g` comes after every hex digit.
        let before = before.map_or_else(|| "g".to_owned(), |id| id.to_string());
        sqlx::query(
            "SELECT * FROM session WHERE id < $1 AND ($3 = '' OR owner_id = $3) \
             AND ($4 = '' OR organisation_id = $4) ORDER BY id DESC LIMIT $2",
        )
        .bind(before)
        .bind(i64::from(limit))
        .bind(owner)
        .bind(organisation)
        .fetch_all(self.pool())
        .await
        .map_err(StoreError::query("list sessions"))?
        .iter()
        .map(SessionRow::read)
        .collect()
    }

    /// Sessions in `state`, oldest first.
    pub(crate) async fn sessions_in(
        &self,
        state: SessionState,
    ) -> Result<Vec<SessionRow>, StoreError> {
        sqlx::query("SELECT * FROM session WHERE state = $1 ORDER BY id")
            .bind(state.id())
            .fetch_all(self.pool())
            .await
            .map_err(StoreError::query("list the sessions of a state"))?
            .iter()
            .map(SessionRow::read)
            .collect()
    }

    /// Sessions whose deadline lies before `now`: of this host, of none yet, and of hosts whose lease ran out.
    pub(crate) async fn overdue(&self, now: Timestamp) -> Result<Vec<SessionRow>, StoreError> {
        let mut connection = self.connection().await?;
        let database_now = self.database_now(&mut connection).await?;
        let sql = "SELECT session.* FROM session LEFT JOIN machine ON machine.id = session.machine_id \
                   LEFT JOIN host ON host.id = machine.host_id WHERE session.deadline_at <= $1 \
                   AND (machine.host_id IS NULL OR machine.host_id = $2 OR host.lease_until < $3) ORDER BY session.id";
        sqlx::query(sql)
            .bind(now.as_micros())
            .bind(self.host.to_string())
            .bind(database_now.as_micros())
            .fetch_all(&mut *connection)
            .await
            .map_err(StoreError::query("list overdue sessions"))?
            .iter()
            .map(SessionRow::read)
            .collect()
    }

    /// Moves every deadline, and the time of every effect that waits, by so many microseconds. Where hosts share the
    /// database, only those of this one: no other clock jumped.
    pub(crate) async fn shift(&self, micros: i64) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        self.one_at_a_time(&mut tx).await?;
        for sql in [
            "UPDATE session SET deadline_at = deadline_at + $1 WHERE deadline_at IS NOT NULL AND ($3 = 0 OR machine_id IN \
             (SELECT id FROM machine WHERE host_id = $2))",
            "UPDATE effect SET not_before = not_before + $1 WHERE done_at IS NULL AND ($3 = 0 OR host_id = $2)",
        ] {
            sqlx::query(sql)
                .bind(micros)
                .bind(self.host.to_string())
                .bind(i64::from(self.is_shared()))
                .execute(&mut *tx)
                .await
                .map_err(StoreError::query("move deadlines"))?;
        }
        self.commit(tx, None).await
    }

    /// Ends a session whose VM, or what that needs, failed for this.
    ///
    /// # Errors
    /// As [`Store::apply_there`].
    pub(crate) async fn session_failed(
        &self,
        seen: &SessionRow,
        finding: Finding,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let facts = Facts::from(finding);
        self.apply_there(seen, Event::MachineFailed, &facts, now)
            .await
            .map(drop)
    }

    /// As [`Store::apply`], for what this host found out about a session's machine, or about its having none: a session that
    /// was given another one since it was `seen` is no concern of it.
    ///
    /// # Errors
    /// As [`Store::apply`], and [`StoreError::Fenced`].
    pub(crate) async fn apply_there(
        &self,
        seen: &SessionRow,
        event: Event,
        facts: &Facts,
        now: Timestamp,
    ) -> Result<Applied, StoreError> {
        let mut tx = self.begin().await?;
        self.fence(&mut tx).await?;
        match lock(&mut tx, seen.id).await? {
            Some(row) if row.machine_id == seen.machine_id => {
                self.apply_held(tx, row, event, facts, now).await
            }
            Some(SessionRow { state, .. }) => Ok(Applied::Ignored(Illegal { state, event })),
            None => Ok(Applied::Missing),
        }
    }

    /// Lets `event` happen to a session: state, facts, events and effects in one transaction.
    ///
    /// # Errors
    /// When the database fails: then nothing changed.
    pub(crate) async fn apply(
        &self,
        id: SessionId,
        event: Event,
        facts: &Facts,
        now: Timestamp,
    ) -> Result<Applied, StoreError> {
        let mut tx = self.begin().await?;
        match lock(&mut tx, id).await? {
            Some(row) => self.apply_held(tx, row, event, facts, now).await,
            None => Ok(Applied::Missing),
        }
    }

    /// Ends the transaction that holds `row`.
    async fn apply_held(
        &self,
        mut tx: Transaction<'static, Any>,
        mut row: SessionRow,
        event: Event,
        facts: &Facts,
        now: Timestamp,
    ) -> Result<Applied, StoreError> {
        let applied = self.step(&mut tx, &mut row, event, facts, now).await?;
        if matches!(applied, Applied::Moved(_)) {
            write(&mut tx, &row).await?;
            self.commit(tx, Some(row.id)).await?;
        }
        Ok(applied)
    }

    /// Adds events to a session that has not ended.
    pub(crate) async fn add_events(
        &self,
        id: SessionId,
        kinds: &[SessionEventKind],
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        let Some(mut row) = lock(&mut tx, id).await? else {
            return Ok(());
        };
        if row.state.is_terminal() || kinds.is_empty() {
            return Ok(());
        }
        add(&mut tx, &mut row, kinds, now).await?;
        write(&mut tx, &row).await?;
        self.commit(tx, Some(id)).await
    }

    /// Puts a better founded verdict in the place of a failed session's.
    pub(crate) async fn set_verdict(
        &self,
        id: SessionId,
        verdict: &Verdict,
    ) -> Result<(), StoreError> {
        sqlx::query("UPDATE session SET failure = $2, revision = revision + 1 WHERE id = $1 AND failure IS NOT NULL")
            .bind(id.to_string())
            .bind(row::to_json("failure", verdict)?)
            .execute(self.writer())
            .await
            .map(|_| ())
            .map_err(StoreError::query("write a session's verdict"))
    }

    /// Removes sessions that ended before `before` and leaves their ids. Returns how many.
    pub(crate) async fn forget_sessions(
        &self,
        before: Timestamp,
        now: Timestamp,
    ) -> Result<u64, StoreError> {
        let mut tx = self.begin().await?;
        let failed = || StoreError::query("forget old sessions");
        self.one_at_a_time(&mut tx).await?;
        sqlx::query(
            "INSERT INTO session_gone (id, gone_at, owner_id, organisation_id) \
             SELECT id, $2, owner_id, organisation_id FROM session \
             WHERE deadline_at IS NULL AND updated_at < $1",
        )
        .bind(before.as_micros())
        .bind(now.as_micros())
        .execute(&mut *tx)
        .await
        .map_err(failed())?;
        for sql in [
            // Those whose credential was never sealed: the others are still somebody's.
            "DELETE FROM credential_owner WHERE credential_id IN (SELECT credential_id FROM session \
             WHERE sealed_at IS NULL AND id IN (SELECT id FROM session_gone))",
            "DELETE FROM effect WHERE session_id IN (SELECT id FROM session_gone)",
            "DELETE FROM session_event WHERE session_id IN (SELECT id FROM session_gone)",
        ] {
            sqlx::query(sql).execute(&mut *tx).await.map_err(failed())?;
        }
        let removed = sqlx::query("DELETE FROM session WHERE id IN (SELECT id FROM session_gone)")
            .execute(&mut *tx)
            .await
            .map_err(failed())?
            .rows_affected();
        self.commit(tx, None).await?;
        Ok(removed)
    }

    /// Whether retention removed this session.
    pub(crate) async fn was_forgotten(&self, id: SessionId) -> Result<bool, StoreError> {
        sqlx::query("SELECT id FROM session_gone WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(self.pool())
            .await
            .map(|row| row.is_some())
            .map_err(StoreError::query("look for a forgotten session"))
    }

    /// `event` in the row's copy, with its events and effects in the transaction. The caller writes the row.
    pub(super) async fn step(
        &self,
        tx: &mut Transaction<'static, Any>,
        row: &mut SessionRow,
        event: Event,
        facts: &Facts,
        now: Timestamp,
    ) -> Result<Applied, StoreError> {
        let current = Current {
            state: row.state,
            deadline_at: row.deadline_at,
        };
        let event = if event == Event::CredentialComplete && row.confirm_account {
            Event::AccountToConfirm
        } else {
            event
        };
        // As it was: a start that failed takes the machine away, and what follows is to be done where that is.
        let machine = row.machine_id;
        let transition = match state::next(current, event, now) {
            Ok(transition) => transition,
            Err(illegal) => return Ok(Applied::Ignored(illegal)),
        };
        row.take(event, facts, now);
        row.state = transition.state;
        row.deadline_at = self.deadlines.of(row.state, now, row.login_timeout);
        let mut kinds = Vec::new();
        if matches!(event, Event::CredentialComplete | Event::AccountToConfirm) {
            kinds.push(SessionEventKind::Captured {
                account: row.account.clone(),
            });
        }
        if let Some(given) = &facts.given {
            kinds.push(SessionEventKind::Claimed {
                start: given.start,
                snapshot_id: given.snapshot.clone(),
                why: given.why,
            });
        }
        if let Some(finding) = facts.finding.clone() {
            kinds.push(match facts.fallback {
                Some(Fallback { from, to }) => SessionEventKind::FellBack { from, to, finding },
                None => SessionEventKind::Failure { finding },
            });
        }
        kinds.push(SessionEventKind::State { state: row.state });
        add(tx, row, &kinds, now).await?;
        for effect in transition.effects {
            effect::insert(tx, row.id, *effect, machine, self.host, now).await?;
        }
        if event == Event::CredentialSealed {
            host::sealed_at(tx, self.host, row).await?;
        }
        Ok(Applied::Moved(row.state))
    }
}

/// The row, held until the transaction ends: whoever else wants to change it waits, and then sees this change.
pub(super) async fn lock(
    tx: &mut Transaction<'static, Any>,
    id: SessionId,
) -> Result<Option<SessionRow>, StoreError> {
    sqlx::query("UPDATE session SET revision = revision + 1 WHERE id = $1 RETURNING *")
        .bind(id.to_string())
        .fetch_optional(&mut **tx)
        .await
        .map_err(StoreError::query("hold a session's row"))?
        .map(|row| SessionRow::read(&row))
        .transpose()
}

/// Events with the next numbers.
pub(super) async fn add(
    tx: &mut Transaction<'static, Any>,
    row: &mut SessionRow,
    kinds: &[SessionEventKind],
    now: Timestamp,
) -> Result<(), StoreError> {
    for kind in kinds {
        let essential = matches!(
            kind,
            SessionEventKind::State { .. }
                | SessionEventKind::Failure { .. }
                | SessionEventKind::FellBack { .. }
                | SessionEventKind::Captured { .. }
        );
        if row.event_seq >= EVENTS_LIMIT && !essential {
            continue;
        }
        row.event_seq += 1;
        event::insert(tx, row.id, row.event_seq, now, kind).await?;
    }
    row.updated_at = now;
    Ok(())
}

/// Writes what can change. The row is held.
pub(super) async fn write(
    tx: &mut Transaction<'static, Any>,
    row: &SessionRow,
) -> Result<(), StoreError> {
    let failure = row
        .failure
        .as_ref()
        .map(|f| row::to_json("failure", f))
        .transpose()?;
    sqlx::query(
        "UPDATE session SET state = $2, updated_at = $3, deadline_at = $4, machine_id = $5, image_digest = $6, \
         captured_at = $7, sealed_at = $8, account = $9, failure = $10, event_seq = $11, start_at_most = $12 WHERE id = $1",
    )
    .bind(row.id.to_string())
    .bind(row.state.id())
    .bind(row.updated_at.as_micros())
    .bind(row.deadline_at.map(Timestamp::as_micros))
    .bind(row.machine_id.map(|id| id.to_string()))
    .bind(
        row.image_digest
            .as_ref()
            .map(|digest| digest.as_str().to_owned()),
    )
    .bind(row.captured_at.map(Timestamp::as_micros))
    .bind(row.sealed_at.map(Timestamp::as_micros))
    .bind(row.account.clone())
    .bind(failure)
    .bind(row::signed(row.event_seq))
    .bind(row.start_at_most.id())
    .execute(&mut **tx)
    .await
    .map(|_| ())
    .map_err(StoreError::query("write a session"))
}

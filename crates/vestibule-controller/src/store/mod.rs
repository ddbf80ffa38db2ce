//! The one truth about sessions and machines: rows in SQLite or PostgreSQL.
//!
//! SQL is written once for both (`$1` placeholders, TEXT and BIGINT only). A transition, its events and its effects are
//! one transaction that holds the row from its beginning. After a commit, [`Signals`] wakes whoever waits.
mod effect;
mod event;
mod host;
mod identity;
mod login;
mod machine;
mod owner;
mod pace;
mod people;
mod pool;
mod row;
mod session;
mod signals;
#[cfg(test)]
pub(crate) mod simulated;

pub(crate) use effect::DueEffect;
pub(crate) use host::{Forgotten, HostRow, OwnHost};
pub(crate) use identity::{Known, Newcomers};
pub(crate) use machine::{Ingested, MachineRow, Reported};
pub(crate) use owner::{Created, Quota, Scope};
pub(crate) use people::{NewToken, Removed};
pub(crate) use session::{Applied, Facts, NewSession, SessionRow};
pub(crate) use signals::{Listener, Signals};

use crate::{notices::CHANNEL, state::Deadlines};
use camino::Utf8Path;
use sqlx::{Any, Connection as _, Executor as _, Transaction, any::AnyPoolOptions};
use std::{
    os::unix::fs::OpenOptionsExt as _,
    sync::atomic::AtomicI64,
    time::{Duration, Instant},
};
use vestibule_api::ids::{HostId, SessionId};

/// Why the database did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("open the database `{what}`")]
    Open {
        what: String,
        #[source]
        err: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{what}")]
    Query {
        what: &'static str,
        #[source]
        err: sqlx::Error,
    },
    #[error("act for a host whose lease another controller has taken")]
    Fenced,
    #[error("understand column `{column}` of the database")]
    Column {
        column: &'static str,
        #[source]
        err: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What keeps a database from doing anything now, and may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hindrance {
    /// It does not answer in time: another program holds it, or every connection is in use.
    Busy,
    /// Its file system is full.
    DiskFull,
    /// No connection to its server can be had.
    Gone,
    /// It takes no changes: a standby, or a file system that is read-only.
    ReadOnly,
}

impl Hindrance {
    /// What is the matter, and what to do about it.
    pub(crate) const fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Busy => (
                "the database is busy: another program holds it, or all its connections are in use",
                "try again; the operator finds who holds it with `lsof vestibule.db`, or in PostgreSQL's pg_stat_activity",
            ),
            Self::DiskFull => (
                "the database's disk is full",
                "make room on the file system of the home directory, or of the PostgreSQL server, then try again",
            ),
            Self::Gone => (
                "the database can't be reached: its server does not answer, or refuses the connection",
                "try again; the operator starts the PostgreSQL server, or corrects `database` in the configuration",
            ),
            Self::ReadOnly => (
                "the database takes no changes",
                "let `database` name the primary server and not a standby, or make its file system writable",
            ),
        }
    }
}

impl StoreError {
    /// The hindrance behind this error, if it is one.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "sqlx's enum is not exhaustive"
    )]
    pub(crate) fn hindrance(&self) -> Option<Hindrance> {
        let Self::Query { err, .. } = self else {
            return None;
        };
        match err {
            sqlx::Error::PoolTimedOut => Some(Hindrance::Busy),
            sqlx::Error::Io(_) | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => {
                Some(Hindrance::Gone)
            }
            // Result codes of SQLite (sqlite.org/rescode.html), of which the low byte is the primary one; SQLSTATE of PostgreSQL.
            sqlx::Error::Database(err) => match err.code().as_deref() {
                // Lock not available, too many connections, serialization failure, deadlock.
                Some("55P03" | "53300" | "40001" | "40P01") => Some(Hindrance::Busy),
                Some("53100") => Some(Hindrance::DiskFull),
                // Shut down, crashed, starting; a connection that broke; a login or a database that is refused.
                Some(
                    "57P01" | "57P02" | "57P03" | "08000" | "08001" | "08003" | "08004" | "08006"
                    | "28000" | "28P01" | "3D000",
                ) => Some(Hindrance::Gone),
                Some("25006") => Some(Hindrance::ReadOnly),
                Some(code) => match code.parse::<u32>().map(|code| code & 0xff) {
                    Ok(5 | 6) => Some(Hindrance::Busy),
                    Ok(8) => Some(Hindrance::ReadOnly),
                    Ok(13) => Some(Hindrance::DiskFull),
                    Ok(_) | Err(_) => None,
                },
                None => None,
            },
            // Of an enum that is not exhaustive.
            _ => None,
        }
    }

    fn query(what: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |err| Self::Query { what, err }
    }
}

/// Which database it is. What differs between them is asked of this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Sqlite,
    Postgres,
}

/// The database.
#[derive(Debug)]
pub(crate) struct Store {
    pool: sqlx::AnyPool,
    /// Where changes are made. SQLite has one writer at a time: those who wait for it here get it in their order and at once,
    /// those who wait in SQLite itself look again after longer and longer pauses.
    writer: sqlx::AnyPool,
    kind: Kind,
    host: HostId,
    /// Of the host's lease, as this controller took it; 0: it took none.
    generation: AtomicI64,
    deadlines: Deadlines,
    pub(crate) signals: Signals,
    pub(crate) pace: pace::Pace,
    #[cfg(test)]
    simulated: Option<simulated::Simulated>,
}

impl Store {
    /// Opens the SQLite file `vestibule.db` in `home`, or the PostgreSQL database at `url`, and brings its schema up to date.
    ///
    /// # Errors
    /// When it can't be opened or migrated.
    pub(crate) async fn open(
        url: &str,
        home: &Utf8Path,
        deadlines: Deadlines,
    ) -> Result<Self, StoreError> {
        sqlx::any::install_default_drivers();
        let path = home.join("vestibule.db");
        let sqlite = url == "sqlite";
        let failed = |err: Box<dyn std::error::Error + Send + Sync>| StoreError::Open {
            // A PostgreSQL URL may hold a password.
            what: if sqlite {
                path.to_string()
            } else {
                "postgres".to_owned()
            },
            err,
        };
        let host = host::own_id(home).map_err(|err| failed(err.into()))?;
        let (target, connections) = if sqlite {
            create_private(&path).map_err(|err| failed(err.into()))?;
            (format!("sqlite://{path}"), 4)
        } else {
            (url.to_owned(), 16)
        };
        let connect = |connections| {
            AnyPoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(Duration::from_secs(10))
                .after_connect(|connection, _| Box::pin(prepare(connection)))
                // A transaction that the database ended by itself, as on a full disk, leaves a connection that counts as being
                // in one for ever, and begins no other.
                .before_acquire(|connection, _| {
                    let usable = !connection.is_in_transaction();
                    Box::pin(std::future::ready(Ok(usable)))
                })
                .connect(&target)
        };
        let pool = connect(connections)
            .await
            .map_err(|err| failed(err.into()))?;
        sqlx::migrate!()
            .run(&pool)
            .await
            .map_err(|err| failed(err.into()))?;
        let writer = if sqlite {
            connect(1).await.map_err(|err| failed(err.into()))?
        } else {
            pool.clone()
        };
        Ok(Self {
            pool,
            writer,
            kind: if sqlite { Kind::Sqlite } else { Kind::Postgres },
            host,
            generation: AtomicI64::new(0),
            deadlines,
            signals: Signals::new(),
            pace: pace::Pace::default(),
            #[cfg(test)]
            simulated: None,
        })
    }

    /// Connections to the database, to read.
    fn pool(&self) -> &sqlx::AnyPool {
        self.way(&self.pool)
    }

    /// Connections to the database, to change it.
    fn writer(&self) -> &sqlx::AnyPool {
        self.way(&self.writer)
    }

    /// Those connections, unless a simulation has cut the way to the database.
    fn way<'a>(&'a self, pool: &'a sqlx::AnyPool) -> &'a sqlx::AnyPool {
        #[cfg(test)]
        if let Some(simulated) = &self.simulated {
            return simulated.pool(pool);
        }
        pool
    }

    /// Asks the database for a row.
    pub(crate) async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1")
            .execute(self.pool())
            .await
            .map(|_| ())
            .map_err(StoreError::query("reach the database"))
    }

    /// Waits for what is under way and closes every connection.
    pub(crate) async fn close(&self) {
        self.writer.close().await;
        self.pool.close().await;
    }

    async fn connection(&self) -> Result<sqlx::pool::PoolConnection<Any>, StoreError> {
        self.pool()
            .acquire()
            .await
            .map_err(StoreError::query("reach the database"))
    }

    async fn begin(&self) -> Result<Transaction<'static, Any>, StoreError> {
        let begin = match self.kind {
            // A transaction that writes must say so at its beginning, or it can fail in its middle.
            Kind::Sqlite => "BEGIN IMMEDIATE",
            Kind::Postgres => "BEGIN",
        };
        self.writer()
            .begin_with(begin)
            .await
            .map_err(StoreError::query("begin a transaction"))
    }

    /// Lets transactions that change many rows go one after the other: they hold them in different orders, and two would wait
    /// for each other. Those that hold a machine's row and its session's do so in this order, and need not wait here.
    async fn one_at_a_time(&self, tx: &mut Transaction<'static, Any>) -> Result<(), StoreError> {
        if self.kind == Kind::Sqlite {
            return Ok(());
        }
        // A table that nobody else writes to.
        sqlx::query("LOCK TABLE session_gone IN SHARE ROW EXCLUSIVE MODE")
            .execute(&mut **tx)
            .await
            .map(drop)
            .map_err(StoreError::query(
                "wait for another transaction on many rows",
            ))
    }

    /// What the other controllers hear when the transaction is committed.
    async fn tell(&self, tx: &mut Transaction<'static, Any>, what: &str) -> Result<(), StoreError> {
        if self.kind == Kind::Sqlite {
            return Ok(());
        }
        sqlx::query("SELECT pg_notify($1, $2)")
            .bind(CHANNEL)
            .bind(format!("{} {what}", self.host))
            .execute(&mut **tx)
            .await
            .map(drop)
            .map_err(StoreError::query("tell the other controllers"))
    }

    /// Commits, then wakes those who wait for `session` and for work.
    async fn commit(
        &self,
        tx: Transaction<'static, Any>,
        session: Option<SessionId>,
    ) -> Result<(), StoreError> {
        self.commit_words(tx, session).await?;
        self.signals.wake();
        Ok(())
    }

    /// Commits, then wakes those who wait for `session`: reconcilers may have nothing to do.
    async fn commit_words(
        &self,
        mut tx: Transaction<'static, Any>,
        session: Option<SessionId>,
    ) -> Result<(), StoreError> {
        if let Some(session) = session {
            self.tell(&mut tx, &format!("session {session}")).await?;
        }
        let begun = Instant::now();
        tx.commit()
            .await
            .map_err(StoreError::query("commit a transaction"))?;
        self.pace.took(begun.elapsed());
        #[cfg(test)]
        if let Some(simulated) = &self.simulated {
            simulated.heard()?;
        }
        if let Some(session) = session {
            self.signals.changed(session);
        }
        Ok(())
    }
}

/// The file with mode 0600 before SQLite would make it with another; its journal files inherit the mode.
fn create_private(path: &Utf8Path) -> std::io::Result<()> {
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map(drop)
}

async fn prepare(connection: &mut sqlx::AnyConnection) -> Result<(), sqlx::Error> {
    if connection.backend_name() == "SQLite" {
        // `synchronous` stays FULL: a state that was told to somebody survives the host's crash.
        for pragma in [
            "PRAGMA journal_mode = WAL",
            "PRAGMA busy_timeout = 10000",
            "PRAGMA foreign_keys = ON",
        ] {
            connection.execute(pragma).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

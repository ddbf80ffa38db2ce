//! What PID 1 says of its units and jobs (org.freedesktop.systemd1(5)), over its private socket: no D-Bus daemon is needed,
//! and it sends every change unasked.
use crate::{agent::Agent, readiness::Condition};
use futures_util::StreamExt as _;
use serde::{Deserialize, de::DeserializeOwned};
use std::os::unix::net::UnixStream;
use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};
use tracing::warn;
use vestibule_api::{
    agent::{AgentEvent, JobReport, UnitReport},
    error::Chain,
};
use zbus::{
    Connection, MessageStream, OwnedObjectPath, OwnedVariant,
    message::Type,
    zvariant::{DynamicType, Type as Signature},
};

const SOCKET: &str = "/run/systemd/private";
const MANAGER: &str = "/org/freedesktop/systemd1";
const INTERFACE: &str = "org.freedesktop.systemd1.Manager";
/// PID 1 answers in milliseconds, or it is stuck.
const PATIENCE: Duration = Duration::from_secs(10);
/// Many units change at once during a boot; they are looked at together.
const SETTLE: Duration = Duration::from_millis(100);
/// Between two attempts to reach a PID 1 that does not answer.
const PAUSE: Duration = Duration::from_secs(2);

/// Why PID 1 could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SystemdError {
    #[error("connect to `{SOCKET}`")]
    Connect(#[source] std::io::Error),
    #[error("{what}: ask systemd")]
    Call {
        what: &'static str,
        #[source]
        err: zbus::Error,
    },
    #[error("{0}: systemd did not answer within {PATIENCE:?}")]
    Silent(&'static str),
}

/// A connection to PID 1.
#[derive(Clone, Debug)]
pub(crate) struct Systemd(Connection);

/// A row of `ListUnits`.
#[derive(Debug, Deserialize, Signature)]
struct UnitRow {
    name: String,
    _description: String,
    load: String,
    active: String,
    sub: String,
    _following: String,
    path: OwnedObjectPath,
    _job: u32,
    _job_kind: String,
    _job_path: OwnedObjectPath,
}

/// A row of `ListJobs`.
#[derive(Debug, Deserialize, Signature)]
struct JobRow {
    id: u32,
    unit: String,
    kind: String,
    state: String,
    _path: OwnedObjectPath,
    _unit_path: OwnedObjectPath,
}

impl Systemd {
    /// Connects. Only root may.
    ///
    /// # Errors
    /// When this system has no systemd, or it does not answer.
    pub(crate) async fn connect() -> Result<Self, SystemdError> {
        let stream = UnixStream::connect(SOCKET).map_err(SystemdError::Connect)?;
        let build = zbus::connection::Builder::unix_stream(stream).p2p().build();
        within("connect", build).await.map(Self)
    }

    /// `running`, `starting`, `degraded`, …
    pub(crate) async fn state(&self) -> Result<String, SystemdError> {
        let properties = "org.freedesktop.DBus.Properties";
        let value: OwnedVariant = self
            .call(
                "read the system's state",
                MANAGER,
                properties,
                "Get",
                &(INTERFACE, "SystemState"),
            )
            .await?;
        Ok(text(&value))
    }

    /// Every service, and whatever else has failed or is on its way.
    pub(crate) async fn units(&self) -> Result<Vec<UnitReport>, SystemdError> {
        let rows: Vec<UnitRow> = self
            .call("list the units", MANAGER, INTERFACE, "ListUnits", &())
            .await?;
        let told = |row: &UnitRow| {
            let loaded = row.load != "not-found" || row.active != "inactive";
            loaded
                && (row.name.ends_with(".service")
                    || !matches!(row.active.as_str(), "active" | "inactive"))
        };
        self.reports(rows.into_iter().filter(told).collect()).await
    }

    /// These units, in this order, loaded or not.
    pub(crate) async fn named(&self, names: &[String]) -> Result<Vec<UnitReport>, SystemdError> {
        let rows = self
            .call(
                "list the required units",
                MANAGER,
                INTERFACE,
                "ListUnitsByNames",
                &names,
            )
            .await?;
        self.reports(rows).await
    }

    async fn reports(&self, rows: Vec<UnitRow>) -> Result<Vec<UnitReport>, SystemdError> {
        let mut reports = Vec::with_capacity(rows.len());
        for row in rows {
            // A service that was never started has nothing to add.
            let service =
                row.name.ends_with(".service") && row.active != "inactive" && row.load == "loaded";
            let facts = if service {
                self.service(&row.path).await?
            } else {
                BTreeMap::new()
            };
            let number = |name: &str| facts.get(name).and_then(|value| value.try_to_owned().ok());
            reports.push(UnitReport {
                result: facts.get("Result").map(text).unwrap_or_default(),
                main_exit: number("ExecMainStatus")
                    .and_then(|value| i32::try_from(value).ok())
                    .filter(|_| row.active == "failed"),
                restarts: number("NRestarts")
                    .and_then(|value| u32::try_from(value).ok())
                    .unwrap_or(0),
                name: row.name,
                load: row.load,
                active: row.active,
                sub: row.sub,
            });
        }
        Ok(reports)
    }

    async fn service(
        &self,
        path: &OwnedObjectPath,
    ) -> Result<BTreeMap<String, OwnedVariant>, SystemdError> {
        let (properties, interface) = (
            "org.freedesktop.DBus.Properties",
            "org.freedesktop.systemd1.Service",
        );
        let mut facts = BTreeMap::new();
        for name in ["Result", "ExecMainStatus", "NRestarts"] {
            let value = self
                .call(
                    "read a service",
                    path.as_str(),
                    properties,
                    "Get",
                    &(interface, name),
                )
                .await?;
            facts.insert(name.to_owned(), value);
        }
        Ok(facts)
    }

    /// The job queue, each job with the units that it waits for.
    pub(crate) async fn jobs(&self) -> Result<Vec<JobReport>, SystemdError> {
        let rows: Vec<JobRow> = self
            .call("list the jobs", MANAGER, INTERFACE, "ListJobs", &())
            .await?;
        let mut jobs = Vec::with_capacity(rows.len());
        for row in rows {
            let before = self
                .call(
                    "ask what a job waits for",
                    MANAGER,
                    INTERFACE,
                    "GetJobBefore",
                    &row.id,
                )
                .await;
            // The job may have ended meanwhile.
            let waits_for = before
                .map(|jobs: Vec<JobRow>| jobs.into_iter().map(|job| job.unit).collect())
                .unwrap_or_default();
            jobs.push(JobReport {
                id: row.id,
                unit: row.unit,
                kind: row.kind,
                state: row.state,
                waits_for,
            });
        }
        Ok(jobs)
    }

    async fn call<B, R>(
        &self,
        what: &'static str,
        path: &str,
        interface: &str,
        method: &str,
        body: &B,
    ) -> Result<R, SystemdError>
    where
        B: serde::Serialize + DynamicType,
        R: DeserializeOwned + Signature,
    {
        let reply = within(
            what,
            self.0
                .call_method(None::<&str>, path, Some(interface), method, body),
        )
        .await?;
        reply
            .body()
            .deserialize()
            .map_err(|err| SystemdError::Call { what, err })
    }
}

async fn within<T>(
    what: &'static str,
    work: impl Future<Output = Result<T, zbus::Error>>,
) -> Result<T, SystemdError> {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(result) => result.map_err(|err| SystemdError::Call { what, err }),
        Err(_) => Err(SystemdError::Silent(what)),
    }
}

fn text(value: &OwnedVariant) -> String {
    value.downcast_ref::<&str>().unwrap_or_default().to_owned()
}

impl Agent {
    /// Keeps the condition [`Condition::Units`] true to what PID 1 says, for as long as the agent runs.
    pub(crate) async fn watch_units(self: Arc<Self>) {
        let required = self.guest.image.required_units.clone();
        if required.is_empty() {
            return;
        }
        loop {
            if let Err(err) = self.follow_units(&required).await {
                warn!(error = %Chain(&err), "cannot follow the units");
                self.readiness
                    .set(Condition::Units, vec![Chain(&err).to_string()]);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn follow_units(&self, required: &[String]) -> Result<(), SystemdError> {
        let systemd = Systemd::connect().await?;
        let mut signals = MessageStream::from(&systemd.0).filter(|message| {
            std::future::ready(
                message
                    .as_ref()
                    .map_or(true, |message| message.message_type() == Type::Signal),
            )
        });
        let mut last = BTreeMap::new();
        loop {
            let units = systemd.named(required).await?;
            let waiting = units.iter().filter(|unit| unit.active != "active");
            self.readiness
                .set(Condition::Units, waiting.map(describe).collect());
            for unit in units {
                let before = last.insert(unit.name.clone(), unit.active.clone());
                let lost = before.as_deref() == Some("active") && unit.active != "active";
                if (unit.active == "failed" && before.as_deref() != Some("failed")) || lost {
                    self.events.push(AgentEvent::Unit { unit });
                }
            }
            // The first change, and then all that come with it.
            if signals.next().await.is_none() {
                return Ok(());
            }
            tokio::time::sleep(SETTLE).await;
            while let Some(Some(_)) = futures_util::FutureExt::now_or_never(signals.next()) {}
        }
    }
}

fn describe(unit: &UnitReport) -> String {
    let UnitReport {
        name,
        load,
        active,
        sub,
        ..
    } = unit;
    if load == "loaded" {
        format!("{name} is {active} ({sub})")
    } else {
        format!("{name} is {load}")
    }
}

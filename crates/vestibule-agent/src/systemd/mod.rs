//! What PID 1 says of its units and jobs (org.freedesktop.systemd1(5)), over its private socket: no D-Bus daemon is needed,
//! and it sends every change unasked.
mod bus;
mod waits;
mod wire;

pub(crate) use bus::BusError;

use crate::{agent::Agent, readiness::Condition};
use bus::{Bus, Method};
use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};
use tracing::warn;
use vestibule_api::{
    agent::{AgentEvent, JobReport, UnitReport},
    error::Chain,
    time::Timestamp,
};
use waits::Waits;
use wire::{Malformed, Reader, Value, Writer};

const SOCKET: &str = "/run/systemd/private";
const MANAGER: &str = "/org/freedesktop/systemd1";
const INTERFACE: &str = "org.freedesktop.systemd1.Manager";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
/// Many units change at once during a boot; they are looked at together.
const SETTLE: Duration = Duration::from_millis(100);
/// Between two attempts to reach a PID 1 that does not answer.
const PAUSE: Duration = Duration::from_secs(2);

const GET: Method = Method {
    what: "read a property",
    interface: "org.freedesktop.DBus.Properties",
    name: "Get",
    takes: "ss",
    gives: "v",
};
const LIST_UNITS: Method = Method {
    what: "list the units",
    interface: INTERFACE,
    name: "ListUnits",
    takes: "",
    gives: "a(ssssssouso)",
};
const LIST_NAMED: Method = Method {
    what: "list the required units",
    interface: INTERFACE,
    name: "ListUnitsByNames",
    takes: "as",
    gives: "a(ssssssouso)",
};
const START: Method = Method {
    what: "start a unit",
    interface: INTERFACE,
    name: "StartUnit",
    takes: "ss",
    gives: "o",
};
const STOP: Method = Method {
    what: "stop a unit",
    name: "StopUnit",
    ..START
};
const RESTART: Method = Method {
    what: "restart a unit",
    name: "RestartUnit",
    ..START
};
const LIST_JOBS: Method = Method {
    what: "list the jobs",
    interface: INTERFACE,
    name: "ListJobs",
    takes: "",
    gives: "a(usssoo)",
};
const JOB_BEFORE: Method = Method {
    what: "ask what a job waits for",
    interface: INTERFACE,
    name: "GetJobBefore",
    takes: "u",
    gives: "a(usssoo)",
};

/// A connection to PID 1.
#[derive(Debug)]
pub(crate) struct Systemd(Bus);

/// A row of `ListUnits`.
struct UnitRow {
    name: String,
    load: String,
    active: String,
    sub: String,
    path: String,
}

fn unit_row(reader: &mut Reader<'_>) -> Result<UnitRow, Malformed> {
    let (name, _description) = (reader.string()?, reader.string()?);
    let (load, active, sub) = (reader.string()?, reader.string()?, reader.string()?);
    let (_following, path) = (reader.string()?, reader.string()?);
    let (_job, _kind, _job_path) = (reader.u32()?, reader.string()?, reader.string()?);
    Ok(UnitRow {
        name,
        load,
        active,
        sub,
        path,
    })
}

/// A row of `ListJobs`.
fn job_row(reader: &mut Reader<'_>) -> Result<JobReport, Malformed> {
    let (id, unit, kind, state) = (
        reader.u32()?,
        reader.string()?,
        reader.string()?,
        reader.string()?,
    );
    let (_path, _unit_path) = (reader.string()?, reader.string()?);
    Ok(JobReport {
        id,
        unit,
        kind,
        state,
        waits_for: Vec::new(),
    })
}

impl Systemd {
    /// Connects. Only root may.
    ///
    /// # Errors
    /// When this system has no systemd, or it does not answer.
    pub(crate) async fn connect() -> Result<Self, BusError> {
        Bus::connect(Path::new(SOCKET)).await.map(Self)
    }

    /// `running`, `starting`, `degraded`, …
    pub(crate) async fn state(&mut self) -> Result<String, BusError> {
        Ok(self
            .property(MANAGER, INTERFACE, "SystemState")
            .await?
            .text()
            .to_owned())
    }

    /// Every service, and whatever else has failed or is on its way.
    pub(crate) async fn units(&mut self) -> Result<Vec<UnitReport>, BusError> {
        let rows = self
            .0
            .call(LIST_UNITS, MANAGER, &Writer::default(), |reader| {
                reader.structs(unit_row)
            })
            .await?;
        let told = |row: &UnitRow| {
            let loaded = row.load != "not-found" || row.active != "inactive";
            loaded
                && (row.name.ends_with(".service")
                    || !matches!(row.active.as_str(), "active" | "inactive"))
        };
        self.reports(rows.into_iter().filter(told)).await
    }

    /// These units, loaded or not.
    pub(crate) async fn named(&mut self, names: &[String]) -> Result<Vec<UnitReport>, BusError> {
        let mut arguments = Writer::default();
        arguments.strings(names);
        let rows = self
            .0
            .call(LIST_NAMED, MANAGER, &arguments, |reader| {
                reader.structs(unit_row)
            })
            .await?;
        self.reports(rows.into_iter()).await
    }

    async fn reports(
        &mut self,
        rows: impl Iterator<Item = UnitRow>,
    ) -> Result<Vec<UnitReport>, BusError> {
        let mut reports = Vec::new();
        for UnitRow {
            name,
            load,
            active,
            sub,
            path,
        } in rows
        {
            let mut report = UnitReport {
                name,
                load,
                active,
                sub,
                result: String::new(),
                main_exit: None,
                restarts: 0,
            };
            // A service that was never started has nothing to add.
            if report.name.ends_with(".service")
                && report.active != "inactive"
                && report.load == "loaded"
            {
                report.result = self
                    .property(&path, SERVICE, "Result")
                    .await?
                    .text()
                    .to_owned();
                report.restarts = self
                    .property(&path, SERVICE, "NRestarts")
                    .await?
                    .number()
                    .unwrap_or(0);
                if report.active == "failed" {
                    report.main_exit = self
                        .property(&path, SERVICE, "ExecMainStatus")
                        .await?
                        .number();
                }
            }
            reports.push(report);
        }
        // PID 1 lists them in the order of its hash table.
        reports.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(reports)
    }

    async fn property(
        &mut self,
        path: &str,
        interface: &str,
        name: &str,
    ) -> Result<Value, BusError> {
        let mut arguments = Writer::default();
        arguments.string(interface);
        arguments.string(name);
        self.0
            .call(GET, path, &arguments, |reader| reader.variant())
            .await
    }

    /// Asks for the unit to be started; the job's end is not waited for.
    pub(crate) async fn start(&mut self, unit: &str) -> Result<(), BusError> {
        self.job(START, unit).await
    }

    /// As [`Systemd::start`].
    pub(crate) async fn stop(&mut self, unit: &str) -> Result<(), BusError> {
        self.job(STOP, unit).await
    }

    /// As [`Systemd::start`].
    pub(crate) async fn restart(&mut self, unit: &str) -> Result<(), BusError> {
        self.job(RESTART, unit).await
    }

    async fn job(&mut self, method: Method, unit: &str) -> Result<(), BusError> {
        let mut arguments = Writer::default();
        arguments.string(unit);
        arguments.string("replace");
        let job = self
            .0
            .call(method, MANAGER, &arguments, |reader| reader.string());
        job.await.map(drop)
    }

    /// The job queue, each job with the units that it waits for.
    pub(crate) async fn jobs(&mut self) -> Result<Vec<JobReport>, BusError> {
        self.jobs_of(|_| true).await
    }

    /// The jobs of the units that are meant, each with the units that it waits for: a question to PID 1 for each.
    async fn jobs_of(&mut self, meant: impl Fn(&str) -> bool) -> Result<Vec<JobReport>, BusError> {
        let mut jobs = self
            .0
            .call(LIST_JOBS, MANAGER, &Writer::default(), |reader| {
                reader.structs(job_row)
            })
            .await?;
        jobs.retain(|job| meant(&job.unit));
        for job in &mut jobs {
            let mut arguments = Writer::default();
            arguments.u32(job.id);
            match self
                .0
                .call(JOB_BEFORE, MANAGER, &arguments, |reader| {
                    reader.structs(job_row)
                })
                .await
            {
                Ok(before) => job.waits_for = before.into_iter().map(|job| job.unit).collect(),
                // It has ended meanwhile.
                Err(BusError::Answer { .. }) => {}
                Err(err) => return Err(err),
            }
        }
        Ok(jobs)
    }
}

impl Agent {
    /// Keeps the condition [`Condition::Units`] true to what PID 1 says, for as long as the agent runs.
    pub(crate) async fn watch_units(self: Arc<Self>) {
        let required = self.guest.image.required_units.clone();
        if required.is_empty() {
            return;
        }
        loop {
            let Err(err) = self.follow_units(&required).await;
            warn!(error = %Chain(&err), "cannot follow the units");
            self.readiness
                .set(Condition::Units, vec![Chain(&err).to_string()]);
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn follow_units(
        &self,
        required: &[String],
    ) -> Result<std::convert::Infallible, BusError> {
        let mut systemd = Systemd::connect().await?;
        let (mut last, mut waits) = (BTreeMap::new(), Waits::default());
        loop {
            let units = systemd.named(required).await?;
            let inactive = |name: &str| {
                let mut units = units.iter();
                units.any(|unit| unit.name == name && unit.active != "active")
            };
            let jobs = if units.iter().any(|unit| unit.active != "active") {
                systemd.jobs_of(inactive).await?
            } else {
                Vec::new()
            };
            let words = waits.words(&units, &jobs, Timestamp::now());
            self.readiness.set(Condition::Units, words);
            for unit in units {
                let before = last.insert(unit.name.clone(), unit.active.clone());
                let lost = before.as_deref() == Some("active") && unit.active != "active";
                if (unit.active == "failed" && before.as_deref() != Some("failed")) || lost {
                    self.events.push(AgentEvent::Unit { unit });
                }
            }
            // The first change, and then what comes with it: signals that stand before the next answer count as seen.
            systemd.0.signal().await?;
            tokio::time::sleep(SETTLE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::UnixListener,
    };

    /// Answers in the shape of systemd 252 on its private socket: with a well-known name as sender, and a signal before.
    #[tokio::test]
    async fn an_answer_is_found_behind_signals_and_names_its_sender_oddly() {
        let dir = camino_tempfile::tempdir().unwrap();
        let path = dir.path().join("private");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut bytes = [0; 512];
            let read = stream.read(&mut bytes).await.unwrap();
            // Both lines at once: what follows BEGIN must not reach PID 1 together with it.
            assert!(
                bytes[..read].starts_with(b"\0AUTH EXTERNAL 3")
                    && bytes[..read].ends_with(b"\r\nBEGIN\r\n")
            );
            stream
                .write_all(b"OK 0123456789abcdef0123456789abcdef\r\n")
                .await
                .unwrap();
            let mut seen = Vec::new();
            while !seen.windows(11).any(|window| window == b"SystemState") {
                let read = stream.read(&mut bytes).await.unwrap();
                seen.extend_from_slice(&bytes[..read]);
            }
            assert!(seen.starts_with(b"l\x01\0\x01"));
            stream
                .write_all(&wire::tests::signal("UnitNew"))
                .await
                .unwrap();
            stream
                .write_all(&wire::tests::reply(1, "v", |body| {
                    body.text_variant("running");
                }))
                .await
                .unwrap();
        });
        let mut systemd = Systemd(Bus::connect(path.as_std_path()).await.unwrap());
        assert_eq!(systemd.state().await.unwrap(), "running");
        // The signal that came before the answer is not lost, and counts once.
        systemd.0.signal().await.unwrap();
        server.await.unwrap();
        assert!(matches!(
            systemd.0.signal().await,
            Err(BusError::Talk { .. })
        ));
    }

    #[tokio::test]
    async fn who_is_not_root_is_told_so() {
        let dir = camino_tempfile::tempdir().unwrap();
        let path = dir.path().join("private");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"REJECTED EXTERNAL\r\n").await.unwrap();
            stream
        });
        assert!(matches!(
            Bus::connect(path.as_std_path()).await,
            Err(BusError::Refused { .. })
        ));
        drop(server.await.unwrap());
        let gone = Bus::connect(&dir.path().as_std_path().join("none")).await;
        assert!(matches!(gone, Err(BusError::Connect { .. })));
    }
}

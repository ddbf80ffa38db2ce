//! VMs: those that live, through their runners, and the evidence of those that are gone.
use super::{
    Caller,
    error::{ApiError, Path, Query},
    sessions,
};
use crate::{
    core::{Shared, off_runtime},
    machine::{evidence, teardown},
    store::{MachineRow, Scope},
};
use axum::{
    Json,
    body::Body,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use http_body_util::BodyExt as _;
use hyper::Method;
use serde::{Deserialize, de::DeserializeOwned};
use std::time::Duration;
use vestibule_api::{
    agent::Report,
    client::{self, CallError},
    control::{EvidenceFile, VmView},
    error::{Chain, ErrorBody, ErrorCode},
    finding::{Verdict, VerdictKind},
    ids::MachineId,
    machine::{EgressCounters, MachineState, MachineView},
};

/// A runner answers within this time.
const CALL_TIME: Duration = Duration::from_secs(10);
/// A file of evidence that is shown has at most so many bytes.
const FILE_LIMIT: u64 = 64 << 20;

/// Which VMs.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub(super) struct Which {
    /// `1`: also those that are gone, the newest 200.
    #[param(minimum = 0, maximum = 1)]
    all: Option<u8>,
}

/// VMs.
#[utoipa::path(get, path = "/api/vms", tag = "machines", operation_id = "vms", params(Which),
    responses((status = 200, body = [VmView])))]
pub(super) async fn list(
    State(core): State<Shared>,
    caller: Caller,
    Query(which): Query<Which>,
) -> Result<Json<Vec<VmView>>, ApiError> {
    let scope = caller.scope()?;
    let mut rows = match which.all {
        Some(2..) => {
            return Err(ApiError::new(
                ErrorCode::InvalidRequest,
                "all: neither 0 nor 1",
                "send `all=1`, or leave it out",
            ));
        }
        Some(1) => core.store.all_machines(200).await?,
        Some(0) | None => core.store.machines().await?,
    };
    if scope != Scope::All {
        let mut shown = Vec::new();
        for row in rows {
            let owner = core.store.machine_owner(row.id).await?;
            if owner.is_some_and(|owner| scope.has(&owner)) {
                shown.push(row);
            }
        }
        rows = shown;
    }
    let views = rows.into_iter().map(|row| view(&core, row));
    Ok(Json(futures_util::future::join_all(views).await))
}

/// One VM, also a gone one.
#[utoipa::path(get, path = "/api/vms/{id}", tag = "machines", operation_id = "vm", params(("id" = MachineId, Path)),
    responses((status = 200, body = VmView), (status = 404, body = ErrorBody)))]
pub(super) async fn vm(
    State(core): State<Shared>,
    Path(id): Path<MachineId>,
) -> Result<Json<VmView>, ApiError> {
    let row = find(&core, id).await?;
    Ok(Json(view(&core, row).await))
}

async fn find(core: &Shared, id: MachineId) -> Result<MachineRow, ApiError> {
    core.store
        .machine(id)
        .await?
        .ok_or_else(|| ApiError::not_found(format!("VM {id}")))
}

async fn view(core: &Shared, row: MachineRow) -> VmView {
    let live = match row.gone_at {
        None => {
            tokio::time::timeout(
                CALL_TIME,
                core.runner(row.id).get::<MachineView>("/machine"),
            )
            .await
        }
        Some(_) => Ok(Err(CallError::Connect {
            path: core.runner(row.id).socket().to_owned(),
            err: std::io::ErrorKind::NotFound.into(),
        })),
    };
    let live = live.ok().and_then(Result::ok);
    let (images, alias, dir) = (
        core.images.clone(),
        row.image_alias.clone(),
        core.evidence_dir(row.id),
    );
    let looked = off_runtime(move || (images.current(&alias), dir.exists())).await;
    let (current, has_evidence) = looked.unwrap_or((None, false));
    let of = live.as_ref();
    VmView {
        machine_id: row.id,
        pooled: row.pooled && row.session_id.is_none(),
        session_id: row.session_id,
        host_id: row.host_id,
        snapshot_id: row.snapshot_id,
        state: of.map_or(row.state, |live| live.state),
        generation: of.map_or(row.generation, |live| live.generation),
        made_from_older_image: current.is_some_and(|current| current != row.image_digest),
        image_digest: row.image_digest,
        driver: of.map(|live| live.driver.clone()),
        memory_mib: row.memory_mib,
        vcpus: row.vcpus,
        created_at: row.created_at,
        ready_at: of.and_then(|live| live.ready_at).or(row.ready_at),
        gone_at: row.gone_at,
        runner_pid: of.map(|live| live.runner_pid),
        vmm_pid: of.and_then(|live| live.vmm_pid),
        viewers: of.map_or(0, |live| live.viewers),
        egress: of.map_or_else(EgressCounters::default, |live| live.egress),
        failure: of.and_then(|live| live.failure.clone()).or(row.failure),
        health: live.and_then(|live| live.health),
        has_evidence,
    }
}

/// Ends a VM. Its session, if it has one that goes on, is cancelled.
#[utoipa::path(delete, path = "/api/vms/{id}", tag = "machines", operation_id = "endVm", params(("id" = MachineId, Path)),
    responses((status = 204, description = "it ends"), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(super) async fn end(
    State(core): State<Shared>,
    Path(id): Path<MachineId>,
) -> Result<StatusCode, ApiError> {
    let row = find(&core, id).await?;
    if row.gone_at.is_some() {
        return Ok(StatusCode::NO_CONTENT);
    }
    match row.session_id {
        Some(session) => sessions::end_session(&core, session).await?,
        None if row.pooled => {
            // The pool ends what it retires. A session may have been faster: then the VM is that session's.
            if !core.store.retire(id, "asked for").await?
                && let Some(session) = find(&core, id).await?.session_id
            {
                sessions::end_session(&core, session).await?;
            }
        }
        None => teardown::end_stray(&core, id, "asked for")
            .await
            .map_err(|err| {
                tracing::warn!(machine.id = %id, error = %Chain(&err), "a VM was not ended");
                ApiError::new(
                    ErrorCode::MachineUnavailable,
                    format!("VM {id} could not be ended"),
                    "try again; read the log",
                )
            })?,
    }
    Ok(StatusCode::NO_CONTENT)
}

/// How much of the console.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub(super) struct ConsoleQuery {
    /// The last so many bytes; none: all that was kept.
    tail: Option<u64>,
    /// `1` or `true`: then as it grows, until the VM ends.
    follow: Option<String>,
}

/// The serial console as text.
#[utoipa::path(get, path = "/api/vms/{id}/console", tag = "machines", operation_id = "console",
    params(("id" = MachineId, Path), ConsoleQuery),
    responses(
        (status = 200, content_type = "text/plain", body = String),
        (status = 404, body = ErrorBody), (status = 503, body = ErrorBody),
    ))]
pub(super) async fn console(
    State(core): State<Shared>,
    Path(id): Path<MachineId>,
    Query(query): Query<ConsoleQuery>,
) -> Result<Response, ApiError> {
    // As far as the document's int64 goes.
    if query.tail.is_some_and(|tail| i64::try_from(tail).is_err()) {
        return Err(ApiError::new(
            ErrorCode::InvalidRequest,
            "tail: too large",
            "send the number of bytes, or leave it out for all of them",
        ));
    }
    let row = find(&core, id).await?;
    let plain = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    if row.gone_at.is_some() {
        let bytes = read(&core, id, "serial.log").await?;
        let tail = query
            .tail
            .and_then(|tail| usize::try_from(tail).ok())
            .unwrap_or(usize::MAX);
        let from = bytes.len().saturating_sub(tail);
        return Ok((plain, bytes.get(from..).unwrap_or_default().to_vec()).into_response());
    }
    let follow = matches!(query.follow.as_deref(), Some("1" | "true"));
    let tail = query
        .tail
        .map(|tail| format!("tail={tail}&"))
        .unwrap_or_default();
    let path = format!("/console?{tail}follow={follow}");
    let request = client::json_request(Method::GET, &path, None::<&()>)
        .map_err(|err| unavailable(id, &err))?;
    let reply = tokio::time::timeout(CALL_TIME, core.runner(id).open(request)).await;
    let reply = reply
        .map_err(|_| silent(id))?
        .map_err(|err| unavailable(id, &err))?;
    if !reply.status().is_success() {
        let err = client::body("GET /console", reply).await.err();
        return Err(err.map_or_else(|| silent(id), |err| unavailable(id, &err)));
    }
    let body = Body::new(reply.into_body().map_err(axum::Error::new));
    Ok((plain, body).into_response())
}

/// What the agent reports: units, jobs, listeners, display, memory.
#[utoipa::path(get, path = "/api/vms/{id}/report", tag = "machines", operation_id = "report",
    params(("id" = MachineId, Path)),
    responses((status = 200, body = Report), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub(super) async fn report(
    State(core): State<Shared>,
    Path(id): Path<MachineId>,
) -> Result<Json<Report>, ApiError> {
    let row = find(&core, id).await?;
    if row.gone_at.is_some() {
        return json(&core, id, "report.json").await.map(Json);
    }
    let runner = core.runner(id);
    let call = tokio::time::timeout(CALL_TIME, runner.get::<Report>("/agent/report")).await;
    call.map_err(|_| silent(id))?
        .map(Json)
        .map_err(|err| unavailable(id, &err))
}

/// What is wrong with the VM, if anything.
#[utoipa::path(get, path = "/api/vms/{id}/verdict", tag = "machines", operation_id = "verdict",
    params(("id" = MachineId, Path)),
    responses((status = 200, body = Verdict), (status = 404, body = ErrorBody)))]
pub(super) async fn verdict(
    State(core): State<Shared>,
    Path(id): Path<MachineId>,
) -> Result<Json<Verdict>, ApiError> {
    let row = find(&core, id).await?;
    if row.gone_at.is_some() {
        return json(&core, id, "verdict.json").await.map(Json);
    }
    // A VM that lives is judged by what its runner says; the whole evidence is there when it has ended.
    let looked_at = vec!["events".to_owned()];
    Ok(Json(match row.failure {
        Some(finding) => Verdict::of(finding, looked_at),
        None => Verdict {
            verdict: if matches!(row.state, MachineState::Up | MachineState::Paused) {
                VerdictKind::Healthy
            } else {
                VerdictKind::Unknown
            },
            finding: None,
            also: Vec::new(),
            notes: Vec::new(),
            looked_at,
            collect_next: vec!["console".to_owned(), "report".to_owned()],
            elapsed_ms: 0,
        },
    }))
}

/// The files of a VM's evidence.
#[utoipa::path(get, path = "/api/vms/{id}/evidence", tag = "machines", operation_id = "evidence",
    params(("id" = MachineId, Path)),
    responses((status = 200, body = [EvidenceFile]), (status = 404, body = ErrorBody)))]
pub(super) async fn evidence(
    State(core): State<Shared>,
    Path(id): Path<MachineId>,
) -> Result<Json<Vec<EvidenceFile>>, ApiError> {
    let dir = core.evidence_dir(id);
    match off_runtime(move || evidence::list(&dir)).await? {
        Ok(Some(files)) => Ok(Json(files)),
        Ok(None) => Err(no_evidence(&core, id)),
        Err(err) => Err(ApiError::internal(&err)),
    }
}

/// One file of a VM's evidence.
#[utoipa::path(get, path = "/api/vms/{id}/evidence/{file}", tag = "machines", operation_id = "evidenceFile",
    params(("id" = MachineId, Path), ("file" = String, Path)),
    responses((status = 200, content_type = "text/plain", body = String), (status = 404, body = ErrorBody)))]
pub(super) async fn evidence_file(
    State(core): State<Shared>,
    Path((id, file)): Path<(MachineId, String)>,
) -> Result<Response, ApiError> {
    let bytes = read(&core, id, &file).await?;
    let kind = if file.ends_with(".json") {
        "application/json"
    } else {
        "text/plain; charset=utf-8"
    };
    Ok(([(header::CONTENT_TYPE, kind)], bytes).into_response())
}

fn no_evidence(core: &Shared, id: MachineId) -> ApiError {
    let limits = &core.config.limits;
    ApiError::new(
        ErrorCode::NotFound,
        format!("there is no evidence of VM {id}"),
        format!(
            "it is written when a VM ends, and kept for {} days (`limits.keep_evidence_days`) while there is room (`limits.keep_evidence_mib`)",
            limits.keep_evidence_days
        ),
    )
}

/// A file that the bundle lists; no other name reaches the file system.
async fn read(core: &Shared, id: MachineId, name: &str) -> Result<Vec<u8>, ApiError> {
    let (dir, wanted) = (core.evidence_dir(id), name.to_owned());
    let found = off_runtime(move || {
        let Some(files) = evidence::list(&dir)? else {
            return Ok(None);
        };
        let file = files
            .into_iter()
            .find(|file| file.name == wanted && file.bytes <= FILE_LIMIT);
        let bytes = file.map(|file| std::fs::read(dir.join(file.name)));
        bytes.transpose().map(Some)
    });
    match found.await? {
        Ok(Some(Some(bytes))) => Ok(bytes),
        Ok(None) => Err(no_evidence(core, id)),
        Ok(Some(None)) => Err(ApiError::not_found(format!(
            "file of that name in the evidence of VM {id}"
        ))),
        Err(err) => Err(ApiError::internal(&err)),
    }
}

async fn json<T: DeserializeOwned>(
    core: &Shared,
    id: MachineId,
    name: &str,
) -> Result<T, ApiError> {
    serde_json::from_slice(&read(core, id, name).await?).map_err(|err| ApiError::internal(&err))
}

fn silent(id: MachineId) -> ApiError {
    ApiError::new(
        ErrorCode::MachineUnavailable,
        format!("VM {id} did not answer in time"),
        "try again; the console and the verdict say how far it got",
    )
    .retry_after(5)
}

fn unavailable(id: MachineId, err: &CallError) -> ApiError {
    tracing::debug!(machine.id = %id, error = %Chain(err), "a VM did not answer");
    ApiError::new(
        ErrorCode::MachineUnavailable,
        format!("VM {id} does not answer now"),
        "try again; the console and the verdict say how far it got",
    )
    .retry_after(5)
}

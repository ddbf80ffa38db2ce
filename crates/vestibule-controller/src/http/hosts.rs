//! Hosts that share the database.
use super::error::{ApiError, Path};
use crate::{
    core::Shared,
    store::{Forgotten, HostRow},
};
use axum::{Json, extract::State, http::StatusCode};
use vestibule_api::{
    control::{HostState, HostView},
    error::{ErrorBody, ErrorCode},
    ids::HostId,
};

/// Hosts that share the database, oldest first.
#[utoipa::path(get, path = "/api/hosts", tag = "system", operation_id = "hosts",
    responses((status = 200, body = [HostView])))]
pub(super) async fn list(State(core): State<Shared>) -> Result<Json<Vec<HostView>>, ApiError> {
    let view = |row: HostRow| HostView {
        own: row.id == core.store.host(),
        state: if row.live {
            HostState::Live
        } else {
            HostState::Lost
        },
        host_id: row.id,
        name: row.name,
        address: row.address,
        lease_until: row.lease_until,
        generation: row.generation,
        machines: row.machines,
    };
    let hosts = core.store.hosts().await?;
    Ok(Json(hosts.into_iter().map(view).collect()))
}

/// Removes a host that never comes back: what it had is given up. Credentials in its vault are out of reach then.
#[utoipa::path(delete, path = "/api/hosts/{id}", tag = "system", operation_id = "forgetHost",
    params(("id" = HostId, Path)),
    responses((status = 204), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "it is live, or sign-ins are still on it")))]
pub(super) async fn forget(
    State(core): State<Shared>,
    Path(id): Path<HostId>,
) -> Result<StatusCode, ApiError> {
    let conflict =
        |message: String, fix: &str| Err(ApiError::new(ErrorCode::Conflict, message, fix));
    match core.store.forget_host(id, core.now()).await? {
        Forgotten::Yes => {
            tracing::warn!(host.id = %id, "a host was removed");
            Ok(StatusCode::NO_CONTENT)
        }
        Forgotten::Missing => Err(ApiError::not_found(format!("host {id}"))),
        Forgotten::Live => conflict(
            format!("host {id} is live"),
            "stop its controller and wait until its lease has run out",
        ),
        Forgotten::InUse => conflict(
            format!("sign-ins are still on host {id}"),
            "wait until they have ended: `cluster.lost_after_s` after its lease ran out, or when their deadline passes",
        ),
    }
}

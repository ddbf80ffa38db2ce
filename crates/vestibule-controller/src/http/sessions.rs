//! Sign-ins: start, look, cancel, tickets.
use super::error::{ApiError, Body, Path, Query};
use crate::{
    core::{Shared, off_runtime},
    images,
    live::Ticket,
    state::Event,
    store::{Applied, Facts, NewSession, SessionRow},
};
use axum::{Json, extract::State, http::StatusCode};
use serde::Deserialize;
use vestibule_api::{
    error::{ErrorBody, ErrorCode},
    finding::Finding,
    ids::{AliasName, SessionId},
    machine::MachineState,
    pack::ProviderPack,
    session::{
        SessionState, SessionView, StartKind, StartReply, StartRequest, TicketReply, TicketRequest,
    },
    time::Timestamp,
};

/// A user id is a name of the caller's, of bounded length.
const USER_LIMIT: usize = 200;

/// Asks for a sign-in.
#[utoipa::path(post, path = "/api/auth/start", tag = "sign-in", operation_id = "start",
    request_body = StartRequest,
    responses(
        (status = 201, body = StartReply),
        (status = 400, body = ErrorBody, description = "unknown provider or flow, or a field that is not understood"),
        (status = 409, body = ErrorBody, description = "the provider can't be used now"),
        (status = 429, body = ErrorBody, description = "too many sign-ins wait for a place"),
        (status = 503, body = ErrorBody, description = "no image is published"),
    ))]
pub(super) async fn start(
    State(core): State<Shared>,
    Body(request): Body<StartRequest>,
) -> Result<(StatusCode, Json<StartReply>), ApiError> {
    if core.is_stopping() {
        let err = ApiError::new(
            ErrorCode::Unavailable,
            "the controller stops",
            "try again in a moment",
        );
        return Err(err.retry_after(5));
    }
    let new = check(&core, &request).await?;
    core.store.create_session(&new, Timestamp::now()).await?;
    core.metrics.started(new.provider.as_str());
    tracing::info!(session.id = %new.id, provider = %new.provider, flow = new.flow, "a sign-in was asked for");
    let reply = StartReply {
        session_id: new.id,
        provider: new.provider,
        state: SessionState::Requested,
    };
    Ok((StatusCode::CREATED, Json(reply)))
}

/// The session that a request means, if this host can serve it.
async fn check(core: &Shared, request: &StartRequest) -> Result<NewSession, ApiError> {
    let invalid =
        |message: String, fix: &str| Err(ApiError::new(ErrorCode::InvalidRequest, message, fix));
    let pack = match core.packs.get(&request.provider) {
        Some(Ok(pack)) => pack,
        Some(Err(why)) => {
            let message = format!("the provider `{}` can't be used: {why}", request.provider);
            return Err(ApiError::new(
                ErrorCode::Conflict,
                message,
                "set what is missing in `[providers]` of the configuration",
            ));
        }
        None => return Err(unknown_provider(core, request.provider.as_str())),
    };
    let flow = match &request.flow {
        None => pack.flow.first(),
        Some(id) => pack.flow.iter().find(|flow| flow.id == *id),
    };
    let Some(flow) = flow else {
        let flows: Vec<_> = pack.flow.iter().map(|flow| flow.id.as_str()).collect();
        return invalid(
            format!("flow: `{}` has no such flow", request.provider),
            &format!("use one of: {}", flows.join(", ")),
        );
    };
    let user_id = request
        .user_id
        .clone()
        .unwrap_or_else(|| "local".to_owned());
    if user_id.is_empty()
        || user_id.chars().count() > USER_LIMIT
        || user_id.chars().any(char::is_control)
    {
        return invalid(
            "userId: not a name".to_owned(),
            "send 1 to 200 characters without control characters",
        );
    }
    let alias = request
        .image
        .clone()
        .unwrap_or_else(|| core.config.image.clone());
    if alias.parse::<AliasName>().is_err() {
        return invalid(
            "image: not an alias".to_owned(),
            "use an alias that GET /api/images shows",
        );
    }
    image(core, &alias, pack).await?;
    let waiting = core.store.sessions_in(SessionState::Placing).await?.len();
    if waiting >= usize::try_from(core.config.limits.waiting).unwrap_or(usize::MAX) {
        let message = format!("{waiting} sign-ins wait for a place already");
        return Err(
            ApiError::new(ErrorCode::TooManySessions, message, "try again later").retry_after(30),
        );
    }
    Ok(NewSession {
        id: SessionId::generate(),
        provider: request.provider.clone(),
        flow: flow.id.clone(),
        user_id,
        image_alias: alias,
        login_timeout: core.config.sign_in(flow.timeout_s),
        start_at_most: match request.warm {
            Some(false) => StartKind::Cold,
            Some(true) | None => StartKind::Pool,
        },
    })
}

fn unknown_provider(core: &Shared, id: &str) -> ApiError {
    let known: Vec<_> = core.packs.ids().map(|id| id.as_str()).collect();
    ApiError::new(
        ErrorCode::UnknownProvider,
        format!("provider: there is no provider pack `{id}`"),
        format!("use one of: {}", known.join(", ")),
    )
}

/// There is an image, and it has the provider's tool.
async fn image(core: &Shared, alias: &str, pack: &ProviderPack) -> Result<(), ApiError> {
    let (images, name) = (core.images.clone(), alias.to_owned());
    match off_runtime(move || images.resolve(&name)).await? {
        Ok(image) => match super::images::lacks(&image.manifest, pack) {
            None => Ok(()),
            Some(why) => {
                let fix =
                    format!("build the image `{alias}` with the tool, or choose another image");
                Err(ApiError::new(ErrorCode::Conflict, why, fix))
            }
        },
        Err(err) => {
            let finding: Finding = images::missing(alias, &err);
            let message = format!("no image can be used under the alias `{alias}`");
            Err(ApiError::new(ErrorCode::ImageMissing, message, finding.fix.clone()).with(finding))
        }
    }
}

/// One session, also after it has ended.
#[utoipa::path(get, path = "/api/auth/session/{id}", tag = "sign-in", operation_id = "session",
    params(("id" = SessionId, Path)),
    responses(
        (status = 200, body = SessionView),
        (status = 404, body = ErrorBody),
        (status = 410, body = ErrorBody, description = "it ended so long ago that it was removed"),
    ))]
pub(super) async fn session(
    State(core): State<Shared>,
    Path(id): Path<SessionId>,
) -> Result<Json<SessionView>, ApiError> {
    let row = find(&core, id).await?;
    Ok(Json(view(&core, row).await?))
}

/// The row, or why there is none.
pub(super) async fn find(core: &Shared, id: SessionId) -> Result<SessionRow, ApiError> {
    if let Some(row) = core.store.session(id).await? {
        return Ok(row);
    }
    if core.store.was_forgotten(id).await? {
        return Err(gone(format!("session {id} ended long ago and was removed")));
    }
    Err(ApiError::not_found(format!("session {id}")))
}

/// 410: with what to do next.
pub(super) fn gone(message: String) -> ApiError {
    ApiError::new(
        ErrorCode::SessionGone,
        message,
        "start a new one with POST /api/auth/start; a credential that was captured is in GET /api/credentials",
    )
}

pub(super) async fn view(core: &Shared, row: SessionRow) -> Result<SessionView, ApiError> {
    let machine = match row.machine_id {
        Some(id) => core.store.machine(id).await?,
        None => None,
    };
    let (images, alias) = (core.images.clone(), row.image_alias.clone());
    let current = off_runtime(move || images.current(&alias)).await?;
    let machine_state = machine.map(|machine| machine.state);
    let up = matches!(machine_state, Some(MachineState::Up | MachineState::Paused));
    let older = row.image_digest.is_some() && current.is_some() && row.image_digest != current;
    Ok(SessionView {
        session_id: row.id,
        provider: row.provider,
        flow: row.flow,
        user_id: row.user_id,
        state: row.state,
        created_at: row.created_at,
        updated_at: row.updated_at,
        deadline_at: row.deadline_at,
        machine_id: row.machine_id,
        machine_state,
        image_digest: row.image_digest,
        made_from_older_image: older,
        credential_id: row.sealed_at.map(|_| row.credential_id),
        account: row.account,
        user_code: core.live.user_code(row.id),
        failure: row.failure,
        viewable: up && !row.state.is_terminal(),
    })
}

/// A page of sessions.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub(super) struct Page {
    /// At most so many, 1 to 200.
    limit: Option<u32>,
    /// Older than this session.
    before: Option<SessionId>,
}

/// Sessions, newest first.
#[utoipa::path(get, path = "/api/sessions", tag = "sign-in", operation_id = "sessions", params(Page),
    responses((status = 200, body = [SessionView])))]
pub(super) async fn list(
    State(core): State<Shared>,
    Query(page): Query<Page>,
) -> Result<Json<Vec<SessionView>>, ApiError> {
    let limit = page.limit.unwrap_or(50).clamp(1, 200);
    let mut views = Vec::new();
    for row in core.store.sessions(page.before, limit).await? {
        views.push(view(&core, row).await?);
    }
    Ok(Json(views))
}

/// A ticket for one WebSocket of the session.
#[utoipa::path(post, path = "/api/auth/session/{id}/tickets", tag = "sign-in", operation_id = "ticket",
    params(("id" = SessionId, Path)), request_body = TicketRequest,
    responses(
        (status = 201, body = TicketReply),
        (status = 404, body = ErrorBody),
        (status = 410, body = ErrorBody, description = "the session has ended"),
    ))]
pub(super) async fn ticket(
    State(core): State<Shared>,
    Path(id): Path<SessionId>,
    Body(request): Body<TicketRequest>,
) -> Result<(StatusCode, Json<TicketReply>), ApiError> {
    let row = find(&core, id).await?;
    if row.state.is_terminal() {
        return Err(gone(format!("session {id} has ended: {}", row.state.id())));
    }
    let right = request.right;
    let (ticket, expires_at) = core
        .live
        .ticket(Ticket { session: id, right }, Timestamp::now());
    Ok((
        StatusCode::CREATED,
        Json(TicketReply {
            ticket,
            expires_at,
            right,
        }),
    ))
}

/// Ends a session. One that has ended stays as it is.
#[utoipa::path(post, path = "/api/auth/session/{id}/cancel", tag = "sign-in", operation_id = "cancel",
    params(("id" = SessionId, Path)),
    responses((status = 200, body = SessionView), (status = 404, body = ErrorBody), (status = 410, body = ErrorBody)))]
pub(super) async fn cancel(
    State(core): State<Shared>,
    Path(id): Path<SessionId>,
) -> Result<Json<SessionView>, ApiError> {
    end_session(&core, id).await?;
    Ok(Json(view(&core, find(&core, id).await?).await?))
}

/// Ends a session and its VM. One that has ended stays as it is.
#[utoipa::path(delete, path = "/api/vm/auth/{sessionId}", tag = "sign-in", operation_id = "endSession",
    params(("sessionId" = SessionId, Path)),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 410, body = ErrorBody)))]
pub(super) async fn end(
    State(core): State<Shared>,
    Path(id): Path<SessionId>,
) -> Result<StatusCode, ApiError> {
    end_session(&core, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn end_session(core: &Shared, id: SessionId) -> Result<(), ApiError> {
    let applied = core
        .store
        .apply(id, Event::Cancelled, &Facts::default(), Timestamp::now())
        .await?;
    match applied {
        Applied::Moved(_) => tracing::info!(session.id = %id, "a session was cancelled"),
        Applied::Ignored(_) => {}
        Applied::Missing => drop(find(core, id).await?),
    }
    Ok(())
}

//! Sign-ins: start, look, confirm, cancel, tickets.
use super::{
    Caller,
    error::{ApiError, Body, Path, Query},
    login,
};
use crate::{
    config::ConfirmAccount,
    core::{Shared, off_runtime},
    descriptors, images,
    live::Ticket,
    people::{LOCAL, Owner},
    rights::Reach,
    state::{self, Event},
    store::{Applied, Created, Facts, NewSession, Quota, SessionRow},
};
use axum::{Json, extract::State, http::StatusCode};
use serde::Deserialize;
use vestibule_api::{
    error::{ErrorBody, ErrorCode},
    finding::Finding,
    ids::{AliasName, SessionId},
    pack::ProviderPack,
    people::PrincipalKind,
    session::{
        ConfirmRequest, SessionState, SessionView, StartKind, StartReply, StartRequest,
        TicketReply, TicketRequest,
    },
    time::Timestamp,
};

/// A user id is a name of the caller's, of bounded length.
const USER_LIMIT: usize = 200;
/// Characters of a viewer's name.
const WHO_LIMIT: usize = 100;

/// Asks for a sign-in.
#[utoipa::path(post, path = "/api/auth/start", tag = "sign-in", operation_id = "start",
    request_body = StartRequest,
    responses(
        (status = 201, body = StartReply),
        (status = 400, body = ErrorBody, description = "unknown provider or flow, or a field that is not understood"),
        (status = 409, body = ErrorBody, description = "the provider can't be used now"),
        (status = 429, body = ErrorBody, description = "too many sign-ins wait for a place, are under way for the user or \
            organisation, or were started in the last minute"),
        (status = 503, body = ErrorBody, description = "no image is published"),
    ))]
pub(super) async fn start(
    State(core): State<Shared>,
    caller: Caller,
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
    if caller.principal.kind != PrincipalKind::Local {
        let limited = core.limits.start(&caller.principal.id);
        limited.map_err(|wait| login::too_often("sign-ins were started", wait))?;
    }
    let whose = whose(&core, &caller, &request).await?;
    let new = check(&core, &request, whose).await?;
    match core.store.create_session(&new, Timestamp::now()).await? {
        Created::Yes => {}
        Created::UserFull(live) => return Err(full("this user", live)),
        Created::OrganisationFull(live) => return Err(full("the organisation", live)),
    }
    core.metrics.started(new.provider.as_str());
    tracing::info!(session.id = %new.id, provider = %new.provider, flow = new.flow, "a sign-in was asked for");
    let reply = StartReply {
        session_id: new.id,
        provider: new.provider,
        state: SessionState::Requested,
    };
    Ok((StatusCode::CREATED, Json(reply)))
}

fn full(whose: &str, live: u32) -> ApiError {
    ApiError::new(
        ErrorCode::QuotaExceeded,
        format!("{live} sign-ins of {whose} are under way, and there may be no more"),
        "end one of them, or wait until one has ended",
    )
    .retry_after(30)
}

/// Whose the session will be, and for whom.
async fn whose(
    core: &Shared,
    caller: &Caller,
    request: &StartRequest,
) -> Result<(Owner, String), ApiError> {
    let invalid =
        |message: String, fix: &str| Err(ApiError::new(ErrorCode::InvalidRequest, message, fix));
    let asker = &caller.principal;
    let (owner, name) = match &request.owner {
        None => (asker.owner(), Some(asker.name.clone())),
        Some(name) if name.as_str() == asker.name && asker.kind == PrincipalKind::User => {
            (asker.owner(), Some(asker.name.clone()))
        }
        Some(name) => {
            // One's own objects are all that some may make.
            let may = matches!(caller.reach, Reach::Organisation | Reach::All);
            let user = core.store.user(name.as_str()).await?.filter(|_| may);
            let owner = user.map(|user| user.principal.owner());
            match owner.filter(|owner| caller.reach.has(asker, owner)) {
                Some(owner) => (owner, Some(name.to_string())),
                None => {
                    return invalid(
                        format!(
                            "owner: there is no user `{name}` for whom you may start a sign-in"
                        ),
                        "leave `owner` out, or name a user of your organisation",
                    );
                }
            }
        }
    };
    let for_a_user = request.owner.is_some() || asker.kind == PrincipalKind::User;
    match (&request.user_id, name) {
        (Some(id), Some(name)) if for_a_user && *id != name => invalid(
            format!("userId: the session is `{name}`'s"),
            "leave `userId` out: it is a label for those whom Vestibule does not know",
        ),
        (Some(id), _) => Ok((owner, id.clone())),
        (None, Some(name)) => Ok((owner, name)),
        (None, None) => Ok((owner, LOCAL.to_owned())),
    }
}

/// The session that a request means, if this host can serve it.
async fn check(
    core: &Shared,
    request: &StartRequest,
    (owner, user_id): (Owner, String),
) -> Result<NewSession, ApiError> {
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
        quota: Quota {
            user: at_most(core.config.limits.live_per_user),
            organisation: at_most(core.config.limits.live_per_organisation),
        },
        confirm_account: match core.config.confirm_account {
            ConfirmAccount::Users => owner.id != LOCAL,
            ConfirmAccount::Always => true,
            ConfirmAccount::Never => false,
        },
        owner,
    })
}

/// A limit of 0 is none.
fn at_most(limit: u32) -> Option<u32> {
    (limit > 0).then_some(limit)
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
        Err(err) if descriptors::are_gone(&err) => Err(ApiError::internal(&err)),
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
    caller: Caller,
    Path(id): Path<SessionId>,
) -> Result<Json<SessionView>, ApiError> {
    let row = find(&core, id).await?;
    Ok(Json(view(&core, row, &caller).await?))
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

async fn view(core: &Shared, row: SessionRow, caller: &Caller) -> Result<SessionView, ApiError> {
    let machine = match row.machine_id {
        Some(id) => core.store.machine(id).await?,
        None => None,
    };
    let (images, alias) = (core.images.clone(), row.image_alias.clone());
    let current = off_runtime(move || images.current(&alias)).await?;
    let machine_state = machine.map(|machine| machine.state);
    let viewable = machine_state.is_some_and(|machine| state::has_screen(row.state, machine));
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
        viewable,
        confirm_account: row.confirm_account,
        viewers: core.live.viewers_of(row.id),
        own: row.owner_id == caller.principal.id,
    })
}

/// A page of sessions.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub(super) struct Page {
    /// At most so many, 1 to 200; 50 where nothing is said.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<u32>,
    /// Older than this session.
    before: Option<SessionId>,
}

/// Sessions, newest first.
#[utoipa::path(get, path = "/api/sessions", tag = "sign-in", operation_id = "sessions", params(Page),
    responses((status = 200, body = [SessionView])))]
pub(super) async fn list(
    State(core): State<Shared>,
    caller: Caller,
    Query(page): Query<Page>,
) -> Result<Json<Vec<SessionView>>, ApiError> {
    let scope = caller.scope()?;
    let limit = page.limit.unwrap_or(50);
    if !(1..=200).contains(&limit) {
        return Err(ApiError::new(
            ErrorCode::InvalidRequest,
            format!("limit: {limit} is not 1 to 200"),
            "send 1 to 200, and `before` for the next page",
        ));
    }
    let mut views = Vec::new();
    for row in core.store.sessions(&scope, page.before, limit).await? {
        views.push(view(&core, row, &caller).await?);
    }
    Ok(Json(views))
}

/// A ticket for one WebSocket of the session. Its owner alone gets one, and may give it to somebody else.
#[utoipa::path(post, path = "/api/auth/session/{id}/tickets", tag = "sign-in", operation_id = "ticket",
    params(("id" = SessionId, Path)), request_body = TicketRequest,
    responses(
        (status = 201, body = TicketReply),
        (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 410, body = ErrorBody, description = "the session has ended"),
    ))]
pub(super) async fn ticket(
    State(core): State<Shared>,
    caller: Caller,
    Path(id): Path<SessionId>,
    Body(request): Body<TicketRequest>,
) -> Result<(StatusCode, Json<TicketReply>), ApiError> {
    let who = request.who.unwrap_or_else(|| caller.principal.name.clone());
    if !(1..=WHO_LIMIT).contains(&who.chars().count()) || who.chars().any(char::is_control) {
        return Err(ApiError::new(
            ErrorCode::InvalidRequest,
            "who: not a name",
            "send 1 to 100 characters without control characters, or leave it out",
        ));
    }
    let row = find(&core, id).await?;
    if row.state.is_terminal() {
        return Err(gone(format!("session {id} has ended: {}", row.state.id())));
    }
    let right = request.right;
    let ticket = Ticket {
        session: id,
        right,
        who,
        by: caller.principal.id,
    };
    let (ticket, expires_at) = core.live.ticket(ticket, Timestamp::now());
    Ok((
        StatusCode::CREATED,
        Json(TicketReply {
            ticket,
            expires_at,
            right,
        }),
    ))
}

/// Ends every view of the session within a second, and makes the tickets that were not used yet worth nothing.
#[utoipa::path(delete, path = "/api/auth/session/{id}/tickets", tag = "sign-in", operation_id = "revokeTickets",
    params(("id" = SessionId, Path)),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 410, body = ErrorBody)))]
pub(super) async fn revoke(
    State(core): State<Shared>,
    Path(id): Path<SessionId>,
) -> Result<StatusCode, ApiError> {
    find(&core, id).await?;
    core.live.revoke_session(id);
    tracing::info!(session.id = %id, "a session's views were revoked");
    Ok(StatusCode::NO_CONTENT)
}

/// Says that the account is the right one: only then is the credential fetched from the VM and sealed. To refuse it, cancel
/// the session.
#[utoipa::path(post, path = "/api/auth/session/{id}/confirm", tag = "sign-in", operation_id = "confirm",
    params(("id" = SessionId, Path)), request_body = ConfirmRequest,
    responses(
        (status = 200, body = SessionView),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "nothing waits to be confirmed, or it is another account"),
        (status = 410, body = ErrorBody),
    ))]
pub(super) async fn confirm(
    State(core): State<Shared>,
    caller: Caller,
    Path(id): Path<SessionId>,
    Body(request): Body<ConfirmRequest>,
) -> Result<Json<SessionView>, ApiError> {
    let row = find(&core, id).await?;
    let conflict = |message: String| {
        let fix = "read the session again, and confirm the account that it shows";
        ApiError::new(ErrorCode::Conflict, message, fix)
    };
    let nothing = |state: SessionState| {
        let state = state.id();
        conflict(format!(
            "session {id} is {state}: there is nothing to confirm"
        ))
    };
    if row.state != SessionState::Confirming {
        return Err(nothing(row.state));
    }
    if row.account != request.account {
        return Err(conflict(format!("session {id} is about another account")));
    }
    let facts = Facts::default();
    let confirmed = Event::AccountConfirmed;
    let applied = core
        .store
        .apply(id, confirmed, &facts, Timestamp::now())
        .await?;
    // Somebody may have cancelled it since it was read.
    if let Applied::Ignored(now) = applied {
        return Err(nothing(now.state));
    }
    tracing::info!(session.id = %id, by = caller.principal.actor(), "the account was confirmed");
    Ok(Json(view(&core, find(&core, id).await?, &caller).await?))
}

/// Ends a session. One that has ended stays as it is.
#[utoipa::path(post, path = "/api/auth/session/{id}/cancel", tag = "sign-in", operation_id = "cancel",
    params(("id" = SessionId, Path)),
    responses((status = 200, body = SessionView), (status = 404, body = ErrorBody), (status = 410, body = ErrorBody)))]
pub(super) async fn cancel(
    State(core): State<Shared>,
    caller: Caller,
    Path(id): Path<SessionId>,
) -> Result<Json<SessionView>, ApiError> {
    end_session(&core, id).await?;
    Ok(Json(view(&core, find(&core, id).await?, &caller).await?))
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

//! What the runner asks: the clock, and to be made ready for a snapshot.
use super::{Refusal, Shared, engineers_only};
use crate::{init::identity, prepare};
use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use vestibule_api::{
    agent::{ClockReply, ClockRequest},
    error::Chain,
};

/// `POST /clock`.
pub(super) async fn clock(
    State(agent): Shared,
    Json(request): Json<ClockRequest>,
) -> Result<Json<ClockReply>, Refusal> {
    let reply = agent
        .clock
        .ask(request, identity::set_clock)
        .map_err(|err| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, Chain(&err).to_string()))?;
    Ok(Json(reply))
}

/// `POST /prepare-snapshot`.
pub(super) async fn prepare_snapshot(
    State(agent): Shared,
    headers: HeaderMap,
) -> Result<StatusCode, Refusal> {
    engineers_only(&agent, &headers)?;
    prepare::prepare(&agent)
        .await
        .map_err(|err| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, Chain(&err).to_string()))?;
    // What comes after this reply comes with the end of the stream.
    agent.prepared.send_replace(true);
    Ok(StatusCode::NO_CONTENT)
}

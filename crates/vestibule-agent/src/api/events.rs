//! `GET /events?after=N`: NDJSON, what was kept and then what happens.
use super::Shared;
use axum::{
    body::Body,
    extract::{Query, State},
    http::header,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::StreamExt as _;
use serde::Deserialize;
use std::{convert::Infallible, sync::Arc};
use vestibule_api::agent::AgentEventLine;

#[derive(Debug, Deserialize)]
pub(super) struct After {
    #[serde(default)]
    after: u64,
}

pub(super) async fn follow(State(agent): Shared, Query(After { after }): Query<After>) -> Response {
    agent.followed.send_replace(true);
    let lines = Arc::clone(&agent.events)
        .follow(after)
        .map(|batch| Ok::<_, Infallible>(encode(&batch)));
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response()
}

fn encode(lines: &[AgentEventLine]) -> Bytes {
    let mut bytes = Vec::new();
    for line in lines {
        // Types of our own without maps of odd keys: encoding them cannot fail.
        if serde_json::to_writer(&mut bytes, line).is_ok() {
            bytes.push(b'\n');
        }
    }
    bytes.into()
}

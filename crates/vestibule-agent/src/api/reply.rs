//! How the agent says no: a status and [`AgentError`] as JSON.
use axum::{
    Json,
    http::{Method, StatusCode, Uri},
    response::{IntoResponse, Response},
};
use vestibule_api::{agent::AgentError, cause::Cause};

/// A request that was not carried out.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    message: String,
    cause: Option<Cause>,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            cause: None,
        }
    }

    /// The same refusal, with the cause that it stands for.
    pub(crate) fn because(mut self, cause: Cause) -> Self {
        self.cause = Some(cause);
        self
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (
            self.status,
            Json(AgentError {
                message: self.message,
                cause: self.cause,
            }),
        )
            .into_response()
    }
}

pub(super) async fn no_such_route(method: Method, uri: Uri) -> Refusal {
    Refusal::new(
        StatusCode::NOT_FOUND,
        format!("the agent has no route {method} {}", uri.path()),
    )
}

pub(super) async fn no_such_method(method: Method, uri: Uri) -> Refusal {
    Refusal::new(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("the agent's route {} does not take {method}", uri.path()),
    )
}

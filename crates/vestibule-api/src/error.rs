//! The body of every HTTP error, and how a chain of errors is printed.
use crate::finding::Finding;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What went wrong with a request, for programs. Each value says what its reader does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request itself is wrong. Caller: correct it, the message names the field.
    InvalidRequest,
    /// No token, or one that is not known. Caller: sign in again.
    Unauthenticated,
    /// The role does not have this right, or the request comes from a foreign page. Caller: ask the admin.
    Forbidden,
    /// There is no such route, session, VM, image or credential.
    NotFound,
    /// There is no provider pack of that id. Caller: choose one of `GET /api/providers`.
    UnknownProvider,
    /// The method is not one that the route has.
    MethodNotAllowed,
    /// The session has ended and its VM is gone. Caller: start a new one; what was captured is in the vault.
    SessionGone,
    /// The request does not fit the state of its object. Caller: read the state again.
    Conflict,
    /// As many VMs run as this host allows. Caller: try again after `retryAfterS`.
    TooManySessions,
    /// As many sessions of the user or the organisation are under way as may be. Caller: end one, or wait for one to end.
    QuotaExceeded,
    /// Too many attempts in a short time. Caller: try again after `retryAfterS`.
    RateLimited,
    /// The body is larger than the route allows.
    TooLarge,
    /// No image is published under the alias. Operator: build and publish one.
    ImageMissing,
    /// The VM or its agent did not answer. Operator: read the finding.
    MachineUnavailable,
    /// Vestibule is not ready or is stopping. Caller: try again.
    Unavailable,
    /// A defect or a failing disk or database. Operator: read the log under the request id.
    Internal,
}

/// `{"error":{…}}`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

/// One error as a client sees it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ErrorDetail {
    pub code: ErrorCode,
    /// What was attempted, on what, and what happened.
    pub message: String,
    /// What to do about it.
    pub fix: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finding: Option<Finding>,
    /// Seconds after which the same request may succeed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<u64>,
    /// The same id stands in the server's log.
    pub request_id: String,
}

/// Prints an error with its whole chain of sources: `start the VM: open disk image: no such file`.
///
/// Our `Display` texts never contain their source; this is where the chain is put together, once.
pub struct Chain<'a>(pub &'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

impl fmt::Debug for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

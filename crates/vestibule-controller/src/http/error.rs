//! Errors as clients see them, and the extractors that make them of what axum refuses.
use crate::{descriptors, store::StoreError};
use axum::{
    Json,
    extract::{
        FromRequest, FromRequestParts, Request,
        rejection::{JsonRejection, PathRejection, QueryRejection},
    },
    http::{HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use serde::de::DeserializeOwned;
use vestibule_api::{
    error::{Chain, ErrorBody, ErrorCode, ErrorDetail},
    finding::Finding,
};

tokio::task_local! {
    /// The id of the request that the current task serves.
    pub(crate) static REQUEST_ID: String;
}

/// An error with what to do about it.
#[derive(Debug)]
pub(crate) struct ApiError {
    code: ErrorCode,
    message: String,
    fix: String,
    retry_after_s: Option<u64>,
    finding: Option<Box<Finding>>,
}

impl ApiError {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            fix: fix.into(),
            retry_after_s: None,
            finding: None,
        }
    }

    pub(crate) fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }

    /// The same error, with another thing to do about it.
    pub(crate) fn mended_by(mut self, fix: impl Into<String>) -> Self {
        self.fix = fix.into();
        self
    }

    pub(crate) fn with(mut self, finding: Finding) -> Self {
        self.finding = Some(Box::new(finding));
        self
    }

    /// A defect, or a failing disk or database. The chain is logged under the request id and not shown; what may pass by itself
    /// is named.
    pub(crate) fn internal(err: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(request.id = request_id(), error = %Chain(err), "a request failed");
        if descriptors::are_gone(err) {
            return Self::new(ErrorCode::Unavailable, descriptors::WHY, descriptors::FIX)
                .retry_after(5);
        }
        Self::new(
            ErrorCode::Internal,
            "the controller could not do it",
            "try again; if it stays, the operator finds the reason in the log under the request id",
        )
    }

    pub(crate) fn not_found(what: impl std::fmt::Display) -> Self {
        Self::new(
            ErrorCode::NotFound,
            format!("there is no {what}"),
            "look at the list that it should be in",
        )
    }
}

/// The id of the request that is served.
pub(crate) fn request_id() -> String {
    REQUEST_ID.try_with(Clone::clone).unwrap_or_default()
}

/// The HTTP status of a code.
pub(crate) const fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidRequest | ErrorCode::UnknownProvider => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthenticated => StatusCode::UNAUTHORIZED,
        ErrorCode::Forbidden => StatusCode::FORBIDDEN,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::SessionGone => StatusCode::GONE,
        ErrorCode::Conflict => StatusCode::CONFLICT,
        ErrorCode::TooManySessions | ErrorCode::QuotaExceeded | ErrorCode::RateLimited => {
            StatusCode::TOO_MANY_REQUESTS
        }
        ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::ImageMissing | ErrorCode::MachineUnavailable | ErrorCode::Unavailable => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let retry = self.retry_after_s.map(HeaderValue::from);
        let detail = ErrorDetail {
            code: self.code,
            message: self.message,
            fix: self.fix,
            finding: self.finding.map(|finding| *finding),
            retry_after_s: self.retry_after_s,
            request_id: request_id(),
        };
        let mut response = (status(self.code), Json(ErrorBody { error: detail })).into_response();
        if let Some(retry) = retry {
            response.headers_mut().insert(header::RETRY_AFTER, retry);
        }
        if self.code == ErrorCode::Unauthenticated {
            let bearer = HeaderValue::from_static("Bearer realm=\"vestibule\"");
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, bearer);
        }
        response
    }
}

impl From<StoreError> for ApiError {
    fn from(err: StoreError) -> Self {
        let Some(hindrance) = err.hindrance() else {
            return Self::internal(&err);
        };
        let (message, fix) = hindrance.words();
        tracing::error!(request.id = request_id(), error = %Chain(&err), "the database is hindered");
        Self::new(ErrorCode::Unavailable, message, fix).retry_after(5)
    }
}

impl From<tokio::task::JoinError> for ApiError {
    fn from(err: tokio::task::JoinError) -> Self {
        Self::internal(&err)
    }
}

/// A JSON body. What is wrong with one is said with the field.
#[derive(Debug)]
pub(crate) struct Body<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(body_error(&rejection)),
        }
    }
}

fn body_error(rejection: &JsonRejection) -> ApiError {
    let fix = "send the JSON that /docs describes for this request, with `Content-Type: application/json`";
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return ApiError::new(
            ErrorCode::TooLarge,
            "the body is larger than this route allows",
            fix,
        );
    }
    // Names field and expectation; values are quoted only where a variant or key is unknown.
    ApiError::new(
        ErrorCode::InvalidRequest,
        bounded(&rejection.body_text()),
        fix,
    )
}

/// Path parameters.
#[derive(Debug)]
pub(crate) struct Path<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match axum::extract::Path::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(value)) => Ok(Self(value)),
            Err(rejection) => Err(path_error(&rejection)),
        }
    }
}

fn path_error(rejection: &PathRejection) -> ApiError {
    ApiError::new(
        ErrorCode::InvalidRequest,
        bounded(&rejection.body_text()),
        "correct the id in the path",
    )
}

/// Query parameters.
#[derive(Debug)]
pub(crate) struct Query<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match axum::extract::Query::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(query_error(&rejection)),
        }
    }
}

fn query_error(rejection: &QueryRejection) -> ApiError {
    ApiError::new(
        ErrorCode::InvalidRequest,
        bounded(&rejection.body_text()),
        "correct the query, see /docs",
    )
}

fn bounded(text: &str) -> String {
    text.chars().take(400).collect()
}

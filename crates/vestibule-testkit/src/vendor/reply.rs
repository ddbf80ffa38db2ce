//! One request, read whole, and the few shapes of answers.
use axum::{
    body::Body,
    http::{Method, Request, StatusCode, header},
    response::{IntoResponse, Response},
};
use http_body_util::{BodyExt, Limited};
use serde_json::Value;
use std::collections::BTreeMap;

/// A body of more bytes is refused.
const BODY_LIMIT: usize = 1 << 20;

/// A request as the vendors look at it.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) method: Method,
    /// `Host` without its port.
    pub(crate) host: String,
    pub(crate) path: String,
    pub(crate) query: BTreeMap<String, String>,
    /// A form's fields or a JSON object's members, as texts.
    pub(crate) fields: BTreeMap<String, String>,
    /// The token of an `Authorization` header, whatever its scheme.
    pub(crate) bearer: Option<String>,
}

fn pairs(text: &str) -> BTreeMap<String, String> {
    url::form_urlencoded::parse(text.as_bytes())
        .into_owned()
        .collect()
}

fn header_text(request: &Request<Body>, name: header::HeaderName) -> String {
    let value = request.headers().get(name);
    value
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default()
        .to_owned()
}

impl Call {
    /// Reads the request whole; else the answer that refuses it.
    pub(crate) async fn read(request: Request<Body>) -> Result<Self, Response> {
        let host = header_text(&request, header::HOST);
        let kind = header_text(&request, header::CONTENT_TYPE);
        let bearer = header_text(&request, header::AUTHORIZATION);
        let (parts, body) = request.into_parts();
        let body = Limited::new(body, BODY_LIMIT)
            .collect()
            .await
            .map_err(|err| (StatusCode::BAD_REQUEST, err.to_string()).into_response())?
            .to_bytes();
        let fields = if kind.starts_with("application/json") {
            members(&body)
        } else {
            pairs(&String::from_utf8_lossy(&body))
        };
        Ok(Self {
            method: parts.method,
            host: host.split(':').next().unwrap_or_default().to_owned(),
            path: parts.uri.path().to_owned(),
            query: pairs(parts.uri.query().unwrap_or_default()),
            fields,
            bearer: bearer.split_once(' ').map(|(_, token)| token.to_owned()),
        })
    }

    pub(crate) fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }

    pub(crate) fn param(&self, name: &str) -> &str {
        self.query.get(name).map_or("", String::as_str)
    }
}

fn members(body: &[u8]) -> BTreeMap<String, String> {
    let Ok(Value::Object(object)) = serde_json::from_slice(body) else {
        return BTreeMap::new();
    };
    let text = |value: &Value| {
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    object.iter().map(|(k, v)| (k.clone(), text(v))).collect()
}

pub(crate) fn json(status: StatusCode, value: &Value) -> Response {
    let kind = [(header::CONTENT_TYPE, "application/json")];
    (status, kind, value.to_string()).into_response()
}

pub(crate) fn ok(value: &Value) -> Response {
    json(StatusCode::OK, value)
}

/// Why a token endpoint gives nothing: RFC 6749's code, and words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OauthError(pub(crate) &'static str, pub(crate) &'static str);

impl OauthError {
    pub(crate) fn answer(self) -> Response {
        oauth_error(self.0, self.1)
    }
}

/// An error of a token endpoint (RFC 6749 section 5.2).
pub(crate) fn oauth_error(code: &str, description: &str) -> Response {
    let body = serde_json::json!({ "error": code, "error_description": description });
    json(StatusCode::BAD_REQUEST, &body)
}

pub(crate) fn html(page: String) -> Response {
    let kind = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (kind, page).into_response()
}

pub(crate) fn redirect(to: &str) -> Response {
    (StatusCode::FOUND, [(header::LOCATION, to)]).into_response()
}

pub(crate) fn not_found(call: &Call) -> Response {
    let what = format!(
        "the fake vendor has no {} https://{}{}",
        call.method, call.host, call.path
    );
    (StatusCode::NOT_FOUND, what).into_response()
}

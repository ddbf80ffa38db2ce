//! The OpenAPI document, and the same as a page without a script.
use axum::{
    Json,
    http::header,
    response::{Html, IntoResponse},
};
use serde_json::Value;
use std::{fmt::Write as _, sync::LazyLock};
use vestibule_api::error::ErrorBody;

static DOCUMENT: LazyLock<Value> =
    LazyLock::new(|| serde_json::to_value(super::openapi()).unwrap_or_default());
static PAGE: LazyLock<String> = LazyLock::new(|| page(&DOCUMENT));

/// The OpenAPI 3.1 document.
#[utoipa::path(get, path = "/api/openapi.json", tag = "system", operation_id = "openapi",
    responses((status = 200, body = Value), (status = 401, body = ErrorBody)))]
pub(super) async fn openapi() -> Json<&'static Value> {
    Json(&DOCUMENT)
}

/// The API for people.
#[utoipa::path(get, path = "/docs", tag = "system", operation_id = "docs",
    responses((status = 200, content_type = "text/html", body = String), (status = 401, body = ErrorBody)))]
pub(super) async fn docs() -> impl IntoResponse {
    let csp = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    (
        [(header::CONTENT_SECURITY_POLICY, csp)],
        Html(PAGE.as_str()),
    )
}

const STYLE: &str = ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;\
    padding:0 1rem}code{font-family:ui-monospace,monospace}section{border-top:1px solid #8886;padding:.5rem 0}\
    h3{margin:.5rem 0}.m{display:inline-block;min-width:4.5rem;font-weight:700}li{overflow-wrap:anywhere}";

fn page(document: &Value) -> String {
    let mut out = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>Vestibule API</title><style>{STYLE}</style><h1>Vestibule API</h1><p>{}</p>\
         <p><a href=/api/openapi.json>OpenAPI document</a></p>",
        escape(text(&document["info"], "description"))
    );
    for (path, item) in document["paths"].as_object().into_iter().flatten() {
        for (method, operation) in item.as_object().into_iter().flatten() {
            operation_section(&mut out, path, method, operation);
        }
    }
    out.push_str("<h2>Schemas</h2>");
    for (name, schema) in document["components"]["schemas"]
        .as_object()
        .into_iter()
        .flatten()
    {
        let _ = write!(
            out,
            "<section id=\"{0}\"><h3>{0}</h3><p>{1}</p><ul>",
            escape(name),
            escape(text(schema, "description"))
        );
        for (field, of) in schema["properties"].as_object().into_iter().flatten() {
            let _ = write!(
                out,
                "<li><code>{}</code> {} {}</li>",
                escape(field),
                kind(of),
                escape(text(of, "description"))
            );
        }
        for value in schema["enum"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
        {
            let _ = write!(out, "<li><code>{}</code></li>", escape(value));
        }
        out.push_str("</ul></section>");
    }
    out.push_str("</html>\n");
    out
}

fn operation_section(out: &mut String, path: &str, method: &str, operation: &Value) {
    let _ = write!(
        out,
        "<section><h3><span class=m>{}</span> <code>{}</code></h3><p>{}</p><ul>",
        method.to_uppercase(),
        escape(path),
        escape(text(operation, "summary"))
    );
    for parameter in operation["parameters"].as_array().into_iter().flatten() {
        let _ = write!(
            out,
            "<li>{} <code>{}</code> {}</li>",
            escape(text(parameter, "in")),
            escape(text(parameter, "name")),
            escape(text(parameter, "description"))
        );
    }
    let body = &operation["requestBody"]["content"]["application/json"]["schema"];
    if !body.is_null() {
        let _ = write!(out, "<li>body {}</li>", kind(body));
    }
    for (status, response) in operation["responses"].as_object().into_iter().flatten() {
        let schema = response["content"]
            .as_object()
            .and_then(|content| content.values().next())
            .map(|c| &c["schema"]);
        let _ = write!(
            out,
            "<li>{} {} {}</li>",
            escape(status),
            schema.map(kind).unwrap_or_default(),
            escape(text(response, "description"))
        );
    }
    out.push_str("</ul></section>");
}

/// A schema in a few words, with a link where it has a name.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"]
        .as_str()
        .and_then(|name| name.rsplit('/').next())
    {
        return format!("<a href=\"#{0}\">{0}</a>", escape(name));
    }
    if !schema["items"].is_null() {
        return format!("list of {}", kind(&schema["items"]));
    }
    match &schema["type"] {
        Value::String(name) => escape(name),
        Value::Array(names) => names
            .iter()
            .filter_map(Value::as_str)
            .map(escape)
            .collect::<Vec<_>>()
            .join(" or "),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
            let parts = schema["oneOf"].as_array().into_iter().flatten().map(kind);
            parts
                .filter(|part| !part.is_empty())
                .collect::<Vec<_>>()
                .join(" or ")
        }
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

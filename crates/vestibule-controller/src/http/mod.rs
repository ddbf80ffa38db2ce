//! The one port: API, events, viewer, dashboard, OpenAPI document and docs, same-origin.
mod assets;
mod credentials;
mod docs;
mod error;
mod events;
mod guard;
mod images;
mod login;

pub(crate) use login::new_code;
mod sessions;
mod sockets;
mod system;
mod vms;

use crate::core::Shared;
use axum::{
    Router, extract::DefaultBodyLimit, http::Method, middleware, response::IntoResponse as _,
};
use error::ApiError;
use utoipa::OpenApi as _;
use utoipa_axum::{router::OpenApiRouter, routes};
use vestibule_api::error::{ErrorBody, ErrorCode};

/// No request of ours is larger.
const BODY_LIMIT: usize = 64 << 10;

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Vestibule",
        description = "Sign-ins with official tools, in disposable virtual machines. Every operation but the liveness \
                       probe and the exchange of a one-time code needs `Authorization: Bearer` with the content of \
                       `$VESTIBULE_HOME/token`, or the dashboard's cookie.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(ErrorBody, vestibule_api::session::SessionEvent)),
    tags(
        (name = "sign-in", description = "One sign-in, from start to sealed credential"),
        (name = "machines", description = "VMs and their evidence"),
        (name = "credentials", description = "What lies in the vault"),
        (name = "system", description = "Health, readiness, images, providers"),
    )
)]
struct Document;

fn api() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(sessions::start))
        .routes(routes!(sessions::session))
        .routes(routes!(events::events))
        .routes(routes!(sessions::ticket))
        .routes(routes!(sessions::cancel))
        .routes(routes!(sessions::end))
        .routes(routes!(sessions::list))
        .routes(routes!(sockets::view))
        .routes(routes!(sockets::terminal))
        .routes(routes!(vms::list))
        .routes(routes!(vms::vm, vms::end))
        .routes(routes!(vms::console))
        .routes(routes!(vms::report))
        .routes(routes!(vms::verdict))
        .routes(routes!(vms::evidence))
        .routes(routes!(vms::evidence_file))
        .routes(routes!(images::list))
        .routes(routes!(images::providers))
        .routes(routes!(credentials::list))
        .routes(routes!(credentials::show, credentials::remove))
        .routes(routes!(credentials::content))
        .routes(routes!(login::code))
        .routes(routes!(login::login))
        .routes(routes!(login::logout))
        .routes(routes!(system::reconcilers))
        .routes(routes!(system::health))
        .routes(routes!(system::ready))
        .routes(routes!(system::metrics))
        .routes(routes!(docs::openapi))
        .routes(routes!(docs::docs))
}

/// The OpenAPI document, as `openapi/vestibule.json` holds it.
pub fn openapi() -> utoipa::openapi::OpenApi {
    api().into_openapi()
}

/// Everything that is served.
pub(crate) fn router(core: Shared) -> Router {
    let (router, _) = api().split_for_parts();
    router
        .method_not_allowed_fallback(async |method: Method| {
            ApiError::new(
                ErrorCode::MethodNotAllowed,
                format!("this route does not have the method {method}"),
                "see /docs for the methods of each route",
            )
        })
        .fallback(async |request: axum::extract::Request| {
            if request.uri().path().starts_with("/api/") {
                let err = ApiError::new(
                    ErrorCode::NotFound,
                    "there is no such route",
                    "see /docs for the routes",
                );
                return err.into_response();
            }
            assets::serve(&request)
        })
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(middleware::from_fn_with_state(core.clone(), guard::guard))
        .with_state(core)
}

//! The one port: API, events, viewer, dashboard, OpenAPI document and docs, same-origin.
mod assets;
mod credentials;
mod docs;
mod error;
mod events;
mod guard;
mod hosts;
mod images;
mod login;
mod me;
mod oidc;
mod people;

pub(crate) use guard::{Caller, policy};
pub(crate) use login::new_code;
mod sessions;
mod sockets;
mod system;
mod vms;

use crate::core::Shared;
use axum::{
    Router, extract::DefaultBodyLimit, http::Method, middleware, response::IntoResponse as _,
};
pub(crate) use error::ApiError;
use utoipa::{
    OpenApi as _,
    openapi::{
        ContentBuilder, Ref, RefOr, ResponseBuilder, Schema,
        schema::{SchemaType, Type},
        security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
    },
};
use utoipa_axum::{router::OpenApiRouter, routes};
use vestibule_api::error::{ErrorBody, ErrorCode};

/// No request of ours is larger.
const BODY_LIMIT: usize = 64 << 10;

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Vestibule",
        description = "Sign-ins with official tools, in disposable virtual machines. Every operation but the liveness \
                       probe and those that sign a dashboard in needs `Authorization: Bearer` with a service token or the \
                       content of `$VESTIBULE_HOME/token`, or the dashboard's cookie; and a role that may use it. What \
                       belongs to somebody else answers as if it were not there.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(ErrorBody, vestibule_api::session::SessionEvent)),
    tags(
        (name = "sign-in", description = "One sign-in, from start to sealed credential"),
        (name = "machines", description = "VMs and their evidence"),
        (name = "credentials", description = "What lies in the vault"),
        (name = "people", description = "Users, service tokens, organisations, and who asks"),
        (name = "system", description = "Health, readiness, images, providers"),
    )
)]
struct Document;

fn api() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(sessions::start))
        .routes(routes!(sessions::session))
        .routes(routes!(events::events))
        .routes(routes!(sessions::ticket, sessions::revoke))
        .routes(routes!(sessions::confirm))
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
        .routes(routes!(login::by_password))
        .routes(routes!(oidc::methods))
        .routes(routes!(oidc::begin))
        .routes(routes!(oidc::callback))
        .routes(routes!(login::logout))
        .routes(routes!(me::me))
        .routes(routes!(me::set_password))
        .routes(routes!(people::users, people::add_user))
        .routes(routes!(people::remove_user))
        .routes(routes!(people::set_password))
        .routes(routes!(people::tokens, people::add_token))
        .routes(routes!(people::revoke_token))
        .routes(routes!(people::organisations, people::add_organisation))
        .routes(routes!(people::remove_organisation))
        .routes(routes!(hosts::list))
        .routes(routes!(hosts::forget))
        .routes(routes!(system::reconcilers))
        .routes(routes!(system::health))
        .routes(routes!(system::ready))
        .routes(routes!(system::metrics))
        .routes(routes!(docs::openapi))
        .routes(routes!(docs::docs))
}

/// The OpenAPI document, as `openapi/vestibule.json` holds it.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = api().into_openapi();
    complete(&mut document);
    document
}

/// Adds what holds for every operation: how one shows who one is, and what any other refusal looks like.
fn complete(document: &mut utoipa::openapi::OpenApi) {
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some(
            "a service token, or the content of `$VESTIBULE_HOME/token`",
        ))
        .build();
    let components = document.components.get_or_insert_default();
    components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
    let needed = SecurityRequirement::new("bearer", Vec::<String>::new());
    document.security = Some(vec![needed]);
    let error = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("ErrorBody")))
        .build();
    let refusal = ResponseBuilder::new()
        .description("refused: who asks, their role, the request, or how often")
        .content("application/json", error)
        .build();
    for item in document.paths.paths.values_mut() {
        let operations = [
            &mut item.get,
            &mut item.put,
            &mut item.post,
            &mut item.delete,
        ];
        for operation in operations.into_iter().flatten() {
            let responses = &mut operation.responses.responses;
            responses.insert("default".to_owned(), RefOr::T(refusal.clone()));
            for parameter in operation.parameters.iter_mut().flatten() {
                if let RefOr::T(parameter) = parameter {
                    parameter.schema = parameter.schema.take().map(without_null);
                }
            }
        }
    }
}

/// A parameter that is left out is not there; there is no `null` in an address or a header.
fn without_null(mut schema: RefOr<Schema>) -> RefOr<Schema> {
    if let RefOr::T(Schema::Object(object)) = &mut schema
        && let SchemaType::Array(types) = &mut object.schema_type
    {
        types.retain(|kind| *kind != Type::Null);
        if let [kind] = &types[..] {
            object.schema_type = SchemaType::Type(kind.clone());
        }
    }
    if let RefOr::T(Schema::OneOf(one)) = &mut schema {
        one.items.retain(|item| {
            let null = SchemaType::Type(Type::Null);
            !matches!(item, RefOr::T(Schema::Object(object)) if object.schema_type == null)
        });
        if let [only] = &one.items[..] {
            return only.clone();
        }
    }
    schema
}

/// Everything that is served.
pub(crate) fn router(core: Shared) -> Router {
    let (router, _) = api().split_for_parts();
    router
        .method_not_allowed_fallback(async |method: Method| no_method(&method))
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

fn no_method(method: &Method) -> ApiError {
    ApiError::new(
        ErrorCode::MethodNotAllowed,
        format!("this route does not have the method {method}"),
        "see /docs for the methods of each route",
    )
}

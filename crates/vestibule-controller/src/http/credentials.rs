//! Credentials: metadata, removal, and the one way out of the vault, which is audited and never cached.
use super::{
    Caller,
    error::{ApiError, Body, Path},
};
use crate::{
    core::{Shared, off_runtime},
    peers,
    people::Owner,
};
use axum::{Json, extract::State, http::StatusCode};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use std::sync::Arc;
use vestibule_api::{
    control::{ContentFile, ContentReply, ContentRequest},
    error::{Chain, ErrorBody, ErrorCode},
    ids::CredentialId,
    session::{CredentialFileView, CredentialView},
};
use vestibule_vault::{Access, Content, CredentialMeta, ReadError, RemoveError, Vault};

const PURPOSE_LIMIT: usize = 200;

/// What lies in the vault; where hosts share the database, in the vaults of all of them.
#[utoipa::path(get, path = "/api/credentials", tag = "credentials", operation_id = "credentials",
    responses((status = 200, body = [CredentialView]),
        (status = 503, body = ErrorBody, description = "a host does not answer")))]
pub(super) async fn list(
    State(core): State<Shared>,
    caller: Caller,
) -> Result<Json<Vec<CredentialView>>, ApiError> {
    let scope = caller.scope()?;
    let owners = core.store.credential_owners().await?;
    let shown = |meta: &CredentialMeta| {
        let owner = owners.get(&meta.credential_id).cloned();
        scope.has(&owner.unwrap_or_else(Owner::local))
    };
    let listing = vault(&core, Vault::list)
        .await?
        .map_err(|err| ApiError::internal(&err))?;
    for (id, err) in &listing.damaged {
        tracing::error!(credential.id = %id, error = %Chain(err), "a record of the vault is damaged");
    }
    let credentials = listing.credentials.into_iter().filter(shown);
    let mut views: Vec<_> = credentials.map(view).collect();
    if core.store.is_shared() && !caller.relayed {
        // A list with a gap would say that a credential is not there.
        for host in core.store.hosts().await? {
            if host.id != core.store.host() {
                let theirs: Vec<CredentialView> =
                    peers::get(&core, &host, &caller.principal, "/api/credentials").await?;
                views.extend(theirs);
            }
        }
        views.sort_by_key(|view| view.credential_id);
    }
    Ok(Json(views))
}

/// One credential's metadata.
#[utoipa::path(get, path = "/api/credentials/{id}", tag = "credentials", operation_id = "credential",
    params(("id" = CredentialId, Path)),
    responses((status = 200, body = CredentialView), (status = 404, body = ErrorBody)))]
pub(super) async fn show(
    State(core): State<Shared>,
    Path(id): Path<CredentialId>,
) -> Result<Json<CredentialView>, ApiError> {
    let meta = vault(&core, move |vault| vault.show(id)).await?;
    meta.map(|meta| Json(view(meta)))
        .map_err(|err| read_error(&err))
}

/// Removes a credential.
#[utoipa::path(delete, path = "/api/credentials/{id}", tag = "credentials", operation_id = "removeCredential",
    params(("id" = CredentialId, Path)),
    responses((status = 204), (status = 404, body = ErrorBody)))]
pub(super) async fn remove(
    State(core): State<Shared>,
    Path(id): Path<CredentialId>,
    caller: Caller,
) -> Result<StatusCode, ApiError> {
    let access = Access {
        actor: caller.principal.actor(),
        purpose: "removed".to_owned(),
    };
    match vault(&core, move |vault| vault.remove(id, &access)).await? {
        Ok(()) => {
            core.store.forget_credential(id).await?;
            Ok(StatusCode::NO_CONTENT)
        }
        Err(RemoveError::NotFound(_)) => Err(ApiError::not_found(format!("credential {id}"))),
        Err(err) => Err(ApiError::internal(&err)),
    }
}

/// The bytes that the tool wrote. Before they leave, the audit log says so.
#[utoipa::path(post, path = "/api/credentials/{id}/content", tag = "credentials", operation_id = "credentialContent",
    params(("id" = CredentialId, Path)), request_body = ContentRequest,
    responses((status = 200, body = ContentReply), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 503, body = ErrorBody)))]
pub(super) async fn content(
    State(core): State<Shared>,
    Path(id): Path<CredentialId>,
    caller: Caller,
    Body(request): Body<ContentRequest>,
) -> Result<Json<ContentReply>, ApiError> {
    let purpose = request.purpose.trim();
    if purpose.is_empty() || purpose.chars().count() > PURPOSE_LIMIT {
        let fix =
            "say in 1 to 200 characters what the credential is for; it stands in the audit log";
        return Err(ApiError::new(
            ErrorCode::InvalidRequest,
            "purpose: missing or too long",
            fix,
        ));
    }
    let access = Access {
        actor: caller.principal.actor(),
        purpose: purpose.to_owned(),
    };
    let content = vault(&core, move |vault| vault.get(id, &access)).await?;
    let content = content.map_err(|err| read_error(&err))?;
    core.metrics.released.inc();
    tracing::info!(credential.id = %id, "a credential left the vault");
    Ok(Json(reply(&content)))
}

async fn vault<T: Send + 'static>(
    core: &Shared,
    work: impl FnOnce(&Vault) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let vault = Arc::clone(&core.vault);
    Ok(off_runtime(move || work(&vault)).await?)
}

fn view(meta: CredentialMeta) -> CredentialView {
    let file = |file: vestibule_vault::FileMeta| CredentialFileView {
        path: file.path,
        bytes: u64::try_from(file.bytes).unwrap_or(u64::MAX),
    };
    CredentialView {
        credential_id: meta.credential_id,
        provider: meta.provider,
        user_id: meta.user_id,
        account: meta.account,
        session_id: meta.session_id,
        created_at: meta.created_at,
        expires_at: meta.expires_at,
        files: meta.files.into_iter().map(file).collect(),
    }
}

fn reply(content: &Content) -> ContentReply {
    let file = |file: &vestibule_vault::ContentFile| ContentFile {
        path: file.path.clone(),
        mode: file.mode,
        content: BASE64.encode(file.bytes.expose()),
    };
    ContentReply {
        files: content.files.iter().map(file).collect(),
    }
}

fn read_error(err: &ReadError) -> ApiError {
    match err {
        ReadError::NotFound(id) => ApiError::not_found(format!("credential {id}")),
        ReadError::Audit { id, .. } => unaudited(*id, err),
        ReadError::NotCurrent(_) | ReadError::File { .. } | ReadError::Record { .. } => {
            ApiError::internal(err)
        }
    }
}

/// Without its line nothing leaves: whoever asked hears that, and the operator why.
fn unaudited(id: CredentialId, err: &(dyn std::error::Error + 'static)) -> ApiError {
    tracing::error!(credential.id = %id, error = %Chain(err), "the audit log can't be used: no credential leaves");
    ApiError::new(
        ErrorCode::Unavailable,
        "the audit log can't be written, and no credential leaves without its line",
        "make room on the vault's file system, then `vestibule audit verify`; the controller's log has the reason",
    )
}

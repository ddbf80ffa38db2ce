//! Images of the store, and providers with what they lack here.
use super::error::ApiError;
use crate::core::{Shared, off_runtime};
use axum::{Json, extract::State};
use vestibule_api::{
    image::{ImageView, Manifest},
    pack::{InstallKind, ProviderPack},
    session::ProviderView,
};

/// Images of the store.
#[utoipa::path(get, path = "/api/images", tag = "system", operation_id = "images",
    responses((status = 200, body = [ImageView])))]
pub(super) async fn list(State(core): State<Shared>) -> Result<Json<Vec<ImageView>>, ApiError> {
    let images = core.images.clone();
    off_runtime(move || images.list())
        .await?
        .map(Json)
        .map_err(|err| ApiError::internal(&err))
}

/// Providers, each with its flows and, where it can't be used now, why.
#[utoipa::path(get, path = "/api/providers", tag = "system", operation_id = "providers",
    responses((status = 200, body = [ProviderView])))]
pub(super) async fn providers(
    State(core): State<Shared>,
) -> Result<Json<Vec<ProviderView>>, ApiError> {
    let (images, alias) = (core.images.clone(), core.config.image.clone());
    let name = alias.clone();
    let image = off_runtime(move || images.resolve(&name)).await?;
    let views = core.packs.views(|pack| match &image {
        Ok(image) => lacks(&image.manifest, pack),
        Err(_) => Some(format!("no image is published under the alias `{alias}`")),
    });
    Ok(Json(views))
}

/// Why an image can't run a pack's tool.
pub(super) fn lacks(manifest: &Manifest, pack: &ProviderPack) -> Option<String> {
    let install = pack.install.as_ref()?;
    let id = pack.provider.id.as_str();
    let there = manifest.tools.iter().any(|tool| tool.provider == id)
        || manifest
            .features
            .iter()
            .any(|feature| feature.strip_prefix("tool:") == Some(id));
    if there || install.kind == InstallKind::Preinstalled {
        return None;
    }
    Some(format!(
        "the image `{}` has no tool for `{id}` ({})",
        manifest.recipe, install.package
    ))
}

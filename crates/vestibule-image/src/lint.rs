//! Reading an image as the diagnosis reads any disk: what in it could not start, found without starting it.
use crate::store::{Store, StoreError};
use vestibule_api::{finding::Verdict, ids::ImageDigest};
use vestibule_diagnose::Evidence;

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LintError {
    #[error(transparent)]
    Store(#[from] StoreError),
}

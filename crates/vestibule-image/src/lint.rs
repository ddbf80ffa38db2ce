//! Reading an image as the diagnosis reads any disk: what in it could not start, found without starting it.
use crate::{
    digest,
    store::{Store, StoreError},
};
use camino::{Utf8Path, Utf8PathBuf};
use vestibule_api::{finding::Verdict, ids::ImageDigest, image::Manifest};
use vestibule_diagnose::{Evidence, diagnose, disk::source::SeekSource};

/// Why an image cannot be read. What is wrong with one that can stands in the verdict.
#[derive(Debug, thiserror::Error)]
pub enum LintError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("read `{path}`")]
    Read {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("`{path}` is damaged: its digest is {actual}, the manifest says {expected}")]
    Damaged {
        path: Utf8PathBuf,
        expected: String,
        actual: String,
    },
}

/// Checks every artifact against the manifest, then judges the root image by the units that must run.
///
/// # Errors
/// [`LintError::Damaged`] when an artifact is not the one that the manifest names.
pub fn lint(store: &Store, digest: &ImageDigest) -> Result<Verdict, LintError> {
    let manifest = store.manifest(digest)?;
    let _hold = store.hold(digest)?;
    for (name, artifact) in &manifest.artifacts {
        let path = store.dir(digest).join(name);
        let actual = digest::of_file(&path).map_err(|err| LintError::Read {
            path: path.clone(),
            err,
        })?;
        if actual != artifact.sha256 {
            return Err(LintError::Damaged {
                path,
                expected: artifact.sha256.clone(),
                actual,
            });
        }
    }
    judge(&store.dir(digest), &manifest)
}

/// Judges the root image in `directory` by the units that must run.
pub(crate) fn judge(directory: &Utf8Path, manifest: &Manifest) -> Result<Verdict, LintError> {
    let path = directory.join("root.ext4");
    let source = std::fs::File::open(&path)
        .and_then(SeekSource::file)
        .map_err(|err| LintError::Read { path, err })?;
    let evidence = Evidence::new()
        .disk_image(source)
        .cmdline(manifest.cmdline.as_str());
    let units = manifest.required_units.iter();
    Ok(diagnose(&units.fold(evidence, Evidence::unit)))
}

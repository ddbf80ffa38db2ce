//! What the runner needs of an image: its manifest, checked against the specification, and the paths of its artifacts.
use crate::{file::FileIdentity, kept};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{self, Read},
};
use vestibule_api::machine::VmSpec;

/// A manifest lists every file of a root: some MiB at most.
const MANIFEST_LIMIT: u64 = 64 << 20;

/// The kernel as an ELF file, in the image's directory.
pub const VMLINUX: &str = "vmlinux";

/// Why an image cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("read the image's manifest `{path}`")]
    Read {
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("understand the image's manifest `{path}`")]
    Parse {
        path: Utf8PathBuf,
        #[source]
        err: serde_json::Error,
    },
    #[error("the image has no `{name}` in `{directory}`")]
    Artifact {
        name: &'static str,
        directory: Utf8PathBuf,
    },
    #[error("the image needs {needed} MiB of memory, the VM would have {given} MiB")]
    Memory { needed: u32, given: u32 },
}

/// Of an image's manifest ([`vestibule_api::image::Manifest`]), what a runner needs. The rest, which lists every file, is a hundred times
/// as long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Needed {
    pub cmdline: String,
    pub min_memory_mib: u32,
    pub features: Vec<String>,
    pub agent_build: String,
    pub required_units: Vec<String>,
}

/// An image that is held: while this exists, the store does not remove it.
#[derive(Debug)]
pub struct Image {
    pub manifest: Needed,
    pub root: Utf8PathBuf,
    pub kernel: Utf8PathBuf,
    /// The kernel as an ELF file; images that were built before there was a use for it have none.
    pub vmlinux: Option<Utf8PathBuf>,
    pub initrd: Utf8PathBuf,
    /// Locked shared (flock(2)); the store locks it exclusively before it removes an image.
    _hold: File,
}

impl Image {
    /// Opens and holds the image that `spec` names. Blocks on the disk.
    ///
    /// # Errors
    /// When manifest or artifacts are missing, or the VM is too small for the image.
    pub fn open(spec: &VmSpec) -> Result<Self, ImageError> {
        let directory = Utf8Path::new(&spec.image_dir);
        let path = directory.join("manifest.json");
        let unread = |err| ImageError::Read {
            path: path.clone(),
            err,
        };
        let held = |path: &Utf8Path| -> io::Result<(File, FileIdentity)> {
            let hold = File::open(path)?;
            flock(&hold, FlockOperation::NonBlockingLockShared)?;
            let identity = hold.metadata()?.into();
            Ok((hold, identity))
        };
        let (hold, identity) = held(&path).map_err(unread)?;
        let cache_dir = spec.cache_dir.as_deref().map(Utf8Path::new);
        let kept_as = format!("image-{}.json", spec.image_digest);
        let manifest: Needed = kept::find(cache_dir, &kept_as, Some(&identity), || {
            let mut bytes = Vec::new();
            let mut read = (&hold).take(MANIFEST_LIMIT);
            read.read_to_end(&mut bytes).map_err(unread)?;
            let path = path.clone();
            serde_json::from_slice(&bytes).map_err(|err| ImageError::Parse { path, err })
        })?;
        if spec.memory_mib < manifest.min_memory_mib {
            return Err(ImageError::Memory {
                needed: manifest.min_memory_mib,
                given: spec.memory_mib,
            });
        }
        Ok(Self {
            root: artifact(directory, "root.ext4")?,
            kernel: artifact(directory, "vmlinuz")?,
            vmlinux: artifact(directory, VMLINUX).ok(),
            initrd: artifact(directory, "initrd")?,
            manifest,
            _hold: hold,
        })
    }

    /// Whether the image has a screen.
    pub fn has_display(&self) -> bool {
        self.manifest.features.iter().any(|f| f == "display")
    }
}

fn artifact(directory: &Utf8Path, name: &'static str) -> Result<Utf8PathBuf, ImageError> {
    let path = directory.join(name);
    if path.is_file() {
        Ok(path)
    } else {
        Err(ImageError::Artifact {
            name,
            directory: directory.to_owned(),
        })
    }
}

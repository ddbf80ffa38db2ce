//! What the controller needs of the image store: which image an alias means now, its snapshot, and the list.
use crate::descriptors;
use camino::Utf8PathBuf;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use vestibule_api::{
    cause::Cause,
    error::Chain,
    finding::{Finding, Quote},
    ids::{ImageDigest, SnapshotId},
    image::{ImageView, Manifest},
    machine::{DriverChoice, RestoreSpec},
    pack::{InstallKind, ProviderPack},
};
use vestibule_image::{CacheError, Gc, Store, StoreError, store::Candidates};

/// An image that a VM can be made from.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) digest: ImageDigest,
    pub(crate) dir: Utf8PathBuf,
    pub(crate) manifest: Arc<Manifest>,
}

/// Manifests in memory: a host has few images that VMs are made from, and one manifest has some MiB.
const CACHED: usize = 8;

type Manifests = VecDeque<(ImageDigest, Arc<Manifest>)>;

/// The image store below the home directory.
#[derive(Clone, Debug)]
pub(crate) struct Images {
    home: Utf8PathBuf,
    /// A manifest never changes: its digest is the image's name. The newest last.
    manifests: Arc<Mutex<Manifests>>,
}

impl Images {
    pub(crate) fn new(home: Utf8PathBuf) -> Self {
        Self {
            home,
            manifests: Arc::default(),
        }
    }

    /// The image that `alias` points to now. Reads files; call it off the runtime.
    pub(crate) fn resolve(&self, alias: &str) -> Result<Image, StoreError> {
        let store = Store::open(&self.home)?;
        let digest = store.resolve(alias)?;
        let dir = store.dir(&digest);
        let manifest = match self
            .cached(&digest)
            .filter(|_| dir.join("manifest.json").exists())
        {
            Some(manifest) => manifest,
            None => self.remember(&digest, store.manifest(&digest)?),
        };
        Ok(Image {
            digest,
            dir,
            manifest,
        })
    }

    fn cached(&self, digest: &ImageDigest) -> Option<Arc<Manifest>> {
        let manifests = self.manifests.lock();
        let manifests = manifests.unwrap_or_else(PoisonError::into_inner);
        let found = manifests.iter().find(|(known, _)| known == digest);
        found.map(|(_, manifest)| Arc::clone(manifest))
    }

    fn remember(&self, digest: &ImageDigest, manifest: Manifest) -> Arc<Manifest> {
        let manifest = Arc::new(manifest);
        let manifests = self.manifests.lock();
        let mut manifests = manifests.unwrap_or_else(PoisonError::into_inner);
        if manifests.len() >= CACHED {
            manifests.pop_front();
        }
        manifests.push_back((digest.clone(), Arc::clone(&manifest)));
        manifest
    }

    /// The digest that `alias` points to now, if any.
    pub(crate) fn current(&self, alias: &str) -> Option<ImageDigest> {
        Store::open(&self.home)
            .and_then(|store| store.resolve(alias))
            .ok()
    }

    /// The snapshots of an image for VMs of this size. Reads manifests; call it off the runtime.
    pub(crate) fn snapshots_for(
        &self,
        digest: &ImageDigest,
        memory_mib: u32,
        vcpus: u32,
        driver: DriverChoice,
    ) -> Result<Candidates, StoreError> {
        Store::open(&self.home)?.snapshots_for(digest, memory_mib, vcpus, driver)
    }

    /// What a runner needs to restore from a snapshot.
    pub(crate) fn restore(&self, id: &SnapshotId) -> Result<RestoreSpec, StoreError> {
        Ok(RestoreSpec {
            id: id.clone(),
            dir: Store::open(&self.home)?.snapshot_dir(id).into_string(),
        })
    }

    /// Removes what no alias, rollback or VM needs, and that was built longer than `keep` ago; none where somebody does that
    /// just now. Call it off the runtime.
    pub(crate) fn collect(&self, keep: Duration) -> Result<Option<Gc>, StoreError> {
        match Store::open(&self.home)?.gc(keep) {
            Err(StoreError::Cache(CacheError::Busy { .. })) => Ok(None),
            gone => gone.map(Some),
        }
    }

    /// Every image of the store.
    pub(crate) fn list(&self) -> Result<Vec<ImageView>, StoreError> {
        Store::open(&self.home)?.list()
    }
}

/// Where the tool that a pack was written for is not the one in the image.
pub(crate) fn differences(manifest: &Manifest, pack: &ProviderPack) -> Vec<String> {
    let Some(install) = &pack.install else {
        return Vec::new();
    };
    if install.kind == InstallKind::Preinstalled {
        return Vec::new();
    }
    let (recipe, id) = (&manifest.recipe, pack.provider.id.as_str());
    let Some(tool) = manifest.tools.iter().find(|tool| tool.provider == id) else {
        return vec![format!("the image `{recipe}` has no tool for `{id}`")];
    };
    [
        ("install.package", &install.package, &tool.package),
        ("install.version", &install.version, &tool.version),
        ("install.bin", &install.bin, &tool.path),
    ]
    .into_iter()
    .filter(|(_, pack, image)| pack != image)
    .map(|(key, pack, image)| format!("`{key}`: `{pack}`; the image `{recipe}` has `{image}`"))
    .collect()
}

/// What makes an image usable under an alias.
pub(crate) fn how_to_make(alias: &str) -> String {
    format!("d=$(vestibule image build images/{alias}) && vestibule image publish {alias} $d")
}

/// There is no image to make a VM from, or none that could be looked at now.
pub(crate) fn missing(alias: &str, err: &StoreError) -> Finding {
    let quote = Quote {
        source: "store".to_owned(),
        line: None,
        text: Chain(err).to_string(),
    };
    if descriptors::are_gone(err) {
        return descriptors::finding(quote);
    }
    Finding::new(
        Cause::ImageMissing,
        quote,
        format!("no image can be used under the alias `{alias}`"),
        how_to_make(alias),
    )
    .refuted_by(format!("`vestibule image list` shows the alias `{alias}`"))
}

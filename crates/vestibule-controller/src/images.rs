//! What the controller needs of the image store: which image an alias means now, and the list.
use camino::Utf8PathBuf;
use vestibule_api::{
    cause::Cause,
    error::Chain,
    finding::{Finding, Quote},
    ids::ImageDigest,
    image::{ImageView, Manifest},
    pack::{InstallKind, ProviderPack},
};
use vestibule_image::{Store, StoreError};

/// An image that a VM can be made from.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) digest: ImageDigest,
    pub(crate) dir: Utf8PathBuf,
    pub(crate) manifest: Manifest,
}

/// The image store below the home directory.
#[derive(Clone, Debug)]
pub(crate) struct Images {
    home: Utf8PathBuf,
}

impl Images {
    pub(crate) fn new(home: Utf8PathBuf) -> Self {
        Self { home }
    }

    /// The image that `alias` points to now. Reads files; call it off the runtime.
    pub(crate) fn resolve(&self, alias: &str) -> Result<Image, StoreError> {
        let store = Store::open(&self.home)?;
        let digest = store.resolve(alias)?;
        let manifest = store.manifest(&digest)?;
        let dir = store.dir(&digest);
        Ok(Image {
            digest,
            dir,
            manifest,
        })
    }

    /// The digest that `alias` points to now, if any.
    pub(crate) fn current(&self, alias: &str) -> Option<ImageDigest> {
        Store::open(&self.home)
            .and_then(|store| store.resolve(alias))
            .ok()
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
    format!(
        "d=$(vestibule image build images/{alias}) && vestibule image verify $d && vestibule image publish {alias} $d"
    )
}

/// There is no image to make a VM from.
pub(crate) fn missing(alias: &str, err: &StoreError) -> Finding {
    let quote = Quote {
        source: "store".to_owned(),
        line: None,
        text: Chain(err).to_string(),
    };
    Finding::new(
        Cause::ImageMissing,
        quote,
        format!("no image can be used under the alias `{alias}`"),
        how_to_make(alias),
    )
    .refuted_by(format!("`vestibule image list` shows the alias `{alias}`"))
}

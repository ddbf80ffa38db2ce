//! Provider packs: the built-in ones, the operator's files in `$VESTIBULE_HOME/providers`, and the configuration's changes.
use camino::{Utf8Path, Utf8PathBuf};
use rust_embed::RustEmbed;
use std::collections::BTreeMap;
use vestibule_api::{
    ids::ProviderId,
    pack::{Override, PackErrors, ProviderPack},
    session::{FlowView, ProviderView},
};

#[derive(RustEmbed)]
#[folder = "../../providers"]
struct BuiltIn;

/// Why the packs can't be read.
#[derive(Debug, thiserror::Error)]
pub enum PacksError {
    #[error("read provider packs of `{path}`")]
    Read {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("understand a provider pack")]
    Pack(#[from] PackErrors),
    #[error("`[providers.{0}]` changes a provider pack that does not exist")]
    Unknown(ProviderId),
}

/// The packs as files say: built-in ones, replaced or joined by those of `home/providers/*.toml`. No parameters are
/// filled in yet.
///
/// # Errors
/// When a file can't be read or is not a pack; the message names file, key and what was expected.
pub fn packs(home: &Utf8Path) -> Result<Vec<ProviderPack>, PacksError> {
    let mut packs = BTreeMap::new();
    let mut add = |file: &str, text: &str| -> Result<(), PacksError> {
        let pack = ProviderPack::parse(file, text)?;
        packs.insert(pack.provider.id.clone(), pack);
        Ok(())
    };
    for file in BuiltIn::iter().filter(|file| file.ends_with(".toml")) {
        if let Some(found) = BuiltIn::get(&file) {
            add(&file, &String::from_utf8_lossy(&found.data))?;
        }
    }
    let dir = home.join("providers");
    for path in toml_files(&dir).map_err(|err| PacksError::Read {
        path: dir.clone(),
        err,
    })? {
        let text = std::fs::read_to_string(&path).map_err(|err| PacksError::Read {
            path: path.clone(),
            err,
        })?;
        add(path.file_name().unwrap_or_default(), &text)?;
    }
    Ok(packs.into_values().collect())
}

fn toml_files(dir: &Utf8Path) -> std::io::Result<Vec<Utf8PathBuf>> {
    let entries = match dir.read_dir_utf8() {
        Ok(entries) => entries,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(err) => return Err(err),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path().to_owned();
        if path.extension() == Some("toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// A pack as sessions use it, or why they can't.
#[derive(Clone, Debug)]
struct Entry {
    /// As its file says.
    pack: ProviderPack,
    /// With the configuration's changes and parameters.
    usable: Result<ProviderPack, PackErrors>,
}

/// Every pack, ready for use.
#[derive(Clone, Debug)]
pub(crate) struct Packs(BTreeMap<ProviderId, Entry>);

impl Packs {
    /// Reads the packs and applies the configuration's changes. A pack whose parameters are not given is no error: its
    /// provider is shown as unavailable.
    pub(crate) fn load(
        home: &Utf8Path,
        changes: &BTreeMap<ProviderId, Override>,
    ) -> Result<Self, PacksError> {
        let none = Override::default();
        let mut entries = BTreeMap::new();
        for pack in packs(home)? {
            let usable = pack.apply(changes.get(&pack.provider.id).unwrap_or(&none));
            entries.insert(pack.provider.id.clone(), Entry { pack, usable });
        }
        if let Some(unknown) = changes.keys().find(|id| !entries.contains_key(*id)) {
            return Err(PacksError::Unknown(unknown.clone()));
        }
        Ok(Self(entries))
    }

    /// Ids of all packs.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &ProviderId> {
        self.0.keys()
    }

    /// The pack to sign in with: none where there is no such provider, an error where it lacks something.
    pub(crate) fn get(&self, id: &ProviderId) -> Option<Result<&ProviderPack, String>> {
        self.0
            .get(id)
            .map(|entry| entry.usable.as_ref().map_err(why))
    }

    /// What the dashboard shows. `lacks` says why an image can't run a pack's tool.
    pub(crate) fn views(
        &self,
        lacks: impl Fn(&ProviderPack) -> Option<String>,
    ) -> Vec<ProviderView> {
        self.0.values().map(|entry| view(entry, &lacks)).collect()
    }
}

fn why(errors: &PackErrors) -> String {
    let problems: Vec<_> = errors.problems.iter().map(ToString::to_string).collect();
    problems.join("; ")
}

fn view(entry: &Entry, lacks: &impl Fn(&ProviderPack) -> Option<String>) -> ProviderView {
    let pack = &entry.pack;
    ProviderView {
        id: pack.provider.id.clone(),
        name: pack.provider.name.clone(),
        vendor: pack.provider.vendor.clone(),
        homepage: pack.provider.homepage.clone(),
        terms_note: pack.terms.note.clone(),
        terms_url: pack.terms.url.clone(),
        flows: pack
            .flow
            .iter()
            .map(|flow| FlowView {
                id: flow.id.clone(),
                title: flow.title.clone(),
            })
            .collect(),
        unavailable: entry.usable.as_ref().err().map(why).or_else(|| lacks(pack)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vestibule_api::error::Chain;

    #[test]
    fn built_in_packs_are_packs() {
        let home = camino_tempfile::tempdir().unwrap();
        let packs = Packs::load(home.path(), &BTreeMap::new()).unwrap();
        for id in ["codex", "claude", "gemini", "gh", "wrangler", "oidc"] {
            assert!(packs.get(&id.parse().unwrap()).is_some(), "{id}");
        }
        let views = packs.views(|_| None);
        let oidc = views.iter().find(|v| v.id.as_str() == "oidc").unwrap();
        assert!(
            oidc.unavailable.as_ref().unwrap().contains("issuer"),
            "{oidc:?}"
        );
        let gh = views.iter().find(|v| v.id.as_str() == "gh").unwrap();
        assert!(gh.unavailable.is_none() && !gh.flows.is_empty());
    }

    #[test]
    fn a_change_of_no_pack_and_a_broken_file_are_named() {
        let home = camino_tempfile::tempdir().unwrap();
        let changes = BTreeMap::from([("nobody".parse().unwrap(), Override::default())]);
        let err = Packs::load(home.path(), &changes).unwrap_err();
        assert!(err.to_string().contains("providers.nobody"));
        std::fs::create_dir(home.path().join("providers")).unwrap();
        std::fs::write(home.path().join("providers/mine.toml"), "schema = 9\n").unwrap();
        let err = Packs::load(home.path(), &BTreeMap::new()).unwrap_err();
        assert!(
            Chain(&err).to_string().contains("mine.toml"),
            "{}",
            Chain(&err)
        );
    }
}

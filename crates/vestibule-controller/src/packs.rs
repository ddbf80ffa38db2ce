//! Provider packs: the built-in ones, the operator's files in `$VESTIBULE_HOME/providers`, and the configuration's changes.
use crate::{config::Config, images};
use camino::{Utf8Path, Utf8PathBuf};
use rust_embed::RustEmbed;
use serde::Serialize;
use std::collections::BTreeMap;
use vestibule_api::{
    ids::ProviderId,
    image::Manifest,
    pack::{Override, PackErrors, Parameter, Problem, ProviderPack},
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

/// A pack's text and where it comes from.
#[derive(Debug)]
struct Source {
    /// The file's name without `.toml`, which is the id of the pack if it is one.
    stem: String,
    /// None: built in.
    path: Option<Utf8PathBuf>,
    text: String,
}

impl Source {
    /// The name that stands in messages.
    fn file(&self) -> String {
        format!("{}.toml", self.stem)
    }
}

/// Built-in packs, replaced or joined by the files `home/providers/*.toml`, by name.
fn sources(home: &Utf8Path) -> Result<Vec<Source>, PacksError> {
    let mut sources = BTreeMap::new();
    let mut add = |file: &str, path: Option<Utf8PathBuf>, text: String| {
        let stem = file.trim_end_matches(".toml").to_owned();
        sources.insert(stem.clone(), Source { stem, path, text });
    };
    for file in BuiltIn::iter().filter(|file| file.ends_with(".toml")) {
        if let Some(found) = BuiltIn::get(&file) {
            add(&file, None, String::from_utf8_lossy(&found.data).into());
        }
    }
    let dir = home.join("providers");
    let failed = |path: &Utf8Path| {
        let path = path.to_owned();
        |err| PacksError::Read { path, err }
    };
    for path in toml_files(&dir).map_err(failed(&dir))? {
        let text = std::fs::read_to_string(&path).map_err(failed(&path))?;
        let file = path.file_name().unwrap_or_default().to_owned();
        add(&file, Some(path), text);
    }
    Ok(sources.into_values().collect())
}

/// The packs as files say: built-in ones, replaced or joined by those of `home/providers/*.toml`. No parameters are
/// filled in yet.
///
/// # Errors
/// When a file can't be read or is not a pack; the message names file, key and what was expected.
pub fn packs(home: &Utf8Path) -> Result<Vec<ProviderPack>, PacksError> {
    let parse = |source: &Source| Ok(ProviderPack::parse(&source.file(), &source.text)?);
    sources(home)?.iter().map(parse).collect()
}

/// What is wrong with one pack, if anything: the answer of `vestibule provider check`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PackCheck {
    /// The provider's id.
    pub provider: String,
    /// Where the pack stands: a path, or `built-in`.
    pub file: String,
    /// What is wrong in the file, in what the configuration makes of it, or between it and an image.
    pub problems: Vec<String>,
    /// Parameters without a value. The pack is right and can't be used yet.
    pub missing: Vec<String>,
}

/// Checks every pack that `config` would serve, also against the tools of `image`.
///
/// # Errors
/// When a file can't be read, or the configuration changes a pack that does not exist.
pub fn check_packs(
    config: &Config,
    image: Option<&Manifest>,
) -> Result<Vec<PackCheck>, PacksError> {
    let sources = sources(&config.home)?;
    let known = |id: &ProviderId| sources.iter().any(|source| source.stem == id.as_str());
    if let Some(unknown) = config.providers.keys().find(|id| !known(id)) {
        return Err(PacksError::Unknown(unknown.clone()));
    }
    Ok(sources
        .iter()
        .map(|source| check_source(source, config, image))
        .collect())
}

fn check_source(source: &Source, config: &Config, image: Option<&Manifest>) -> PackCheck {
    let mut check = PackCheck {
        provider: source.stem.clone(),
        file: match &source.path {
            Some(path) => path.to_string(),
            None => "built-in".to_owned(),
        },
        problems: Vec::new(),
        missing: Vec::new(),
    };
    let pack = match ProviderPack::parse(&source.file(), &source.text) {
        Ok(pack) => pack,
        Err(errors) => {
            check.problems = errors.problems.iter().map(ToString::to_string).collect();
            return check;
        }
    };
    let none = Override::default();
    let change = config.providers.get(&pack.provider.id).unwrap_or(&none);
    let open = |p: &&Parameter| p.default.is_none() && !change.parameters.contains_key(&p.name);
    let missing = pack.parameter.iter().filter(open);
    check.missing = missing.map(|p| p.name.clone()).collect();
    if let Err(errors) = pack.apply(change) {
        let is_missing = |p: &&Problem| {
            p.key
                .strip_prefix("parameters.")
                .is_some_and(|name| check.missing.iter().any(|missing| missing == name))
        };
        let (_, wrong): (Vec<_>, Vec<_>) = errors.problems.iter().partition(is_missing);
        let section = format!("[providers.{}]", pack.provider.id);
        check.problems = wrong.iter().map(|p| format!("{section} {p}")).collect();
    }
    if let Some(manifest) = image {
        check.problems.extend(images::differences(manifest, &pack));
    }
    check
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
    fn every_pack_is_checked_with_what_the_configuration_makes_of_it() {
        let home = camino_tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("providers")).unwrap();
        std::fs::write(home.path().join("providers/mine.toml"), "schema = 9\n").unwrap();
        let mut config = Config::load(None, home.path()).unwrap();
        let bad = Override {
            hosts: vec!["A B".to_owned()],
            ..Override::default()
        };
        config.providers.insert("gh".parse().unwrap(), bad);
        let manifest = serde_json::json!({
            "schema": 1, "recipe": "browser", "recipeDigest": "", "artifacts": {}, "kernelRelease": "", "cmdline": "",
            "drivers": [], "minMemoryMib": 1, "defaultMemoryMib": 1, "defaultVcpus": 1, "requiredUnits": [],
            "features": [], "agentBuild": "", "packages": [], "files": {},
            "tools": [{"provider": "codex", "package": "@openai/codex", "version": "0.1.0", "path": "/usr/local/bin/codex"}],
        });
        let manifest: Manifest = serde_json::from_value(manifest).unwrap();
        let checks = check_packs(&config, Some(&manifest)).unwrap();
        let of = |id: &str| checks.iter().find(|c| c.provider == id).unwrap();
        assert!(of("mine").problems[0].contains("provider"), "{checks:?}");
        assert!(of("mine").file.ends_with("providers/mine.toml"));
        assert!(
            of("gh").problems[0].contains("[providers.gh] `hosts[0]`"),
            "{checks:?}"
        );
        assert_eq!(of("oidc").missing, ["issuer", "client_id"]);
        assert!(of("oidc").problems.is_empty(), "{checks:?}");
        let codex = of("codex").problems.join("; ");
        assert!(
            codex.contains("install.version") && codex.contains("0.1.0"),
            "{codex}"
        );
        assert!(of("claude").problems[0].contains("no tool"), "{checks:?}");
        config
            .providers
            .insert("nobody".parse().unwrap(), Override::default());
        assert!(matches!(
            check_packs(&config, None),
            Err(PacksError::Unknown(_))
        ));
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

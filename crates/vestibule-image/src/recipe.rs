//! Recipes: what an image is made of, as `recipe.toml` says it.
//!
//! A recipe is a directory: `recipe.toml`, `overlay/` (files as they stand in the guest) and `units/` (systemd units).
//! One with `base` begins with everything of another recipe beside it; lists are joined, single values replaced.
use camino::{Utf8Path, Utf8PathBuf};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use vestibule_api::machine::VCPUS;

/// The only version of the format.
const SCHEMA: u32 = 1;
/// So many recipes may stand on each other.
const DEPTH: usize = 8;

/// Why a recipe cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    #[error("read the recipe `{path}`")]
    Read {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("understand the recipe `{path}`")]
    Parse {
        path: Utf8PathBuf,
        #[source]
        err: Box<toml::de::Error>,
    },
    #[error("`{path}`: {what}")]
    Invalid { path: Utf8PathBuf, what: String },
    #[error("`{path}` does not say `{key}`, nor does a recipe that it stands on")]
    Missing {
        path: Utf8PathBuf,
        key: &'static str,
    },
}

/// One `recipe.toml`, as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema: u32,
    name: String,
    base: Option<String>,
    suite: Option<String>,
    #[serde(default)]
    packages: BTreeSet<String>,
    #[serde(default)]
    exclude: Vec<String>,
    #[serde(default)]
    keep: Vec<String>,
    #[serde(default)]
    remove: Vec<String>,
    #[serde(default)]
    features: BTreeSet<String>,
    kernel: Option<Kernel>,
    machine: Option<Machine>,
    #[serde(default)]
    users: Vec<User>,
    #[serde(default)]
    units: Units,
    #[serde(default)]
    links: BTreeMap<String, String>,
    #[serde(default)]
    authorities: BTreeSet<String>,
    npm: Option<Npm>,
    #[serde(default)]
    tools: Vec<ToolRule>,
    #[serde(default)]
    programs: BTreeMap<String, Program>,
}

/// The kernel that belongs to the image.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kernel {
    /// A package that depends on the newest kernel of its kind.
    pub(crate) package: String,
    /// Modules that the initrd loads; what they depend on is found.
    pub(crate) modules: Vec<String>,
    pub(crate) cmdline: String,
}

/// What the VM needs.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Machine {
    pub(crate) min_memory_mib: u32,
    pub(crate) default_memory_mib: u32,
    pub(crate) default_vcpus: u32,
}

/// An account; everything below its home belongs to it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// What systemd does with the units.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Units {
    pub(crate) default_target: Option<String>,
    pub(crate) enable: BTreeSet<String>,
    /// Must be active before the VM counts as ready.
    pub(crate) required: BTreeSet<String>,
    pub(crate) mask: BTreeSet<String>,
    /// Masks every generator that the packages bring.
    pub(crate) mask_generators: bool,
}

/// Tools from npm, installed exactly as a lock file says.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Npm {
    /// Directory in the recipe with `package.json` and `package-lock.json`.
    pub(crate) lock: String,
    /// Where `node_modules` goes in the guest.
    pub(crate) into: String,
    /// Paths below `into`, `*` for one component and `**` for any, that the guest does without.
    #[serde(default)]
    pub(crate) drop: Vec<String>,
}

/// One provider's tool.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ToolRule {
    /// Id of the provider's pack.
    pub(crate) provider: String,
    /// Name of the npm or Debian package that says its version.
    pub(crate) package: String,
    /// Where the pack finds the program.
    pub(crate) path: String,
    pub(crate) program: Program,
}

/// What a program must be, so that a stub cannot take its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Program {
    /// An x86-64 ELF executable.
    Elf,
    /// A script whose interpreter leads to an ELF executable.
    Script,
}

/// A recipe with all that it stands on.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    pub(crate) name: String,
    /// Directories of the recipes, the base first.
    pub(crate) directories: Vec<Utf8PathBuf>,
    pub(crate) suite: String,
    pub(crate) packages: BTreeSet<String>,
    pub(crate) exclude: Vec<String>,
    pub(crate) keep: Vec<String>,
    pub(crate) remove: Vec<String>,
    pub(crate) features: BTreeSet<String>,
    pub(crate) kernel: Kernel,
    pub(crate) machine: Machine,
    pub(crate) users: Vec<User>,
    pub(crate) units: Units,
    pub(crate) links: BTreeMap<String, String>,
    /// Certificate authorities given at build time, by name, that everything in the image trusts.
    pub(crate) authorities: BTreeSet<String>,
    pub(crate) npm: Option<(Utf8PathBuf, Npm)>,
    pub(crate) tools: Vec<ToolRule>,
    pub(crate) programs: BTreeMap<String, Program>,
}

impl Recipe {
    /// Reads the recipe in `directory` and those that it stands on.
    ///
    /// # Errors
    /// [`RecipeError`], naming file and key.
    pub(crate) fn load(directory: &Utf8Path) -> Result<Self, RecipeError> {
        let files = chain(directory)?;
        let path = directory.join("recipe.toml");
        let missing = |key| RecipeError::Missing {
            path: path.clone(),
            key,
        };
        let last = |pick: fn(&File) -> Option<&str>| {
            files
                .iter()
                .rev()
                .find_map(|(_, file)| pick(file).map(str::to_owned))
        };
        let recipe = Self {
            name: files
                .last()
                .map(|(_, file)| file.name.clone())
                .ok_or_else(|| missing("name"))?,
            suite: last(|file| file.suite.as_deref()).ok_or_else(|| missing("suite"))?,
            kernel: files
                .iter()
                .rev()
                .find_map(|(_, file)| file.kernel.clone())
                .ok_or_else(|| missing("kernel"))?,
            machine: files
                .iter()
                .rev()
                .find_map(|(_, file)| file.machine.clone())
                .ok_or_else(|| missing("machine"))?,
            npm: files.iter().rev().find_map(|(directory, file)| {
                file.npm.clone().map(|npm| (directory.join(&npm.lock), npm))
            }),
            packages: join(&files, |file| &file.packages),
            exclude: join(&files, |file| &file.exclude),
            keep: join(&files, |file| &file.keep),
            remove: join(&files, |file| &file.remove),
            features: join(&files, |file| &file.features),
            users: join(&files, |file| &file.users),
            tools: join(&files, |file| &file.tools),
            authorities: join(&files, |file| &file.authorities),
            links: files
                .iter()
                .flat_map(|(_, file)| file.links.clone())
                .collect(),
            programs: files
                .iter()
                .flat_map(|(_, file)| file.programs.clone())
                .collect(),
            units: Units {
                default_target: last(|file| file.units.default_target.as_deref()),
                enable: join(&files, |file| &file.units.enable),
                required: join(&files, |file| &file.units.required),
                mask: join(&files, |file| &file.units.mask),
                mask_generators: files.iter().any(|(_, file)| file.units.mask_generators),
            },
            directories: files.into_iter().map(|(directory, _)| directory).collect(),
        };
        recipe
            .check()
            .map_err(|what| RecipeError::Invalid { path, what })?;
        Ok(recipe)
    }

    /// Feature names as the manifest lists them: those of the recipe and one for each provider's tool.
    pub(crate) fn all_features(&self) -> Vec<String> {
        let tools = self
            .tools
            .iter()
            .map(|tool| format!("tool:{}", tool.provider));
        self.features.iter().cloned().chain(tools).collect()
    }

    fn check(&self) -> Result<(), String> {
        if !is_plain(&self.name) {
            return Err(format!(
                "`name` is `{}`; it may have lower-case letters, digits and `-`",
                self.name
            ));
        }
        let packages = self.packages.iter().chain([&self.kernel.package]);
        for package in packages {
            if !is_plain(package) {
                return Err(format!("`{package}` is not the name of a Debian package"));
            }
        }
        if self.machine.min_memory_mib > self.machine.default_memory_mib {
            return Err(
                "`machine.default_memory_mib` is less than `machine.min_memory_mib`".to_owned(),
            );
        }
        let vcpus = self.machine.default_vcpus;
        if !VCPUS.contains(&vcpus) {
            return Err(format!(
                "`machine.default_vcpus` is {vcpus}; expected {VCPUS:?}"
            ));
        }
        if let Some(unit) = self.units.enable.intersection(&self.units.mask).next() {
            return Err(format!("unit `{unit}` is both enabled and masked"));
        }
        if let Some(unit) = self.units.required.difference(&self.units.enable).next() {
            return Err(format!("unit `{unit}` is required but not enabled"));
        }
        let paths = self.links.keys().chain(self.programs.keys());
        for path in paths.chain(self.tools.iter().map(|tool| &tool.path)) {
            if !path.starts_with('/') {
                return Err(format!("`{path}` is not an absolute path of the guest"));
            }
        }
        Ok(())
    }
}

/// The files of `directory` and its bases, the deepest base first.
fn chain(directory: &Utf8Path) -> Result<Vec<(Utf8PathBuf, File)>, RecipeError> {
    let mut files = Vec::new();
    let mut next = Some(directory.to_owned());
    while let Some(directory) = next {
        let path = directory.join("recipe.toml");
        let text = std::fs::read_to_string(&path).map_err(|err| RecipeError::Read {
            path: path.clone(),
            err,
        })?;
        let file: File = toml::from_str(&text).map_err(|err| RecipeError::Parse {
            path: path.clone(),
            err: Box::new(err),
        })?;
        let invalid = |what: String| RecipeError::Invalid {
            path: path.clone(),
            what,
        };
        if file.schema != SCHEMA {
            return Err(invalid(format!(
                "`schema` is {}, this program reads {SCHEMA}",
                file.schema
            )));
        }
        if files.len() == DEPTH {
            return Err(invalid(format!(
                "more than {DEPTH} recipes stand on each other: is `base` a circle?"
            )));
        }
        if let Some(base) = file.base.as_deref().filter(|base| !is_plain(base)) {
            return Err(invalid(format!(
                "`base` is `{base}`; it is the name of a directory beside this one"
            )));
        }
        next = file.base.as_ref().map(|base| sibling(&directory, base));
        files.push((directory, file));
    }
    files.reverse();
    Ok(files)
}

fn sibling(directory: &Utf8Path, name: &str) -> Utf8PathBuf {
    match directory.parent() {
        Some(parent) if directory.file_name().is_some() => parent.join(name),
        Some(_) | None => directory.join("..").join(name),
    }
}

fn join<T, C>(files: &[(Utf8PathBuf, File)], pick: impl Fn(&File) -> &C) -> C
where
    T: Clone,
    C: FromIterator<T> + Clone + IntoIterator<Item = T>,
{
    files
        .iter()
        .flat_map(|(_, file)| pick(file).clone())
        .collect()
}

fn is_plain(name: &str) -> bool {
    let ok =
        |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'+' | b'.');
    name.bytes()
        .next()
        .is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        && name.bytes().all(ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_that_firecracker_does_not_take_are_refused() {
        let images = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("../../images");
        let mut recipe = Recipe::load(&images.join("tiny")).unwrap();
        for vcpus in [0, 33] {
            recipe.machine.default_vcpus = vcpus;
            let what = recipe.check().unwrap_err();
            assert!(what.contains("machine.default_vcpus"), "{what}");
        }
        recipe.machine.default_vcpus = 32;
        recipe.check().unwrap();
    }
}

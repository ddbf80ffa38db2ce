//! What changed from one image to another, as their manifests say it. Pure.
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};
use vestibule_api::image::Manifest;

/// Lines of one kind that are shown to people; JSON has all.
const SHOWN: usize = 40;

/// One thing that is another one, or is in one image only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    pub what: String,
    /// Version, value or digest in the first image; none: it is not in it.
    pub from: Option<String>,
    /// The same in the second image.
    pub to: Option<String>,
}

/// `image diff`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Difference {
    /// Kernel, command line, memory, agent.
    pub machine: Vec<Change>,
    pub packages: Vec<Change>,
    pub tools: Vec<Change>,
    /// Units that must be active, and features.
    pub units: Vec<Change>,
    pub features: Vec<Change>,
    /// Regular files. Where only a link, a mode or an owner changed, the root image's digest alone says so.
    pub files: Vec<Change>,
    /// Whether the root images are the same, byte for byte.
    pub same_root: bool,
}

/// Compares `a` with `b`, the later one.
pub fn diff(a: &Manifest, b: &Manifest) -> Difference {
    let packages = |manifest: &Manifest| {
        let all = manifest.packages.iter();
        all.map(|package| {
            let name = format!("{}:{}", package.name, package.architecture);
            (name, package.version.clone())
        })
        .collect()
    };
    let tools = |manifest: &Manifest| {
        let all = manifest.tools.iter();
        all.map(|tool| {
            let name = format!("{} ({})", tool.package, tool.provider);
            (name, tool.version.clone())
        })
        .collect()
    };
    Difference {
        machine: changes(&machine(a), &machine(b)),
        packages: changes(&packages(a), &packages(b)),
        tools: changes(&tools(a), &tools(b)),
        units: changes(&present(&a.required_units), &present(&b.required_units)),
        features: changes(&present(&a.features), &present(&b.features)),
        files: changes(&a.files, &b.files),
        same_root: root(a) == root(b),
    }
}

fn root(manifest: &Manifest) -> Option<&str> {
    let root = manifest.artifacts.get("root.ext4");
    root.map(|artifact| artifact.sha256.as_str())
}

fn machine(manifest: &Manifest) -> BTreeMap<String, String> {
    [
        ("recipe", manifest.recipe.clone()),
        ("kernel", manifest.kernel_release.clone()),
        ("command line", manifest.cmdline.clone()),
        ("modules of the initrd", manifest.drivers.join(" ")),
        ("least memory, MiB", manifest.min_memory_mib.to_string()),
        (
            "default memory, MiB",
            manifest.default_memory_mib.to_string(),
        ),
        ("default CPUs", manifest.default_vcpus.to_string()),
        ("agent", manifest.agent_build.clone()),
    ]
    .into_iter()
    .map(|(what, value)| (what.to_owned(), value))
    .collect()
}

fn present(names: &[String]) -> BTreeMap<String, String> {
    let all = names.iter();
    all.map(|name| (name.clone(), "yes".to_owned())).collect()
}

fn changes(a: &BTreeMap<String, String>, b: &BTreeMap<String, String>) -> Vec<Change> {
    let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    names
        .into_iter()
        .filter(|name| a.get(*name) != b.get(*name))
        .map(|name| Change {
            what: name.clone(),
            from: a.get(name).cloned(),
            to: b.get(name).cloned(),
        })
        .collect()
}

impl Difference {
    /// Whether the manifests say the same.
    pub fn is_none(&self) -> bool {
        self.kinds().iter().all(|(_, changes)| changes.is_empty()) && self.same_root
    }

    fn kinds(&self) -> [(&'static str, &[Change]); 6] {
        [
            ("machine", &self.machine),
            ("packages", &self.packages),
            ("tools", &self.tools),
            ("required units", &self.units),
            ("features", &self.features),
            ("files", &self.files),
        ]
    }
}

impl fmt::Display for Difference {
    /// As `diff -u` marks lines: `-` is gone, `+` is new, `~` is another one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return f.write_str("no difference");
        }
        let mut separator = "";
        for (kind, changes) in self.kinds() {
            if changes.is_empty() {
                continue;
            }
            write!(f, "{separator}{kind}")?;
            separator = "\n";
            for change in changes.iter().take(SHOWN) {
                write!(f, "\n  {change}")?;
            }
            if let Some(more) = changes.len().checked_sub(SHOWN).filter(|more| *more > 0) {
                write!(f, "\n  and {more} more (--json lists all)")?;
            }
        }
        if !self.same_root && self.files.is_empty() {
            write!(
                f,
                "{separator}links, modes, owners or directories of the root"
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = &self.what;
        match (&self.from, &self.to) {
            (None, None) => Ok(()),
            (Some(from), None) => write!(f, "- {what}{}", value(from)),
            (None, Some(to)) => write!(f, "+ {what}{}", value(to)),
            (Some(from), Some(to)) if is_digest(from) && is_digest(to) => write!(f, "~ {what}"),
            (Some(from), Some(to)) => write!(f, "~ {what}  {from} → {to}"),
        }
    }
}

/// A digest tells people nothing, nor does that something is there.
fn value(text: &str) -> String {
    if is_digest(text) || text == "yes" {
        String::new()
    } else {
        format!("  {text}")
    }
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vestibule_api::image::{Artifact, Package};

    fn manifest() -> Manifest {
        let package = |name: &str, version: &str| Package {
            name: name.to_owned(),
            version: version.to_owned(),
            architecture: "amd64".to_owned(),
        };
        let artifact = Artifact {
            sha256: "a".repeat(64),
            bytes: 1,
        };
        Manifest {
            schema: 1,
            recipe: "tiny".to_owned(),
            recipe_digest: String::new(),
            artifacts: [("root.ext4".to_owned(), artifact)].into(),
            kernel_release: "6.1.0-1-cloud-amd64".to_owned(),
            cmdline: "quiet".to_owned(),
            drivers: Vec::new(),
            min_memory_mib: 128,
            default_memory_mib: 256,
            default_vcpus: 1,
            required_units: vec!["a.service".to_owned()],
            features: Vec::new(),
            agent_build: "b".repeat(64),
            packages: vec![package("curl", "1"), package("git", "2")],
            tools: Vec::new(),
            files: [("/etc/x".to_owned(), "c".repeat(64))].into(),
        }
    }

    #[test]
    fn one_image_does_not_differ_from_itself() {
        let difference = diff(&manifest(), &manifest());
        assert!(difference.is_none());
        assert_eq!(difference.to_string(), "no difference");
    }

    #[test]
    fn what_changed_is_named() {
        let (a, mut b) = (manifest(), manifest());
        b.packages.remove(0);
        b.packages[0].version = "3".to_owned();
        b.required_units.push("b.service".to_owned());
        b.files.insert("/etc/x".to_owned(), "d".repeat(64));
        b.agent_build = "e".repeat(64);
        if let Some(root) = b.artifacts.get_mut("root.ext4") {
            root.sha256 = "f".repeat(64);
        }
        let difference = diff(&a, &b);
        assert_eq!(
            difference.to_string(),
            "machine\n  ~ agent\npackages\n  - curl:amd64  1\n  ~ git:amd64  2 → 3\n\
             required units\n  + b.service\nfiles\n  ~ /etc/x"
        );
        b = manifest();
        if let Some(root) = b.artifacts.get_mut("root.ext4") {
            root.sha256 = "f".repeat(64);
        }
        assert_eq!(
            diff(&a, &b).to_string(),
            "links, modes, owners or directories of the root"
        );
        b.files = (0..50)
            .map(|n| (format!("/n{n}"), "c".repeat(64)))
            .collect();
        let text = diff(&a, &b).to_string();
        assert!(text.ends_with("and 11 more (--json lists all)"), "{text}");
    }
}

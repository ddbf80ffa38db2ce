//! Debian packages from wherever this host takes its own: the sources in `/etc/apt`, cut to one suite.
//!
//! Our files name no mirror. An apt of its own, below the cache, keeps lists and downloads apart from the host's, so
//! that no root is needed and nothing of the host's changes.
use crate::host::{Host, HostError};
use camino::{Utf8Path, Utf8PathBuf};
use std::{collections::BTreeSet, process::Command};

const ETC: &str = "/etc/apt";
/// A control record or a list of dependencies is shorter.
const OUTPUT: u64 = 4 << 20;

/// Why packages cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AptError {
    #[error("read the host's package sources `{path}`")]
    Read {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("no source of suite `{suite}` with component `main` in /etc/apt")]
    NoSource { suite: String },
    #[error("prepare `{path}`")]
    Prepare {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("fetch package lists of `{suite}`")]
    Update {
        suite: String,
        #[source]
        err: HostError,
    },
    #[error("download package `{package}` of `{suite}`")]
    Download {
        package: String,
        suite: String,
        #[source]
        err: HostError,
    },
    #[error("package `{package}` does not depend on one that begins with `{prefix}`")]
    NoDependency {
        package: String,
        prefix: &'static str,
    },
}

/// One archive of packages, as a deb822 stanza has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    suite: String,
    components: String,
    signed_by: Option<String>,
}

impl Source {
    fn stanza(&self) -> String {
        let Self {
            uri,
            suite,
            components,
            signed_by,
        } = self;
        let signed = signed_by
            .as_ref()
            .map_or_else(String::new, |key| format!("Signed-By: {key}\n"));
        format!("Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: {components}\n{signed}\n")
    }
}

/// The host's sources of `suite`, with its updates and security fixes, as deb822 text.
pub(crate) fn sources(suite: &str) -> Result<String, AptError> {
    let wanted = [
        suite.to_owned(),
        format!("{suite}-updates"),
        format!("{suite}-security"),
    ];
    let found: Vec<Source> = host_sources()?
        .into_iter()
        .filter(|source| wanted.contains(&source.suite))
        .collect();
    if !found.iter().any(|source| source.suite == suite) {
        return Err(AptError::NoSource {
            suite: suite.to_owned(),
        });
    }
    Ok(found.iter().map(Source::stanza).collect())
}

/// The same archive's backports of `suite`.
pub(crate) fn backports(suite: &str) -> Result<String, AptError> {
    let main = host_sources()?
        .into_iter()
        .find(|source| source.suite == suite);
    let main = main.ok_or_else(|| AptError::NoSource {
        suite: suite.to_owned(),
    })?;
    Ok(Source {
        suite: format!("{suite}-backports"),
        ..main
    }
    .stanza())
}

fn host_sources() -> Result<Vec<Source>, AptError> {
    let mut files = vec![Utf8PathBuf::from(ETC).join("sources.list")];
    let parts = Utf8PathBuf::from(ETC).join("sources.list.d");
    if let Ok(entries) = parts.read_dir_utf8() {
        files.extend(
            entries
                .filter_map(Result::ok)
                .map(camino::Utf8DirEntry::into_path),
        );
    }
    files.sort();
    let mut found = Vec::new();
    for path in files {
        let parse: fn(&str) -> Vec<Source> = match path.extension() {
            Some("list") => one_line,
            Some("sources") => deb822,
            _ => continue,
        };
        match std::fs::read_to_string(&path) {
            Ok(text) => found.extend(parse(&text)),
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => {}
            Err(err) => return Err(AptError::Read { path, err }),
        }
    }
    found.retain(|source| {
        source
            .components
            .split(' ')
            .any(|component| component == "main")
    });
    Ok(found)
}

/// `deb [signed-by=KEY] URI SUITE COMPONENT…` (sources.list(5)).
fn one_line(text: &str) -> Vec<Source> {
    let parse = |line: &str| {
        let rest = line
            .trim()
            .strip_prefix("deb")?
            .strip_prefix([' ', '\t'])?
            .trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?.to_owned(), words.next()?.to_owned());
        let signed_by = options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="));
        let components = words
            .take_while(|word| !word.starts_with('#'))
            .collect::<Vec<_>>()
            .join(" ");
        Some(Source {
            uri,
            suite,
            components,
            signed_by: signed_by.map(str::to_owned),
        })
    };
    text.lines().filter_map(parse).collect()
}

/// Stanzas of fields; a stanza stands for each of its URIs with each of its suites. Keys that stand in the stanza itself
/// are not supported; a file of keys is.
fn deb822(text: &str) -> Vec<Source> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let mut found = Vec::new();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let field = |name: &str| {
            let mut fields = stanza.iter().filter_map(|line| line.split_once(':'));
            fields
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.trim().to_owned())
        };
        let disabled =
            field("Enabled").is_some_and(|value| matches!(value.as_str(), "no" | "false"));
        let binary =
            field("Types").is_some_and(|types| types.split_whitespace().any(|kind| kind == "deb"));
        if disabled || !binary {
            continue;
        }
        let signed_by = field("Signed-By").filter(|value| !value.is_empty());
        let components = field("Components").unwrap_or_default();
        let components = components.split_whitespace().collect::<Vec<_>>().join(" ");
        for uri in field("URIs").unwrap_or_default().split_whitespace() {
            for suite in field("Suites").unwrap_or_default().split_whitespace() {
                let (uri, suite) = (uri.to_owned(), suite.to_owned());
                found.push(Source {
                    uri,
                    suite,
                    components: components.clone(),
                    signed_by: signed_by.clone(),
                });
            }
        }
    }
    found
}

/// An apt of its own.
pub(crate) struct Apt<'a> {
    host: &'a Host<'a>,
    root: Utf8PathBuf,
    suite: String,
}

impl<'a> Apt<'a> {
    /// Prepares it below `root` and fetches the lists of `sources`.
    pub(crate) fn new(
        host: &'a Host<'a>,
        root: &Utf8Path,
        suite: &str,
        sources: &str,
    ) -> Result<Self, AptError> {
        let apt = Self {
            host,
            root: root.to_owned(),
            suite: suite.to_owned(),
        };
        for directory in ["etc", "state/lists/partial", "cache/archives/partial"] {
            let path = root.join(directory);
            std::fs::create_dir_all(&path).map_err(|err| AptError::Prepare { path, err })?;
        }
        let path = root.join("etc/vestibule.sources");
        std::fs::write(&path, sources).map_err(|err| AptError::Prepare { path, err })?;
        let updated = host.run(apt.command("apt-get").arg("update"));
        updated.map_err(|err| AptError::Update {
            suite: suite.to_owned(),
            err,
        })?;
        Ok(apt)
    }

    /// The package that `package` depends on, by the beginning of its name.
    pub(crate) fn dependency(
        &self,
        package: &str,
        prefix: &'static str,
    ) -> Result<String, AptError> {
        let printed = self
            .host
            .output(self.command("apt-cache").args(["depends", package]), OUTPUT);
        let printed = printed.map_err(|err| self.failed(package, err))?;
        String::from_utf8_lossy(&printed)
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with(prefix))
            .map(str::to_owned)
            .ok_or_else(|| AptError::NoDependency {
                package: package.to_owned(),
                prefix,
            })
    }

    /// Downloads the newest of each package into `into` and returns the files.
    pub(crate) fn download(
        &self,
        packages: &[&str],
        into: &Utf8Path,
    ) -> Result<Vec<Utf8PathBuf>, AptError> {
        let prepare = |err| AptError::Prepare {
            path: into.to_owned(),
            err,
        };
        std::fs::create_dir_all(into).map_err(prepare)?;
        let done = self.host.run(
            self.command("apt-get")
                .arg("download")
                .args(packages)
                .current_dir(into),
        );
        done.map_err(|err| self.failed(&packages.join(" "), err))?;
        let mut files = BTreeSet::new();
        for entry in into.read_dir_utf8().map_err(prepare)? {
            files.insert(entry.map_err(prepare)?.into_path());
        }
        Ok(files
            .into_iter()
            .filter(|path| path.extension() == Some("deb"))
            .collect())
    }

    fn failed(&self, package: &str, err: HostError) -> AptError {
        AptError::Download {
            package: package.to_owned(),
            suite: self.suite.clone(),
            err,
        }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (key, value) in [
            ("Dir::Etc::SourceList", "/dev/null".into()),
            ("Dir::Etc::SourceParts", self.root.join("etc")),
            ("Dir::State", self.root.join("state")),
            ("Dir::State::status", "/dev/null".into()),
            ("Dir::Cache", self.root.join("cache")),
            ("APT::Sandbox::User", "".into()),
            ("APT::Architecture", "amd64".into()),
        ] {
            command.arg("-o").arg(format!("{key}={value}"));
        }
        command.env("LC_ALL", "C");
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_say_the_same() {
        let line = "# comment\ndeb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian bookworm main contrib # x\ndeb-src http://x y main\n";
        let stanza = "# comment\nTypes: deb deb-src\nURIs: http://mirror.test/debian\nSuites: bookworm\n# inside\nComponents: main contrib\nSigned-By: /k.gpg\n\nEnabled: no\nTypes: deb\nURIs: http://off.test\nSuites: bookworm\nComponents: main\n";
        assert_eq!(one_line(line), deb822(stanza));
        assert_eq!(one_line(line).len(), 1);
        assert_eq!(deb822(&one_line(line)[0].stanza()), one_line(line));
    }
}

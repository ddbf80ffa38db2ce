//! The providers' tools: installed by npm exactly as a committed lock file says, their install scripts never run.
//!
//! Tools that ship native programs do so as optional packages for each platform; their install scripts only copy or
//! link them. The recipe points straight at the native program, and the checks refuse an image without it.
use crate::{
    cache::{Cache, CacheError, Layer, Work},
    digest,
    host::{Host, HostError},
    layers::{self, Walked},
    recipe::Npm,
    tree::{self, TreeError},
};
use camino::{Utf8Path, Utf8PathBuf};
use std::process::Command;

/// Raised when the same lock file would give other files.
const VERSION: &str = "npm 1";
const INPUTS: [&str; 2] = ["package.json", "package-lock.json"];

/// Why the tools cannot be installed.
#[derive(Debug, thiserror::Error)]
pub enum NpmError {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("{what} `{path}`")]
    Io {
        what: &'static str,
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("install the tools of `{lock}`")]
    Install {
        lock: Utf8PathBuf,
        #[source]
        err: HostError,
    },
    #[error("look through the installed tools")]
    Walk(#[source] TreeError),
    #[error("npm package `{package}` is not installed: no `{path}`")]
    NotInstalled { package: String, path: Utf8PathBuf },
}

fn io(what: &'static str, path: &Utf8Path) -> impl FnOnce(std::io::Error) -> NpmError {
    move |err| NpmError::Io {
        what,
        path: path.to_owned(),
        err,
    }
}

/// The layer of tools that `lock` (a directory) describes.
pub(crate) fn layer(
    host: &Host<'_>,
    cache: &Cache,
    work: &Work,
    lock: &Utf8Path,
    npm: &Npm,
) -> Result<Layer, NpmError> {
    let mut parts = vec![VERSION.to_owned()];
    for name in INPUTS {
        let path = lock.join(name);
        parts.push(std::fs::read_to_string(&path).map_err(io("read", &path))?);
    }
    parts.extend(npm.drop.iter().cloned());
    let key = digest::of_list(&parts);
    cache.layer(work, "npm", &key, false, |directory| {
        install(host, &cache.directory("npm")?, lock, directory)?;
        prune(directory, npm)?;
        Ok(key.clone())
    })
}

fn install(
    host: &Host<'_>,
    downloads: &Utf8Path,
    lock: &Utf8Path,
    directory: &Utf8Path,
) -> Result<(), NpmError> {
    for name in INPUTS {
        let (from, to) = (lock.join(name), directory.join(name));
        let bytes = std::fs::read(&from).map_err(io("read", &from))?;
        std::fs::write(&to, bytes).map_err(io("write", &to))?;
    }
    let mut command = Command::new("npm");
    command
        .args([
            "ci",
            "--ignore-scripts",
            "--omit=dev",
            "--no-audit",
            "--no-fund",
            "--no-progress",
        ])
        .args(["--os=linux", "--cpu=x64", "--libc=glibc", "--cache"])
        .arg(downloads)
        .current_dir(directory);
    host.run(&mut command).map_err(|err| NpmError::Install {
        lock: lock.to_owned(),
        err,
    })
}

/// Removes what the guest does without, and npm's own notes, which say where the packages came from.
fn prune(directory: &Utf8Path, npm: &Npm) -> Result<(), NpmError> {
    let own = ["node_modules/.package-lock.json".to_owned()];
    for (path, kind) in layers::walk(directory).map_err(NpmError::Walk)? {
        let relative = path.strip_prefix(directory).unwrap_or(&path).as_str();
        if !own
            .iter()
            .chain(&npm.drop)
            .any(|pattern| tree::matches(pattern, relative))
        {
            continue;
        }
        let removed = match kind {
            Walked::Directory => std::fs::remove_dir_all(&path),
            Walked::File { .. } | Walked::Symlink(_) => std::fs::remove_file(&path),
        };
        match removed {
            // Gone with a directory above it.
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => {}
            other => other.map_err(io("remove", &path))?,
        }
    }
    Ok(())
}

/// The version of an installed package.
pub(crate) fn version(layer: &Layer, package: &str) -> Result<String, NpmError> {
    let path = layer
        .directory
        .join("node_modules")
        .join(package)
        .join("package.json");
    let missing = || NpmError::NotInstalled {
        package: package.to_owned(),
        path: path.clone(),
    };
    let bytes = std::fs::read(&path).map_err(|_| missing())?;
    let manifest: serde_json::Value = serde_json::from_slice(&bytes).map_err(|_| missing())?;
    manifest
        .get("version")
        .and_then(serde_json::Value::as_str)
        .map(str::to_owned)
        .ok_or_else(missing)
}

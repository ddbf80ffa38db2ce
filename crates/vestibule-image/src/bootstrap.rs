//! The lowest layer: Debian packages, installed into nothing by mmdebstrap, kept as one tar archive.
use crate::{
    EPOCH, apt,
    cache::{Cache, CacheError, Layer, Work},
    digest,
    host::{Host, HostError},
    recipe::Recipe,
    tree::{Tree, TreeError},
};
use camino::{Utf8Path, Utf8PathBuf};
use std::{collections::BTreeSet, process::Command};
use vestibule_api::image::Package;

/// Raised when the same packages would give another archive.
const VERSION: &str = "packages 1";
/// What a bootstrap leaves that says when and where it ran, or that only a package manager would need.
const TRACES: &[&str] = &[
    "/boot/*",
    "/etc/*-",
    "/etc/.pwd.lock",
    "/etc/apt/apt.conf.d/99mmdebstrap",
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d/*",
    "/etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    "/etc/hostname",
    "/run/*",
    "/tmp/*",
    "/var/cache/apt/*",
    "/var/cache/debconf/*",
    "/var/cache/ldconfig/*",
    "/var/lib/apt/lists/*",
    "/var/lib/dbus/machine-id",
    "/var/lib/dpkg/*-old",
    "/var/lib/systemd/*",
    "/var/log/*",
];

/// Why there is no layer of packages.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    #[error(transparent)]
    Apt(#[from] apt::AptError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("write `{path}`")]
    Write {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("install the packages of recipe `{recipe}`")]
    Install {
        recipe: String,
        #[source]
        err: HostError,
    },
    #[error("read the installed packages")]
    Status(#[source] TreeError),
    #[error("package `{package}` is not installed in the image")]
    NotInstalled { package: String },
}

/// The layer of the recipe's packages, from the cache or made.
pub(crate) fn layer(
    host: &Host<'_>,
    cache: &Cache,
    work: &Work,
    recipe: &Recipe,
    renew: bool,
) -> Result<Layer, BootstrapError> {
    let lists = [&recipe.exclude, &recipe.keep]
        .into_iter()
        .flatten()
        .chain(&recipe.packages);
    let key = digest::of_list(
        [VERSION, &recipe.suite]
            .into_iter()
            .chain(lists.map(String::as_str)),
    );
    cache.layer(work, "packages", &key, renew, |directory| {
        make(host, cache, work, recipe, directory)
    })
}

fn make(
    host: &Host<'_>,
    cache: &Cache,
    work: &Work,
    recipe: &Recipe,
    directory: &Utf8Path,
) -> Result<String, BootstrapError> {
    let write = |path: &Utf8Path| {
        let path = path.to_owned();
        move |err| BootstrapError::Write { path, err }
    };
    let sources = work.directory.join("packages.sources");
    std::fs::write(&sources, apt::sources(&recipe.suite)?).map_err(write(&sources))?;
    let archive = directory.join("root.tar");
    let mut command = command(recipe, &cache.directory("debs")?);
    command
        .env("TMPDIR", &work.scratch)
        .arg(&recipe.suite)
        .arg(&archive)
        .arg(&sources);
    if !rustix::process::geteuid().is_root() {
        // The user who owns the files in its namespace must reach them.
        open_to_all(&work.scratch).map_err(write(&work.scratch))?;
    }
    host.run(&mut command)
        .map_err(|err| BootstrapError::Install {
            recipe: recipe.name.clone(),
            err,
        })?;
    digest::of_file(&archive).map_err(write(&archive))
}

fn command(recipe: &Recipe, debs: &Utf8Path) -> Command {
    let mut command = Command::new("mmdebstrap");
    let mode = if rustix::process::geteuid().is_root() {
        "root"
    } else {
        "unshare"
    };
    command
        .env("SOURCE_DATE_EPOCH", EPOCH.to_string())
        .env("LC_ALL", "C.UTF-8")
        .arg(format!("--mode={mode}"))
        // The package manager itself stays out: nothing is installed in a running image.
        .args([
            "--variant=essential",
            "--format=tar",
            "--architectures=amd64",
        ])
        .args([
            "--aptopt=APT::Install-Recommends \"false\"",
            "--dpkgopt=force-unsafe-io",
        ]);
    for path in &recipe.exclude {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    for path in &recipe.keep {
        command.arg(format!("--dpkgopt=path-include={path}"));
    }
    // Downloads are kept; the hooks are mmdebstrap's own and take a path, not shell.
    command
        .args(["--skip=download/empty", "--skip=essential/unlink"])
        .arg("--setup-hook=mkdir -p \"$1\"/var/cache/apt/archives")
        .arg(format!("--setup-hook=sync-in {} /var/cache/apt/archives", quoted(debs)))
        .arg(format!("--customize-hook=sync-out /var/cache/apt/archives {}", quoted(debs)))
        // An X client without this cache reads every font: 16 CPU seconds under emulation.
        .arg("--customize-hook=if [ -x \"$1/usr/bin/fc-cache\" ]; then chroot \"$1\" fc-cache --system-only --force; fi")
        .arg(format!("--include={}", recipe.packages.iter().map(String::as_str).collect::<Vec<_>>().join(",")));
    command
}

/// One word of a POSIX shell.
fn quoted(path: &Utf8Path) -> String {
    format!("'{}'", path.as_str().replace('\'', r"'\''"))
}

fn open_to_all(path: &Utf8Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o1777))
}

/// Takes away what a bootstrap leaves of the machine and the moment, and what the recipe does without.
pub(crate) fn clean(tree: &mut Tree, recipe: &Recipe) -> Result<(), TreeError> {
    for pattern in TRACES
        .iter()
        .copied()
        .chain(recipe.remove.iter().map(String::as_str))
    {
        tree.remove(pattern);
    }
    // Empty, not missing: a missing one is a first boot, at which systemd applies presets (machine-id(5)).
    tree.put_file("/etc/machine-id", "", 0o444)
}

/// What dpkg says is installed, sorted by name.
///
/// # Errors
/// [`BootstrapError::NotInstalled`] names a package of the recipe that is not.
pub(crate) fn installed(tree: &Tree, recipe: &Recipe) -> Result<Vec<Package>, BootstrapError> {
    let status = tree
        .read("/var/lib/dpkg/status")
        .map_err(BootstrapError::Status)?;
    let packages = parse_status(&String::from_utf8_lossy(&status));
    let names: BTreeSet<&str> = packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    match recipe
        .packages
        .iter()
        .find(|name| !names.contains(name.as_str()))
    {
        Some(package) => Err(BootstrapError::NotInstalled {
            package: package.clone(),
        }),
        None => Ok(packages),
    }
}

fn parse_status(text: &str) -> Vec<Package> {
    let mut packages: Vec<Package> = text
        .split("\n\n")
        .filter_map(|stanza| {
            let field = |name: &str| {
                stanza
                    .lines()
                    .find_map(|line| line.strip_prefix(name))
                    .map(|value| value.trim().to_owned())
            };
            (field("Status:")? == "install ok installed").then_some(())?;
            Some(Package {
                name: field("Package:")?,
                version: field("Version:")?,
                architecture: field("Architecture:")?,
            })
        })
        .collect();
    packages.sort_by(|a, b| (&a.name, &a.architecture).cmp(&(&b.name, &b.architecture)));
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_installed_counts() {
        let text = "Package: b\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2\n\nPackage: a\nStatus: deinstall ok config-files\nArchitecture: all\nVersion: 1\n";
        let names: Vec<String> = parse_status(text)
            .into_iter()
            .map(|package| package.name)
            .collect();
        assert_eq!(names, ["b"]);
    }

    #[test]
    fn a_path_stays_one_word_of_the_shell() {
        assert_eq!(quoted(Utf8Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }
}

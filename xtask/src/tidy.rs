//! `cargo xtask tidy`: the rules of the workspace that no compiler checks.
use anyhow::{Context as _, bail};
use camino::Utf8Path;
use serde::Deserialize;
use std::process::Command;

/// What a room may use: its name, the rooms it may depend on, and crates that it must not take in.
/// The table is DESIGN.md's; ARCHITECTURE.md says why.
const ROOMS: &[(&str, &[&str], &[&str])] = &[
    ("vestibule-api", &[], &["axum", "reqwest", "sqlx"]),
    (
        "vestibule-diagnose",
        &["vestibule-api"],
        &["tokio", "hyper", "axum"],
    ),
    (
        "vestibule-image",
        &["vestibule-diagnose", "vestibule-api"],
        &["axum", "sqlx"],
    ),
    ("vestibule-vm", &["vestibule-api"], &["sqlx"]),
    (
        "vestibule-vault",
        &["vestibule-api"],
        &["axum", "hyper", "reqwest"],
    ),
    (
        "vestibule-controller",
        &[
            "vestibule-vault",
            "vestibule-image",
            "vestibule-diagnose",
            "vestibule-api",
        ],
        &["pty-process"],
    ),
    (
        "vestibule-agent",
        &["vestibule-api"],
        &["rustls", "tokio-rustls", "reqwest", "hickory-resolver"],
    ),
    (
        "vestibule",
        &[
            "vestibule-controller",
            "vestibule-vault",
            "vestibule-vm",
            "vestibule-image",
            "vestibule-diagnose",
            "vestibule-api",
        ],
        &[],
    ),
    (
        "vestibule-testkit",
        &["vestibule-api"],
        &["mockall", "wiremock"],
    ),
    ("xtask", &[], &[]),
];

/// Lines in a source file.
const FILE_LIMIT: usize = 600;

/// Hosts of package registries, label by label so that this file names none of them: where packages come from is the
/// machine's business, never the project's.
const REGISTRIES: &[&[&str]] = &[
    &["registry", "npmjs", "org"],
    &["registry", "yarnpkg", "com"],
    &["deb", "debian", "org"],
    &["security", "debian", "org"],
    &["snapshot", "debian", "org"],
    &["index", "crates", "io"],
    &["static", "crates", "io"],
    &["files", "pythonhosted", "org"],
    &["proxy", "golang", "org"],
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `None` for a normal one, else `dev` or `build`.
    kind: Option<String>,
}

/// Runs every check and reports all that is wrong, not only the first.
pub(crate) fn check(root: &Utf8Path) -> anyhow::Result<()> {
    let mut wrong = rooms(&metadata(root)?);
    for path in tracked(root)? {
        // A deleted file is still listed until the deletion is committed; binary files have no lines.
        let Ok(text) = std::fs::read_to_string(root.join(&path)) else {
            continue;
        };
        wrong.extend(file(&path, &text));
    }
    if wrong.is_empty() {
        println!(
            "tidy: {} rooms and every tracked file are as they should be",
            ROOMS.len()
        );
        return Ok(());
    }
    bail!(
        "{} rules are broken:\n  {}",
        wrong.len(),
        wrong.join("\n  ")
    )
}

fn metadata(root: &Utf8Path) -> anyhow::Result<Metadata> {
    let output = Command::new("cargo")
        .args(["metadata", "--no-deps", "--format-version", "1", "--locked"])
        .current_dir(root)
        .output()
        .context("run `cargo metadata`")?;
    if !output.status.success() {
        bail!(
            "`cargo metadata` failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    serde_json::from_slice(&output.stdout).context("understand what `cargo metadata` printed")
}

fn tracked(root: &Utf8Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root)
        .output()
        .context("run `git ls-files`")?;
    let names = String::from_utf8(output.stdout).context("read the names of tracked files")?;
    Ok(names
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

fn rooms(metadata: &Metadata) -> Vec<String> {
    let mut wrong = Vec::new();
    for package in &metadata.packages {
        let Some((_, uses, never)) = ROOMS.iter().find(|(name, ..)| *name == package.name) else {
            wrong.push(format!(
                "crate `{}` is not in the table of rooms (xtask/src/tidy.rs)",
                package.name
            ));
            continue;
        };
        for dependency in package
            .dependencies
            .iter()
            .filter(|one| one.kind.as_deref() != Some("dev"))
        {
            let name = dependency.name.as_str();
            let room = ROOMS.iter().any(|(room, ..)| *room == name);
            if (room && !uses.contains(&name)) || never.contains(&name) {
                wrong.push(format!("crate `{}` must not use `{name}`", package.name));
            }
        }
    }
    wrong
}

fn file(path: &str, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let lines = text.lines().count();
    if path.ends_with(".rs") && lines > FILE_LIMIT {
        wrong.push(format!("{path}: {lines} lines, more than {FILE_LIMIT}"));
    }
    for labels in REGISTRIES {
        let host = labels.join(".");
        if let Some(line) = text.lines().position(|line| line.contains(&host)) {
            wrong.push(format!(
                "{path}:{}: names a package registry's host",
                line + 1
            ));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, uses: &[(&str, Option<&str>)]) -> Metadata {
        let dependencies = uses
            .iter()
            .map(|(name, kind)| Dependency {
                name: (*name).to_owned(),
                kind: kind.map(str::to_owned),
            })
            .collect();
        Metadata {
            packages: vec![Package {
                name: name.to_owned(),
                dependencies,
            }],
        }
    }

    #[test]
    fn a_room_that_reaches_past_its_arrows_is_named() {
        let wrong = rooms(&package(
            "vestibule-vm",
            &[("vestibule-controller", None), ("tokio", None)],
        ));
        assert_eq!(
            wrong,
            ["crate `vestibule-vm` must not use `vestibule-controller`"]
        );
        assert_eq!(
            rooms(&package("vestibule-agent", &[("rustls", None)])).len(),
            1
        );
        assert_eq!(rooms(&package("surprise", &[])).len(), 1);
    }

    #[test]
    fn tests_may_use_the_testkit() {
        assert!(
            rooms(&package(
                "vestibule-vm",
                &[("vestibule-testkit", Some("dev"))]
            ))
            .is_empty()
        );
    }

    #[test]
    fn long_files_and_registry_hosts_are_named_with_their_line() {
        assert_eq!(file("a.rs", &"\n".repeat(FILE_LIMIT + 1)).len(), 1);
        assert!(file("a.toml", &"\n".repeat(FILE_LIMIT + 1)).is_empty());
        let host = REGISTRIES[0].join(".");
        assert_eq!(
            file(
                "x.json",
                &format!("{{\n\"resolved\": \"https://{host}/x\"\n}}")
            ),
            ["x.json:2: names a package registry's host"]
        );
    }
}

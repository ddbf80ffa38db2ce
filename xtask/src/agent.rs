//! `cargo xtask agent`: the one binary that runs inside every guest.
//!
//! It is linked statically against glibc (there is no musl toolchain to rely on), position-independent, and says
//! nothing of the machine that built it, so that two machines build the same bytes: image digests depend on it.
use crate::elf;
use anyhow::{Context as _, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use sha2::{Digest as _, Sha256};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "agent";
const BINARY: &str = "vestibule-agent";

/// Builds the agent, checks it, and leaves it at `target/agent/vestibule-agent`. Cargo does nothing when no input has
/// changed, and then the file keeps its time too.
pub(crate) fn build(root: &Utf8Path) -> anyhow::Result<()> {
    let prefixes = prefixes(root)?;
    compile(root, &prefixes)?;
    let target = target_directory(root);
    let built = target.join(TARGET).join(PROFILE).join(BINARY);
    let bytes = std::fs::read(&built).with_context(|| format!("read the built agent `{built}`"))?;
    elf::ensure_static_pie(&bytes)
        .with_context(|| format!("`{built}` is not a static-pie program"))?;
    for (prefix, _) in &prefixes {
        ensure!(
            !contains(&bytes, prefix.as_str().as_bytes()),
            "`{built}` contains the path `{prefix}` of this machine"
        );
    }
    let result = target.join("agent").join(BINARY);
    install(&result, &bytes)?;
    let digest: String = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    println!("{result}  {} bytes  sha256 {digest}", bytes.len());
    Ok(())
}

/// What stands in paths of this machine's, and what stands in the binary instead.
fn prefixes(root: &Utf8Path) -> anyhow::Result<Vec<(Utf8PathBuf, &'static str)>> {
    let home = std::env::var("HOME").context("read HOME")?;
    let cargo_home = std::env::var("CARGO_HOME")
        .map_or_else(|_| Utf8Path::new(&home).join(".cargo"), Utf8PathBuf::from);
    let output = Command::new("rustc")
        .args(["--print", "sysroot"])
        .output()
        .context("run `rustc --print sysroot`")?;
    let sysroot = String::from_utf8(output.stdout).context("read the sysroot's path")?;
    Ok(vec![
        (root.to_owned(), "/vestibule"),
        (cargo_home, "/cargo"),
        (Utf8PathBuf::from(sysroot.trim()), "/rust"),
    ])
}

fn compile(root: &Utf8Path, prefixes: &[(Utf8PathBuf, &str)]) -> anyhow::Result<()> {
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    flags.extend(
        prefixes
            .iter()
            .map(|(from, to)| format!("--remap-path-prefix={from}={to}")),
    );
    // An explicit --target keeps build scripts and procedural macros dynamic; they could not be loaded otherwise.
    let status = Command::new("cargo")
        .args(["build", "--locked", "--package", "vestibule-agent"])
        .args(["--target", TARGET, "--profile", PROFILE])
        .current_dir(root)
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .status()
        .context("run `cargo build` for the agent")?;
    if !status.success() {
        bail!("`cargo build` of the agent ended with {status}");
    }
    Ok(())
}

fn target_directory(root: &Utf8Path) -> Utf8PathBuf {
    std::env::var("CARGO_TARGET_DIR").map_or_else(|_| root.join("target"), Utf8PathBuf::from)
}

/// Writes `bytes` to `path` by rename, unless they are there already.
fn install(path: &Utf8Path, bytes: &[u8]) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    if std::fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let directory = path.parent().context("the agent's path has no directory")?;
    std::fs::create_dir_all(directory).with_context(|| format!("create `{directory}`"))?;
    let new = path.with_extension("new");
    std::fs::write(&new, bytes).with_context(|| format!("write `{new}`"))?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755))
        .with_context(|| format!("make `{new}` executable"))?;
    std::fs::rename(&new, path).with_context(|| format!("rename `{new}` to `{path}`"))
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

//! A machine with a KVM that runs Linux, on a host that has none: QEMU's TCG emulates a processor with SVM and nested paging
//! (`-cpu max`), Debian's cloud kernel runs on it (L1) with `kvm_amd`, and a VMM in it runs real guests (L2). For function, not
//! for speed.
//!
//! `script/lib.sh` makes the pieces once (`need_nested`): L1's kernel, and an initrd that loads KVM, mounts the disk `vda`
//! at `/data`, runs `/data/run`, says the status of that, and powers off. What L1 runs comes on that disk, which is written for each run.
use anyhow::{Context as _, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use std::{fmt::Write as _, os::unix::fs::PermissionsExt as _, process::Stdio, time::Duration};
use tokio::process::Command;

/// By this line L1 says how its program ended.
const STATUS: &str = "nested: status ";
const CPUS: u32 = 2;
/// Besides the files, for the file system's own.
const SPARE_MIB: u64 = 64;

/// The pieces of L1.
#[derive(Debug)]
pub struct Nested {
    kernel: Utf8PathBuf,
    initrd: Utf8PathBuf,
}

/// What came of a run.
#[derive(Debug)]
pub struct Ran {
    /// Exit status of the program.
    pub status: i32,
    /// All that was written to L1's serial line, the program's output included.
    pub console: String,
}

impl Nested {
    /// Finds the pieces in `target/tools/nested`; none, with a printed reason, where they were not made.
    #[expect(clippy::print_stdout, reason = "a test that is skipped says why")]
    pub fn find() -> Option<Self> {
        let directory = crate::process::workspace().join("target/tools/nested");
        let (kernel, initrd) = (directory.join("vmlinuz"), directory.join("initrd"));
        if kernel.is_file() && initrd.is_file() {
            return Some(Self { kernel, initrd });
        }
        println!("skipped: `{directory}` is not made; `script/test nested` makes it");
        None
    }

    /// Runs `program` in L1 with `arguments` and `environment`, and with `files` below `/data`; dynamic programs find their
    /// libraries there. `memory_mib` is L1's.
    ///
    /// # Errors
    /// When QEMU does not run, or L1 says no status within `limit`; with the end of its console.
    pub async fn run(
        &self,
        program: &Utf8Path,
        arguments: &[&str],
        environment: &[(&str, &str)],
        files: &[(&str, &Utf8Path)],
        memory_mib: u32,
        limit: Duration,
    ) -> Result<Ran> {
        let work = camino_tempfile::tempdir().context("make a directory")?;
        let disk = work.path().join("data.ext4");
        let tree = work.path().join("data");
        std::fs::create_dir_all(tree.join("lib")).context("make the disk's tree")?;
        copy(program, &tree.join("program")).await?;
        for library in libraries(program).await? {
            let name = library.file_name().context("a library has a name")?;
            copy(&library, &tree.join("lib").join(name)).await?;
        }
        for (name, from) in files {
            copy(from, &tree.join(name)).await?;
        }
        let mut script = String::from("#!/bin/sh\n");
        for (key, value) in environment {
            writeln!(script, "export {key}='{value}'")?;
        }
        let arguments: String = arguments.iter().map(|one| format!(" '{one}'")).collect();
        writeln!(
            script,
            "exec /data/lib/ld-linux-x86-64.so.2 --library-path /data/lib /data/program{arguments}"
        )?;
        let run = tree.join("run");
        std::fs::write(&run, script)?;
        std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o755))?;
        pack(&tree, &disk).await?;

        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-M",
            "pc",
            "-accel",
            "tcg,thread=multi,tb-size=512",
            "-cpu",
            "max",
        ])
        .args(["-smp", &CPUS.to_string(), "-m", &format!("{memory_mib}M")])
        .args("-nodefaults -no-user-config -no-reboot -display none -serial stdio".split(' '))
        .args([
            "-kernel",
            self.kernel.as_str(),
            "-initrd",
            self.initrd.as_str(),
        ])
        .args([
            "-append",
            "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable",
        ])
        .arg("-drive")
        .arg(format!("file={disk},format=raw,if=virtio,readonly=on"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
        let child = qemu.spawn().context("start QEMU")?;
        let output = tokio::time::timeout(limit, child.wait_with_output())
            .await
            .with_context(|| format!("wait {limit:?} for L1"))??;
        let console = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = console.lines().find_map(|line| line.strip_prefix(STATUS));
        match said.and_then(|status| status.trim().parse().ok()) {
            Some(status) => Ok(Ran { status, console }),
            None => bail!(
                "L1 ended without a status: {}\n{console}",
                String::from_utf8_lossy(&output.stderr)
            ),
        }
    }
}

/// Copies a file or a directory; holes stay holes.
async fn copy(from: &Utf8Path, to: &Utf8Path) -> Result<()> {
    let copied = Command::new("cp")
        .args([
            "--recursive",
            "--dereference",
            "--sparse=always",
            "--reflink=auto",
            "--",
        ])
        .args([from, to])
        .status()
        .await
        .context("start cp")?;
    ensure!(copied.success(), "copy `{from}` to `{to}`: {copied}");
    Ok(())
}

/// What the loader would load for `program`, and the loader.
async fn libraries(program: &Utf8Path) -> Result<Vec<Utf8PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .await
        .context("start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    let libraries: Vec<_> = paths.map(Utf8PathBuf::from).collect();
    ensure!(
        !libraries.is_empty(),
        "`{program}` is no dynamic program: {text}"
    );
    Ok(libraries)
}

async fn pack(tree: &Utf8Path, disk: &Utf8Path) -> Result<()> {
    let used = Command::new("du")
        .args(["-sm", tree.as_str()])
        .output()
        .await?;
    let used: u64 = String::from_utf8_lossy(&used.stdout)
        .split_whitespace()
        .next()
        .and_then(|mib| mib.parse().ok())
        .context("measure the disk's tree")?;
    let made = Command::new("/usr/sbin/mke2fs")
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-m",
            "0",
            "-d",
        ])
        .args([
            tree.as_str(),
            disk.as_str(),
            &format!("{}M", used + used / 16 + SPARE_MIB),
        ])
        .status()
        .await
        .context("start mke2fs")?;
    ensure!(made.success(), "make the disk: {made}");
    Ok(())
}

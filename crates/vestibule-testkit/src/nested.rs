//! A machine with a KVM that runs Linux, on a host that has none: QEMU's TCG emulates a processor with SVM and nested paging
//! (`-cpu max`), Debian's cloud kernel runs on it (L1) with `kvm_amd`, and a VMM in it runs real guests (L2). For function, not
//! for speed.
//!
//! `script/lib.sh` makes the pieces once (`need_nested`): L1's kernel, and an initrd that loads KVM, mounts the disk `vda`
//! at `/data`, runs `/data/run`, says the status of that, and powers off. What L1 runs comes on that disk, which is written for each
//! run, and gone after it.
use anyhow::{Context as _, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    fmt::Write as _, fs::File, os::unix::fs::PermissionsExt as _, process::Stdio, time::Duration,
};
use tokio::process::Command;

/// Memory is cleared when it is given back (`init_on_free`, the kernel's admin-guide/kernel-parameters.txt): QEMU keeps what it has
/// translated of a page of code until somebody writes there, and each of the first writes costs it some microseconds. Without this
/// they are those of whoever gets the memory of a guest that is gone: a jailer's copy of 2.5 MB took 20 to 180 ms.
const APPEND: &str =
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable init_on_free=1";

/// By this line L1 says how its program ended.
const STATUS: &str = "nested: status ";

/// The code that is translated is L1's and that of the guests in it: where it has less room, a browser's is translated again and
/// again. Only what is used is taken.
const TCG: &str = "tcg,thread=multi,tb-size=2048";

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

/// What is to run in L1.
#[derive(Debug)]
pub struct Run<'a> {
    /// Dynamic programs, by their names below `/data`; they find their libraries there.
    pub programs: &'a [(&'a str, &'a Utf8Path)],
    /// Files and directories, by their names below `/data`.
    pub files: &'a [(&'a str, &'a Utf8Path)],
    /// Symbolic links, by their names below `/data`, and what they name.
    pub links: &'a [(&'a str, &'a str)],
    /// Where L1's console is written while it runs, for whoever waits.
    pub console: Option<&'a Utf8Path>,
    /// The command with its arguments.
    pub command: &'a [&'a str],
    pub environment: &'a [(&'a str, &'a str)],
    /// Room on `/data` besides.
    pub spare_mib: u64,
    /// L1's. With more than one, QEMU 7.2 sometimes lets an interrupt between processors in where SVM's global interrupt flag forbids
    /// it (in `__svm_vcpu_run`, right after VMRUN), and L1 panics. Without a [`HeldVm`] it may stand still (`soft lockup`). One
    /// processor has shown neither.
    pub cpus: u32,
    pub memory_mib: u32,
    pub limit: Duration,
}

/// What `vestibule-testkit` is to do in L1 with an image and real Firecracker, in a home of its own.
#[derive(Debug)]
pub struct OnImage<'a> {
    pub testkit: &'a Utf8Path,
    /// The image's directory, by its digest.
    pub image: &'a Utf8Path,
    /// Dynamic programs besides, by their names below `/data`.
    pub programs: &'a [(&'a str, &'a Utf8Path)],
    /// The command with its arguments, without `--image` and `--home`.
    pub command: &'a [&'a str],
    pub limit: Duration,
}

/// For some VMs of the size of `tiny`, and L1 itself.
const MEMORY_MIB: u32 = 2560;
/// For a snapshot of one, and for what a VM writes before that is trimmed.
const SPARE_MIB: u64 = 1024;

/// For what runs in L1: a VM that nobody runs, to be held for as long as others come and go.
///
/// With the first VM of a host and with the last one, Linux patches its scheduler by way of int3 (`preempt_notifier_key`, in
/// `__schedule`), and with the first and last processor whose APIC is off, KVM (`apic_sw_disabled`). QEMU 7.2's processors sometimes keep the
/// int3 that they have translated, and take it for ever: L1 stood still in three of eight runs, both processors in `exc_int3`
/// of one address. With a VM that stays there is nothing to patch.
#[derive(Debug)]
pub struct HeldVm {
    _vcpu: kvm_ioctls::VcpuFd,
    _vm: kvm_ioctls::VmFd,
}

impl HeldVm {
    /// # Errors
    /// When there is no KVM.
    pub fn make() -> Result<Self> {
        let kvm = kvm_ioctls::Kvm::new().context("open /dev/kvm")?;
        let vm = kvm.create_vm().context("make a VM of KVM's")?;
        vm.create_irq_chip().context("give it an APIC")?;
        let vcpu = vm.create_vcpu(0).context("give it a processor")?;
        Ok(Self {
            _vcpu: vcpu,
            _vm: vm,
        })
    }
}

impl Nested {
    /// Runs `vestibule-testkit` in L1.
    ///
    /// # Errors
    /// As [`Nested::run`], and when `vestibule` is not built.
    pub async fn run_on_image(&self, asked: &OnImage<'_>) -> Result<Ran> {
        let program = crate::stage::binary()?;
        let tools = crate::process::workspace().join("target/tools/firecracker");
        let digest = asked.image.file_name().context("an image has a digest")?;
        let (name, inside) = (format!("images/{digest}"), format!("/data/images/{digest}"));
        let own = [
            ("vestibule", program.as_path()),
            ("vestibule-testkit", asked.testkit),
        ];
        let words = [
            "/data/vestibule-testkit",
            "--image",
            inside.as_str(),
            "--home",
            "/data/home",
        ];
        let run = Run {
            programs: &[own.as_slice(), asked.programs].concat(),
            files: &[("firecracker", tools.as_path()), (&name, asked.image)],
            links: &[],
            console: None,
            command: &[&words[..1], asked.command, &words[1..]].concat(),
            environment: &[
                ("VESTIBULE_BIN", "/data/vestibule"),
                ("VESTIBULE_FIRECRACKER", "/data/firecracker/firecracker"),
            ],
            spare_mib: SPARE_MIB,
            cpus: 2,
            memory_mib: MEMORY_MIB,
            limit: asked.limit,
        };
        self.run(&run).await
    }

    /// Finds the pieces in `target/tools/nested`.
    ///
    /// # Errors
    /// When they were not made.
    pub fn find() -> Result<Self> {
        let directory = crate::process::workspace().join("target/tools/nested");
        let (kernel, initrd) = (directory.join("vmlinuz"), directory.join("initrd"));
        ensure!(
            kernel.is_file() && initrd.is_file(),
            "`{directory}` is not made; `script/test nested` makes it"
        );
        Ok(Self { kernel, initrd })
    }

    /// Runs a command in L1.
    ///
    /// # Errors
    /// When QEMU does not run, or L1 says no status in time; with its console.
    pub async fn run(&self, run: &Run<'_>) -> Result<Ran> {
        let work = camino_tempfile::tempdir().context("make a directory")?;
        let disk = work.path().join("data.ext4");
        let tree = work.path().join("data");
        std::fs::create_dir_all(tree.join("lib")).context("make the disk's tree")?;
        for (name, program) in run.programs {
            strip(program, &tree.join(name)).await?;
            for library in libraries(program).await? {
                let name = library.file_name().context("a library has a name")?;
                copy(&library, &tree.join("lib").join(name)).await?;
            }
        }
        for (name, from) in run.files {
            copy(from, &tree.join(name)).await?;
        }
        for (name, to) in run.links {
            let link = tree.join(name);
            parent(&link)?;
            std::os::unix::fs::symlink(to, &link).with_context(|| format!("link `{link}`"))?;
        }
        // Where programs say that their loader is, and where that looks for libraries besides its environment.
        let mut script = String::from(
            "#!/bin/sh\nmkdir -p /lib /lib64 && for library in /data/lib/*; do ln -s $library /lib/; done; ln -s /data/lib/ld-* /lib64/\n",
        );
        for (key, value) in run.environment {
            writeln!(script, "export {key}='{value}'")?;
        }
        let words: String = run.command.iter().map(|one| format!(" '{one}'")).collect();
        writeln!(script, "exec{words}")?;
        let path = tree.join("run");
        std::fs::write(&path, script)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        pack(&tree, &disk, run.spare_mib).await?;

        let mut qemu = Command::new("qemu-system-x86_64");
        let console = run
            .console
            .map_or_else(|| work.path().join("console"), Utf8Path::to_owned);
        let written = File::create(&console).with_context(|| format!("create `{console}`"))?;
        qemu.args(["-M", "pc", "-accel", TCG, "-cpu", "max"])
            .args([
                "-smp",
                &run.cpus.to_string(),
                "-m",
                &format!("{}M", run.memory_mib),
            ])
            .args("-nodefaults -no-user-config -no-reboot -display none -serial stdio".split(' '))
            .args([
                "-kernel",
                self.kernel.as_str(),
                "-initrd",
                self.initrd.as_str(),
            ])
            .args(["-append", APPEND])
            .arg("-drive")
            .arg(format!("file={disk},format=raw,if=virtio,cache=unsafe"))
            .stdin(Stdio::null())
            .stdout(written)
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let child = qemu.spawn().context("start QEMU")?;
        let output = tokio::time::timeout(run.limit, child.wait_with_output())
            .await
            .with_context(|| format!("wait {:?} for L1", run.limit))??;
        let console = std::fs::read(&console).with_context(|| format!("read `{console}`"))?;
        let console = String::from_utf8_lossy(&console).into_owned();
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

/// Makes the directory that `path` is in.
fn parent(path: &Utf8Path) -> Result<()> {
    let parent = path.parent().context("a path below a directory")?;
    std::fs::create_dir_all(parent).with_context(|| format!("make `{parent}`"))
}

/// Copies a file or a directory; holes stay holes.
async fn copy(from: &Utf8Path, to: &Utf8Path) -> Result<()> {
    parent(to)?;
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

/// Copies a program without what only a debugger reads.
async fn strip(from: &Utf8Path, to: &Utf8Path) -> Result<()> {
    let stripped = Command::new("strip")
        .args(["--strip-all", "-o"])
        .args([to, from])
        .status()
        .await
        .context("start strip")?;
    ensure!(stripped.success(), "strip `{from}`: {stripped}");
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

async fn pack(tree: &Utf8Path, disk: &Utf8Path, spare_mib: u64) -> Result<()> {
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
            &format!("{}M", used + used / 16 + 64 + spare_mib),
        ])
        .status()
        .await
        .context("start mke2fs")?;
    ensure!(made.success(), "make the disk: {made}");
    Ok(())
}

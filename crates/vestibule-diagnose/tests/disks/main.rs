//! The disk reader on file systems that e2fsprogs made, against what e2fsprogs itself reads of them: recorded errors,
//! extended attributes, and journals that were not replayed. Nothing is mounted, and no root is needed.
mod boots;
mod content;
mod errors;
mod replay;
mod xattrs;

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::Utf8TempDir;
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
};
use vestibule_api::finding::Verdict;
use vestibule_diagnose::{
    Evidence, diagnose,
    disk::{Root, ext4::Ext4Tree},
};

/// The unit that the trees of these tests carry.
const UNIT: &str = "front.service";

/// A directory that becomes a file system, and what was made of it; gone when dropped.
struct Disk {
    dir: Utf8TempDir,
}

/// Runs a program of e2fsprogs; its output. `e2fsck` says with 1 that it repaired something.
fn run(program: &str, args: &[&str]) -> Result<String> {
    let out = Command::new(program)
        .args(args)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {program} (Debian: e2fsprogs)"))?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    let fine = out.status.success() || (program == "e2fsck" && out.status.code() == Some(1));
    ensure!(fine, "{program} {args:?}: {} {said}", out.status);
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

impl Disk {
    /// An empty tree. It lies beside the build: extended attributes of users are refused on older tmpfs.
    fn new() -> Result<Self> {
        let dir = camino_tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        fs::create_dir(dir.path().join("tree"))?;
        Ok(Self { dir })
    }

    /// A small root with one service of the user `web` (uid 1000, group 1000), which runs `/opt/front/run`, a script.
    fn with_service() -> Result<Self> {
        let disk = Self::new()?;
        disk.file(
            "etc/passwd",
            "root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n",
        )?;
        disk.file("etc/group", "root:x:0:\nweb:x:1000:\n")?;
        disk.file("etc/machine-id", "0123456789abcdef0123456789abcdef\n")?;
        disk.file(
            "etc/systemd/system/front.service",
            "[Service]\nType=oneshot\nExecStart=/opt/front/run\nUser=web\n\n[Install]\nWantedBy=multi-user.target\n",
        )?;
        disk.file(
            "usr/lib/systemd/system/multi-user.target",
            "[Unit]\nRequires=basic.target\nAfter=basic.target\n",
        )?;
        for target in ["basic", "sysinit"] {
            disk.file(
                &format!("usr/lib/systemd/system/{target}.target"),
                "[Unit]\n",
            )?;
        }
        let link = |target: &str, at: &str| {
            let at = disk.tree().join(at);
            fs::create_dir_all(at.parent().context("a link has a parent")?)?;
            anyhow::Ok(std::os::unix::fs::symlink(target, at)?)
        };
        link("multi-user.target", "usr/lib/systemd/system/default.target")?;
        link(
            "../front.service",
            "etc/systemd/system/multi-user.target.wants/front.service",
        )?;
        disk.file("opt/front/run", "#!/opt/front/shell\nexit 0\n")?;
        // A real program with no libraries to look for: the smallest ELF file that an `exec` takes.
        fs::write(disk.tree().join("opt/front/shell"), SMALLEST)?;
        fs::create_dir_all(disk.tree().join("sbin"))?;
        fs::write(disk.tree().join("sbin/init"), SMALLEST)?;
        for program in ["opt/front/run", "opt/front/shell", "sbin/init"] {
            fs::set_permissions(disk.tree().join(program), fs::Permissions::from_mode(0o755))?;
        }
        Ok(disk)
    }

    fn tree(&self) -> Utf8PathBuf {
        self.dir.path().join("tree")
    }

    fn image(&self) -> Utf8PathBuf {
        self.dir.path().join("root.ext4")
    }

    fn file(&self, path: &str, text: &str) -> Result<()> {
        let at = self.tree().join(path);
        fs::create_dir_all(at.parent().context("a file has a parent")?)?;
        fs::write(&at, text).with_context(|| at.to_string())
    }

    /// Packs the tree.
    fn pack(&self, options: &[&str]) -> Result<()> {
        fs::File::create(self.image())?.set_len(16 << 20)?;
        let (tree, image) = (self.tree(), self.image());
        let mut args = vec!["-q", "-F", "-t", "ext4", "-d", tree.as_str()];
        args.extend(options);
        args.push(image.as_str());
        run("mke2fs", &args).map(drop)
    }

    /// Lets debugfs write: a line for each command.
    fn debugfs(&self, commands: &str) -> Result<()> {
        let script = self.dir.path().join("script");
        fs::write(&script, commands)?;
        let out = run(
            "debugfs",
            &["-w", "-f", script.as_str(), self.image().as_str()],
        )?;
        let refused = out
            .lines()
            .find(|l| l.contains("usage:") || l.contains("invalid"));
        ensure!(refused.is_none(), "debugfs {commands}: {out}");
        Ok(())
    }

    fn read(&self) -> Result<Root> {
        Ok(Root::new(Ext4Tree::open(fs::read(self.image())?)?))
    }

    fn verdict(&self) -> Result<Verdict> {
        let disk = Ext4Tree::open(fs::read(self.image())?)?;
        Ok(diagnose(&Evidence::new().disk(disk).unit(UNIT)))
    }
}

/// What debugfs reads.
fn ask(image: &Utf8Path, question: &str) -> Result<String> {
    run("debugfs", &["-R", question, image.as_str()])
}

/// An ELF file for x86-64 that is only its header and one program header.
const SMALLEST: &[u8] = &[
    0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0x3e, 0, 1, 0, 0, 0, 0x78, 0,
    0x40, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0,
    0x38, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0,
    0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0x81, 0, 0, 0, 0, 0, 0, 0, 0x81, 0, 0, 0, 0, 0, 0, 0, 0,
    0x10, 0, 0, 0, 0, 0, 0, 0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05,
];

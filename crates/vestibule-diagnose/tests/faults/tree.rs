//! One base tree, and mutated views of it: an overlay mount where this machine allows it, else a copy.
use crate::program::output;
use anyhow::{Context, Result};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
};

/// The tree that every case starts from.
pub(crate) struct Base {
    dir: PathBuf,
    work: PathBuf,
}

/// What becomes of a mutated tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    None,
    /// An ext4 image.
    Image,
    /// One without room.
    Filled,
}

/// A mutated tree; gone when dropped.
pub(crate) struct Mutated {
    pub dir: PathBuf,
    /// The tree packed into an image, where the case is about the image itself.
    pub image: Option<PathBuf>,
    work: PathBuf,
    mounted: bool,
}

/// Makes the base tree beside its place and moves it there whole: a build that was cut short leaves nothing that looks
/// finished.
fn make(script: &Path, dir: &Path) -> Result<()> {
    let unfinished = dir.with_extension("unfinished");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished)?;
    }
    fs::create_dir_all(dir.parent().context("a base tree has a parent")?)?;
    output(Command::new("bash").arg(script).arg(&unfinished))?;
    fs::rename(&unfinished, dir).with_context(|| format!("move the base to {}", dir.display()))
}

impl Base {
    /// Finds or builds the base tree; none, with a printed reason, where that is not possible here.
    pub(crate) fn find(name: &str, checkout: &Path, faults: &Path) -> Result<Option<Self>> {
        if !faults.join("base/mkbase.sh").is_file() {
            println!(
                "skipped: no folder of faults at {} (set VESTIBULE_FAULTS)",
                faults.display()
            );
            return Ok(None);
        }
        let uid = fs::read_to_string("/proc/self/status")?;
        if !uid.lines().any(|l| l.starts_with("Uid:\t0\t")) {
            println!("skipped: the mutations need root");
            return Ok(None);
        }
        let target = checkout.join("target/faults");
        let dir = std::env::var_os("VESTIBULE_FAULTS_BASE")
            .map_or_else(|| target.join("base"), PathBuf::from);
        // The tests of this binary run side by side, and the first to come makes the tree for all.
        static MAKING: Mutex<()> = Mutex::new(());
        let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
        if !dir
            .join("etc/systemd/system/vm-browser-agent.service")
            .is_file()
        {
            let tools = Command::new("mmdebstrap").arg("--version").output();
            if tools.is_err() {
                println!(
                    "skipped: no base tree at {} and no mmdebstrap to make one",
                    dir.display()
                );
                return Ok(None);
            }
            make(&faults.join("base/mkbase.sh"), &dir)?;
        }
        let work =
            std::env::temp_dir().join(format!("vestibule-faults-{}-{name}", std::process::id()));
        fs::create_dir_all(&work)?;
        Ok(Some(Self {
            dir: dir.canonicalize()?,
            work,
        }))
    }

    /// A view of the base, changed by the case's `mutate.sh`.
    pub(crate) fn mutate(&self, case: &Path, packing: Packing) -> Result<Mutated> {
        let mut mutated = self.view()?;
        output(
            Command::new("bash")
                .arg(case.join("mutate.sh"))
                .arg(&mutated.dir),
        )?;
        mutated.image = match packing {
            Packing::None => None,
            Packing::Image => Some(image(&mutated.work, &mutated.dir)?),
            Packing::Filled => Some(filled_image(&mutated.work, &mutated.dir)?),
        };
        Ok(mutated)
    }

    /// A view of the base, changed by a few lines of shell with the variables of a `mutate.sh`.
    pub(crate) fn script(&self, lines: &str) -> Result<Mutated> {
        let mutated = self.view()?;
        mutated.change(lines)?;
        Ok(mutated)
    }

    fn view(&self) -> Result<Mutated> {
        let work = tempdir(&self.work)?;
        let dir = work.join("tree");
        for part in ["upper", "work", "tree"] {
            fs::create_dir_all(work.join(part))?;
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            self.dir.display(),
            work.join("upper").display(),
            work.join("work").display()
        );
        let mounted = output(
            Command::new("mount")
                .args(["-t", "overlay", "overlay", "-o", &options])
                .arg(&dir),
        )
        .is_ok();
        if !mounted {
            fs::remove_dir(&dir)?;
            output(Command::new("cp").arg("-a").arg(&self.dir).arg(&dir))?;
        }
        Ok(Mutated {
            dir,
            image: None,
            work,
            mounted,
        })
    }
}

fn tempdir(parent: &Path) -> Result<PathBuf> {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let dir = parent.join(format!("case{number}"));
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// The variables that every `mutate.sh` has.
const PRELUDE: &str = r#"set -euo pipefail
R=$(cd "${1:?}" && pwd); SVC=vm-browser-agent.service; U=$R/etc/systemd/system/$SVC
W=$R/etc/systemd/system/multi-user.target.wants; S=$R/etc/systemd/system; A=$R/opt/vm-browser-agent
dropin() { mkdir -p "$U.d"; cat > "$U.d/$1.conf"; }
"#;

impl Mutated {
    /// Room beside the tree.
    pub(crate) fn work(&self) -> &Path {
        &self.work
    }

    /// Changes the tree further, as [`Base::script`] does.
    pub(crate) fn change(&self, lines: &str) -> Result<()> {
        let script = format!("{PRELUDE}{lines}");
        output(
            Command::new("bash")
                .args(["-c", &script, "mutate"])
                .arg(&self.dir),
        )
        .map(drop)
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.work);
    }
}

/// Packs the tree without a mount.
fn image(work: &Path, tree: &Path) -> Result<PathBuf> {
    let image = work.join("root.ext4");
    fs::File::create(&image)?.set_len(640 << 20)?;
    output(
        Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-m", "1", "-d"])
            .arg(tree)
            .arg(&image),
    )?;
    Ok(image)
}

/// Packs the tree and fills what is left with one file, as a guest that ran out of disk would.
fn filled_image(work: &Path, tree: &Path) -> Result<PathBuf> {
    let image = image(work, tree)?;
    let filler = work.join("filler");
    let block = vec![1_u8; 1 << 20];
    let mut data = Vec::new();
    for _ in 0..640 {
        data.extend_from_slice(&block);
    }
    fs::write(&filler, data)?;
    let script = work.join("fill.debugfs");
    fs::write(&script, format!("write {} /filler\n", filler.display()))?;
    output(
        Command::new("debugfs")
            .args(["-w", "-f"])
            .arg(&script)
            .arg(&image),
    )?;
    Ok(image)
}

impl Drop for Mutated {
    fn drop(&mut self) {
        if self.mounted {
            let _ = output(Command::new("umount").arg(&self.dir));
        }
        let _ = fs::remove_dir_all(&self.work);
    }
}

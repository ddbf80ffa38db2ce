//! Before a save: the guest becomes one that any VM may begin as. The desktop has been up, so the page cache is warm; then
//! every program that holds randomness, connections or a profile of its own ends, the home directory becomes what the
//! image made it, and free memory becomes zeros, which cost nothing on disk. Where the order matters it is the order here.
use crate::{
    agent::Agent,
    browser,
    config_drive::{self, DriveError},
    init::ROOT_SERIAL,
    systemd::{BusError, Systemd},
};
use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
    process::{Pid, Signal, kill_process},
};
use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown, symlink},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;
use tracing::{info, warn};
use vestibule_api::error::Chain;

/// A page of ours on guest loopback: it takes the browser through its network service and a renderer of a site's.
const INNER_PAGE: &str = "http://127.0.0.1:8080/health";
/// The guest is quiet when its processors were idle for so much of so long; it is waited for so long at most.
const QUIET_SHARE: f64 = 0.9;
const QUIET_FOR: Duration = Duration::from_secs(2);
const QUIET_WAIT: Duration = Duration::from_secs(90);
/// Units that stop are looked at so often, for so long.
const STOP_LOOK: Duration = Duration::from_millis(200);
const STOP_WAIT: Duration = Duration::from_secs(90);
/// Where programs of any user may leave something.
const SCRATCH: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];
/// Free memory is cleared in pieces, and so much more of it is left than the kernel wants to have free: below its marks it
/// would drop the page cache, which is what a restored browser starts from.
const PIECE: usize = 8 << 20;
const LEAVE_KIB: u64 = 8 << 10;

/// Why the guest is not ready to be saved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrepareError {
    #[error("ask PID 1 to stop the desktop")]
    Units(#[from] BusError),
    #[error("stop the desktop: {0} did not end within {STOP_WAIT:?}")]
    Running(String),
    #[error("find the image's disk")]
    Disk(#[from] DriveError),
    #[error("mount the image's disk")]
    Mount(#[source] Errno),
    #[error("make `{}` what the image made it", path.display())]
    Home {
        path: PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("clear the guest")]
    Task(#[from] tokio::task::JoinError),
}

/// Does all of it. Takes seconds.
pub(crate) async fn prepare(agent: &Arc<Agent>) -> Result<(), PrepareError> {
    if agent.guest.image.has("browser") {
        match INNER_PAGE.parse() {
            Ok(url) => {
                if let Err(err) = browser::open(&agent.guest, &url).await {
                    warn!(error = %Chain(&err), "the browser was not warmed");
                }
            }
            Err(err) => warn!(error = %err, "no page to warm the browser with"),
        }
        quiet().await;
    }
    stop_units(agent).await?;
    let guest = agent.guest.clone();
    tokio::task::spawn_blocking(move || {
        if let Some(person) = &guest.person {
            end_processes_of(person.uid);
        }
        restore_home(&guest.home, &guest.run)?;
        for directory in SCRATCH {
            if let Err(err) = empty(Path::new(directory)) {
                warn!(error = %err, directory, "not emptied");
            }
        }
        clear_free_memory();
        Ok(())
    })
    .await?
}

/// Waits until the processors have little to do.
async fn quiet() {
    let deadline = Instant::now() + QUIET_WAIT;
    let mut before = cpu_times();
    while Instant::now() < deadline {
        tokio::time::sleep(QUIET_FOR).await;
        let now = cpu_times();
        if let (Some((idle, all)), Some((idle_before, all_before))) = (now, before) {
            #[expect(clippy::cast_precision_loss, reason = "a share, of some hundred ticks")]
            let share = (idle - idle_before) as f64 / (all - all_before).max(1) as f64;
            if share >= QUIET_SHARE {
                return;
            }
        }
        before = now;
    }
    info!("the guest did not become quiet");
}

/// Idle and all ticks of all processors (proc(5), `/proc/stat`).
fn cpu_times() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    Some((ticks.get(3)? + ticks.get(4)?, ticks.iter().sum()))
}

async fn stop_units(agent: &Agent) -> Result<(), PrepareError> {
    let names: Vec<String> = agent.units().map(str::to_owned).collect();
    if names.is_empty() {
        return Ok(());
    }
    let mut systemd = Systemd::connect().await?;
    // What was started last goes first; the X server, which the others need, goes last.
    for unit in names.iter().rev() {
        systemd.stop(unit).await?;
    }
    let deadline = Instant::now() + STOP_WAIT;
    loop {
        let units = systemd.named(&names).await?;
        let running = units
            .iter()
            .find(|unit| !matches!(unit.active.as_str(), "inactive" | "failed"));
        match running {
            None => return Ok(()),
            Some(unit) if Instant::now() >= deadline => {
                return Err(PrepareError::Running(unit.name.clone()));
            }
            Some(_) => tokio::time::sleep(STOP_LOOK).await,
        }
    }
}

/// Whatever the person's programs have left behind.
fn end_processes_of(uid: u32) {
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = process.file_name().to_str().and_then(|n| n.parse().ok());
        let Some(pid) = pid.and_then(Pid::from_raw) else {
            continue;
        };
        if process.metadata().is_ok_and(|meta| meta.uid() == uid) {
            // It may have ended meanwhile.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Empties the home directory and copies into it what the image has there.
fn restore_home(home: &Path, run: &Path) -> Result<(), PrepareError> {
    let failed = |err| PrepareError::Home {
        path: home.to_owned(),
        err,
    };
    let disk = config_drive::find_disk(ROOT_SERIAL, Duration::ZERO)?;
    let image = run.join("image");
    fs::create_dir_all(&image).map_err(failed)?;
    // Mounted twice, the file system is the same and stays read-only.
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    mount(&disk, &image, "ext4", flags, None).map_err(PrepareError::Mount)?;
    let from = image.join(home.strip_prefix("/").unwrap_or(home));
    let copied = empty(home).and_then(|()| copy_into(&from, home));
    let unmounted = unmount(&image, UnmountFlags::DETACH).map_err(PrepareError::Mount);
    copied.map_err(failed)?;
    unmounted
}

/// Removes everything in `directory`, which stays.
fn empty(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Copies what is in `from` into `to`: directories, files and links, with owner and mode.
fn copy_into(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let meta = entry.metadata()?;
        if meta.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
        } else if meta.is_dir() {
            fs::create_dir(&target)?;
            copy_into(&source, &target)?;
        } else {
            fs::write(&target, fs::read(&source)?)?;
        }
        lchown(&target, Some(meta.uid()), Some(meta.gid()))?;
        if !meta.is_symlink() {
            fs::set_permissions(&target, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
        }
    }
    Ok(())
}

/// Takes free memory and gives it back. The kernel hands out pages as zeros, and they are written to as zeros.
fn clear_free_memory() {
    // What names and inodes were known is looked up again in no time, and is scattered over many pages.
    let _ = fs::write("/proc/sys/vm/drop_caches", "2");
    let _ = fs::write("/proc/sys/vm/compact_memory", "1");
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    let (Some(free), Some(wanted)) = (free_kib(), wanted_kib()) else {
        return;
    };
    // No more than is free now, whatever the kernel frees meanwhile.
    let most = free.saturating_sub(wanted + LEAVE_KIB) / (PIECE as u64 >> 10);
    for _ in 0..most {
        if free_kib().is_none_or(|free| free < wanted + LEAVE_KIB) {
            break;
        }
        let mut piece = vec![0u8; PIECE];
        for page in piece.chunks_mut(4096) {
            page[0] = 0;
            std::hint::black_box(page);
        }
        pieces.push(piece);
    }
    info!(mib = pieces.len() * (PIECE >> 20), "cleared free memory");
}

fn free_kib() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemFree:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What the kernel wants to have free, over all zones (proc(5), `/proc/zoneinfo`): above it nothing is dropped.
fn wanted_kib() -> Option<u64> {
    let text = fs::read_to_string("/proc/zoneinfo").ok()?;
    let pages: u64 = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("high "))
        .filter_map(|rest| rest.trim().parse::<u64>().ok())
        .sum();
    Some(pages * 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_emptied_and_copied_with_modes_and_links() {
        let dir = camino_tempfile::tempdir().unwrap();
        let (image, home) = (dir.path().join("image"), dir.path().join("home"));
        fs::create_dir_all(image.join("sub")).unwrap();
        fs::write(image.join("sub/.profile"), "x").unwrap();
        fs::set_permissions(image.join("sub"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink("sub/.profile", image.join("link")).unwrap();
        fs::create_dir_all(home.join(".config/chromium/Default")).unwrap();
        fs::write(home.join(".config/chromium/Default/Cookies"), "c").unwrap();
        symlink("/etc", home.join("etc")).unwrap();
        empty(home.as_std_path()).unwrap();
        assert!(Path::new("/etc/passwd").exists());
        copy_into(image.as_std_path(), home.as_std_path()).unwrap();
        let mut names: Vec<_> = home.read_dir_utf8().unwrap().flatten().collect();
        names.sort_by_key(|entry| entry.file_name().to_owned());
        assert_eq!(names.len(), 2);
        assert_eq!(fs::read_to_string(home.join("link")).unwrap(), "x");
        let mode = home.join("sub").metadata().unwrap().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn the_kernel_is_understood() {
        let (idle, all) = cpu_times().unwrap();
        assert!(idle <= all && free_kib().unwrap() > 0 && wanted_kib().unwrap() > 0);
    }
}

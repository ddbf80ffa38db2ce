//! PID 1 of the initramfs: from a kernel with nothing to systemd on the image's root.
//!
//! ```text
//! proc, sys, dev ─▶ modules ─▶ root disk, by serial, read-only ─▶ overlay in memory
//!     ─▶ config drive: clock, entropy, machine-id, host name ─▶ switch root ─▶ /sbin/init
//! ```
//! The machine's identity is written before systemd starts, so that it is never a "first boot" and the journal has its
//! right directory from the first line. A failure is one line on the console that begins with `vestibule-init: cannot
//! start:`, then a restart, which both VMMs turn into their own exit.
pub(crate) mod identity;
mod modules;
mod root;

use crate::config_drive::{self, DriveError};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    system::{RebootCommand, reboot},
};
use std::{
    io, os::unix::process::CommandExt as _, path::Path, path::PathBuf, process::ExitCode,
    time::Duration,
};
use vestibule_api::error::Chain;

/// How long a disk may take to appear; under emulation on a loaded host this is seconds, not milliseconds.
const DISK_WAIT: Duration = Duration::from_secs(60);
/// Serial of the image's disk.
pub(crate) const ROOT_SERIAL: &str = "vestibule-root";
/// What becomes PID 1.
const INIT: &str = "/sbin/init";

/// Why the guest cannot start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    #[error("make the directory `{}`", path.display())]
    Directory {
        path: PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("mount {what} at `{}`", path.display())]
    Mount {
        what: String,
        path: PathBuf,
        #[source]
        err: Errno,
    },
    #[error("read the kernel command line")]
    CommandLine(#[source] io::Error),
    #[error("the kernel command line's `vestibule.overlay={0}` is not a size such as 60% or 512M")]
    OverlaySize(String),
    #[error("find the root disk")]
    RootDisk(#[source] DriveError),
    #[error("read this machine's configuration")]
    Config(#[source] DriveError),
    #[error("use the {0} of the config drive")]
    ConfigValue(&'static str),
    #[error("set the clock")]
    Clock(#[source] Errno),
    #[error("give entropy to the kernel")]
    Entropy(#[source] io::Error),
    #[error("write `{}`", path.display())]
    Write {
        path: PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("enter the new root")]
    Switch(#[source] Errno),
    #[error("start `{INIT}`")]
    Exec(#[source] io::Error),
}

/// Never returns on success: the process becomes systemd.
pub(crate) fn main() -> ExitCode {
    if std::process::id() != 1 {
        crate::say("vestibule-init: refused: this is not PID 1");
        return ExitCode::from(2);
    }
    let Err(err) = start();
    crate::say(&format!("vestibule-init: cannot start: {}", Chain(&err)));
    // The serial port drains while the kernel restarts; a panic instead would bury the line above.
    let _ = reboot(RebootCommand::Restart);
    ExitCode::FAILURE
}

fn start() -> Result<std::convert::Infallible, InitError> {
    root::mount_kernel_filesystems()?;
    use_console();
    for trouble in modules::load_all(Path::new("/modules")) {
        crate::say(&format!("vestibule-init: {}", Chain(&trouble)));
    }
    let disk = config_drive::find_disk(ROOT_SERIAL, DISK_WAIT).map_err(InitError::RootDisk)?;
    let options = std::fs::read_to_string("/proc/cmdline").map_err(InitError::CommandLine)?;
    root::mount_overlay(&disk, &root::overlay_size(&options)?)?;
    let config = config_drive::read(DISK_WAIT).map_err(InitError::Config)?;
    identity::apply(&config, Path::new(root::NEW_ROOT))?;
    root::switch()?;
    Err(InitError::Exec(std::process::Command::new(INIT).exec()))
}

/// The kernel opens `/dev/console` for PID 1 only if the initramfs has that node; with devtmpfs it is there for sure.
fn use_console() {
    if let Ok(console) =
        rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY, Mode::empty())
    {
        let _ = rustix::stdio::dup2_stdin(&console);
        let _ = rustix::stdio::dup2_stdout(&console);
        let _ = rustix::stdio::dup2_stderr(&console);
    }
}

//! The guest's root: the image's disk, read-only and shared by all VMs, under an overlay that lives in memory.
use super::InitError;
use rustix::{
    fs::CWD,
    io::Errno,
    mount::{MountFlags, mount, mount_move},
    process::{chdir, chroot},
};
use std::{
    ffi::{CStr, CString},
    fs,
    path::Path,
};

/// Where the new root is put together.
pub(super) const NEW_ROOT: &str = "/newroot";
const LOWER: &str = "/lower";
const MEMORY: &str = "/memory";
/// Share of the guest's memory that its own writes may take, unless the command line says otherwise.
const DEFAULT_OVERLAY: &str = "60%";

/// `/proc`, `/sys` and `/dev`.
pub(super) fn mount_kernel_filesystems() -> Result<(), InitError> {
    let plain = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    mount_at("proc", "/proc", "proc", plain, None)?;
    mount_at("sysfs", "/sys", "sysfs", plain, None)?;
    match mount_at(
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MountFlags::NOSUID,
        Some(c"mode=0755"),
    ) {
        // CONFIG_DEVTMPFS_MOUNT has done it.
        Err(InitError::Mount {
            err: Errno::BUSY, ..
        }) => Ok(()),
        other => other,
    }
}

/// The size for the overlay that the kernel command line asks for, as tmpfs takes it.
pub(super) fn overlay_size(options: &str) -> Result<String, InitError> {
    let given = options
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix("vestibule.overlay="));
    let size = given.unwrap_or(DEFAULT_OVERLAY);
    let digits = size.trim_end_matches(['%', 'K', 'M', 'G', 'k', 'm', 'g']);
    let good = digits.parse::<u64>().is_ok_and(|n| n > 0) && size.len() - digits.len() <= 1;
    if good {
        Ok(size.to_owned())
    } else {
        Err(InitError::OverlaySize(size.to_owned()))
    }
}

/// Puts the new root together from the image on `disk` and a tmpfs of `size`.
pub(super) fn mount_overlay(disk: &Path, size: &str) -> Result<(), InitError> {
    mount_at(
        &disk.to_string_lossy(),
        LOWER,
        "ext4",
        MountFlags::RDONLY | MountFlags::NODEV,
        None,
    )?;
    let options = CString::new(format!("mode=0755,size={size}"))
        .map_err(|_| InitError::OverlaySize(size.to_owned()))?;
    mount_at(
        "tmpfs",
        MEMORY,
        "tmpfs",
        MountFlags::empty(),
        Some(&options),
    )?;
    for part in ["upper", "work"] {
        make_dir(&Path::new(MEMORY).join(part))?;
    }
    let layers = c"lowerdir=/lower,upperdir=/memory/upper,workdir=/memory/work";
    mount_at(
        "overlay",
        NEW_ROOT,
        "overlay",
        MountFlags::empty(),
        Some(layers),
    )
}

/// Makes the new root `/`, with `/dev`, `/proc` and `/sys` in it, and frees what the initramfs held.
pub(super) fn switch() -> Result<(), InitError> {
    for name in ["dev", "proc", "sys"] {
        let (from, to) = (Path::new("/").join(name), Path::new(NEW_ROOT).join(name));
        make_dir(&to)?;
        mount_move(&from, &to).map_err(|err| InitError::Mount {
            what: format!("/{name}"),
            path: to.clone(),
            err,
        })?;
    }
    // The initramfs cannot be unmounted; its files are memory that the guest would never get back.
    let _ = fs::remove_dir_all("/modules");
    let _ = fs::remove_file("/init");
    chdir(NEW_ROOT).map_err(InitError::Switch)?;
    mount_move(".", "/").map_err(InitError::Switch)?;
    chroot(".").map_err(InitError::Switch)?;
    chdir("/").map_err(InitError::Switch)
}

fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    data: Option<&CStr>,
) -> Result<(), InitError> {
    make_dir(Path::new(target))?;
    mount(source, target, kind, flags, data).map_err(|err| InitError::Mount {
        what: if source == kind {
            kind.to_owned()
        } else {
            format!("{source} ({kind})")
        },
        path: target.into(),
        err,
    })
}

fn make_dir(path: &Path) -> Result<(), InitError> {
    match rustix::fs::mkdirat(CWD, path, 0o755.into()) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(err) => Err(InitError::Directory {
            path: path.to_owned(),
            err: err.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overlay_takes_a_share_or_a_size() {
        let size = |line: &str| overlay_size(line).ok();
        assert_eq!(size("console=ttyS0 quiet").as_deref(), Some("60%"));
        assert_eq!(
            size("quiet vestibule.overlay=512M x=y\n").as_deref(),
            Some("512M")
        );
        assert_eq!(size("vestibule.overlay=40%").as_deref(), Some("40%"));
        for bad in [
            "vestibule.overlay=",
            "vestibule.overlay=0%",
            "vestibule.overlay=1,exec",
            "vestibule.overlay=5MM",
        ] {
            assert_eq!(size(bad), None, "{bad}");
        }
    }
}

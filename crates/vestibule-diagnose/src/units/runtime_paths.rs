//! Paths that a disk does not hold and a running guest may: kernel file systems, `tmpfiles.d(5)`, directories that
//! systemd makes for units, mounts of `fstab`.
use super::{UnitSet, covers::is_below, fstab::Fstab, names};
use crate::{disk::Root, text};

/// What is known of a path at the time when a unit starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    There,
    Absent,
    /// It is made, or may be, while the guest runs.
    Unknown,
}

/// Everything that makes paths at boot.
#[derive(Clone, Debug, Default)]
pub struct RuntimePaths {
    made: Vec<String>,
    mounts: Vec<String>,
}

impl RuntimePaths {
    /// Collects the makers of paths on a disk.
    pub fn read(root: &Root, units: &UnitSet<'_>, fstab: &Fstab) -> Self {
        let mut out = Self::default();
        for dir in [
            "/etc/tmpfiles.d",
            "/usr/local/lib/tmpfiles.d",
            "/usr/lib/tmpfiles.d",
        ] {
            for entry in root.list(dir).iter().filter(|e| e.name.ends_with(".conf")) {
                for line in root
                    .read_text(&format!("{dir}/{}", entry.name))
                    .unwrap_or_default()
                    .lines()
                {
                    out.take_tmpfiles(line);
                }
            }
        }
        out.mounts.extend(
            fstab
                .entries
                .iter()
                .map(|e| e.target.clone())
                .filter(|t| t.len() > 1),
        );
        for name in units
            .files()
            .keys()
            .filter(|n| names::unit_type(n) == "mount")
        {
            let stem = name.rsplit_once('.').map_or("", |(s, _)| s);
            out.mounts.push(names::unescape_path(stem));
        }
        out
    }

    fn take_tmpfiles(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let (Some(kind), Some(path)) = (words.next(), words.next()) else {
            return;
        };
        let makes = kind.starts_with([
            'f', 'F', 'd', 'D', 'v', 'q', 'Q', 'p', 'L', 'c', 'b', 'C', 'w',
        ]);
        if makes && path.starts_with('/') {
            self.made.push(path.trim_end_matches('/').to_owned());
        }
    }

    /// Whether `tmpfiles.d` makes, below `target`, the path itself, something in it, or what it lies in.
    pub fn is_made(&self, path: &str, target: &str) -> bool {
        let mut made = self.made.iter().filter(|made| is_below(made, target));
        made.any(|m| m == path || is_below(path, m) || is_below(m, path) || text::glob(m, path))
    }

    /// Whether `path` exists when units start, as far as the disk tells.
    pub fn presence(&self, root: &Root, path: &str) -> Presence {
        let under = |base: &str| {
            path == base || path.strip_prefix(base).is_some_and(|r| r.starts_with('/'))
        };
        if matches!(
            path,
            "/" | "/run"
                | "/tmp"
                | "/dev"
                | "/proc"
                | "/sys"
                | "/dev/null"
                | "/dev/shm"
                | "/run/systemd"
        ) {
            return Presence::There;
        }
        if [
            "/run", "/var/run", "/dev", "/proc", "/sys", "/tmp", "/var/tmp",
        ]
        .iter()
        .any(|b| under(b))
        {
            return Presence::Unknown;
        }
        if self.mounts.iter().any(|m| under(m)) {
            return Presence::Unknown;
        }
        if root.exists(path) {
            return Presence::There;
        }
        let made = self
            .made
            .iter()
            .any(|m| m == path || m.starts_with(&format!("{path}/")) || text::glob(m, path));
        if made {
            Presence::Unknown
        } else {
            Presence::Absent
        }
    }
}

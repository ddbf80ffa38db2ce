//! Which Firecracker this is, and what follows from it. Requests are built from [`Features`] alone: a field that a version
//! does not know is refused with the whole request (`deny_unknown_fields`), so it is never sent.
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// `major.minor.patch` of a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version {
    pub major: u16,
    pub minor: u16,
    pub patch: u16,
}

/// The oldest version whose API the driver speaks.
pub const OLDEST: Version = Version::new(1, 12, 0);

/// Text that names no version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no version of Firecracker")]
pub struct NotAVersion(String);

impl Version {
    pub const fn new(major: u16, minor: u16, patch: u16) -> Self {
        Self {
            major,
            minor,
            patch,
        }
    }

    /// What this version can do and knows. Of one API a newer minor version takes what an older one took (Firecracker
    /// fact 4), so a version that is newer than any known here is treated as the newest known.
    pub fn features(self) -> Features {
        let since = |minor| self >= Self::new(1, minor, 0);
        Features {
            vsock_override: since(16),
            pause_keeps_stream: !since(16) || since(17),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for Version {
    type Err = NotAVersion;

    /// `1.12.1`, `v1.12.1`, and builds of a branch: `1.17.0-dev`, `1.12.1-3-gabcdef-dirty`.
    fn from_str(text: &str) -> Result<Self, NotAVersion> {
        let numbers = text.strip_prefix('v').unwrap_or(text);
        let numbers = numbers.split(['-', '+']).next().unwrap_or_default();
        let mut parts = numbers.split('.').map(str::parse::<u16>);
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch)), None) => {
                Ok(Self::new(major, minor, patch))
            }
            _ => Err(NotAVersion(text.chars().take(60).collect())),
        }
    }
}

/// What one version knows, of what the driver uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// A restore may say where the vsock's socket is (1.16.0, Firecracker fact 13). Elsewhere it is where it was, which the
    /// driver makes true by names that are relative to each VM's own directory.
    pub vsock_override: bool,
    /// Whether the host can still connect to the guest after a pause and a resume with nothing between (Firecracker fact 10:
    /// in 1.16.0 and 1.16.1 it hangs for ever; the mend is on the way to 1.17). Where not, VMs are not paused.
    pub pause_keeps_stream: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        for (text, version) in [
            ("1.12.1", Version::new(1, 12, 1)),
            ("v1.16.0", Version::new(1, 16, 0)),
            ("1.17.0-dev", Version::new(1, 17, 0)),
            ("1.12.1-3-gabcdef-dirty", Version::new(1, 12, 1)),
        ] {
            assert_eq!(text.parse(), Ok(version));
        }
        for nonsense in ["", "1.12", "1.12.1.4", "one", "1.-2.3", "99999.0.0"] {
            assert!(nonsense.parse::<Version>().is_err(), "{nonsense}");
        }
        assert!(Version::new(1, 9, 9) < OLDEST && Version::new(2, 0, 0) > OLDEST);
        assert_eq!(Version::new(1, 12, 1).to_string(), "1.12.1");
    }

    #[test]
    fn features_follow_from_the_version() {
        assert!(!Version::new(1, 12, 1).features().vsock_override);
        assert!(!Version::new(1, 15, 9).features().vsock_override);
        assert!(Version::new(1, 16, 0).features().vsock_override);
    }

    #[test]
    fn only_the_versions_with_the_bug_are_not_paused() {
        let pauses = |major, minor, patch| {
            Version::new(major, minor, patch)
                .features()
                .pause_keeps_stream
        };
        assert!(pauses(1, 12, 1) && pauses(1, 15, 9));
        assert!(!pauses(1, 16, 0) && !pauses(1, 16, 1));
        assert!(pauses(1, 17, 0) && pauses(2, 0, 0));
    }
}

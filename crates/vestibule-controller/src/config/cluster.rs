//! `[cluster]`: several controllers on one PostgreSQL database, each on a host of its own.
use super::Config;
use camino::Utf8PathBuf;
use serde::Deserialize;
use std::{ops::RangeInclusive, time::Duration};
use url::{Host, Url};

/// `[cluster]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterConfig {
    /// What people call this host; the machine's host name where nothing is said.
    pub name: Option<String>,
    /// Where the other controllers reach this one: `https://name:port`, or `http://` with an address of loopback. Where
    /// nothing is said and `listen` is on loopback without TLS: that.
    pub address: Option<String>,
    /// A file of mode 0600 with a secret of at least 32 characters, the same on every host: by it controllers know each other.
    pub key_file: Option<Utf8PathBuf>,
    /// Certificate authorities of the other controllers in PEM, besides the public ones.
    pub ca: Option<Utf8PathBuf>,
    /// Seconds for which a controller takes its host's lease; it is renewed three times in that time.
    pub lease_s: u32,
    /// A host whose lease ran out so many seconds ago is lost: its sign-ins end.
    pub lost_after_s: u32,
}

const LEASE_S: RangeInclusive<u32> = 1..=300;

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            name: None,
            address: None,
            key_file: None,
            ca: None,
            lease_s: 15,
            lost_after_s: 60,
        }
    }
}

impl ClusterConfig {
    pub(crate) fn lease(&self) -> Duration {
        Duration::from_secs(self.lease_s.into())
    }

    pub(crate) fn lost_after(&self) -> Duration {
        Duration::from_secs(self.lost_after_s.into())
    }
}

impl Config {
    /// `[cluster]`, or what holds without.
    pub(crate) fn cluster(&self) -> ClusterConfig {
        self.cluster.clone().unwrap_or_default()
    }

    /// The first key of `[cluster]` with a value that can't be, and what was expected there.
    pub(super) fn check_cluster(&self) -> Result<(), (String, String)> {
        let Some(cluster) = &self.cluster else {
            return Ok(());
        };
        let wrong = |key: &str, what: String| Err((key.to_owned(), what));
        if self.database == "sqlite" {
            let what = "several controllers need `database` to be a PostgreSQL one; with `sqlite` there is one controller";
            return wrong("cluster", what.to_owned());
        }
        if cluster.key_file.is_none() {
            let what = "missing; expected a file of mode 0600 with the same key on every host";
            return wrong("cluster.key_file", what.to_owned());
        }
        if !LEASE_S.contains(&cluster.lease_s) {
            let what = format!("{}; expected {LEASE_S:?} seconds", cluster.lease_s);
            return wrong("cluster.lease_s", what);
        }
        match &cluster.address {
            Some(address) if !is_peer(address) => {
                let what = format!(
                    "`{address}`; expected `https://name:port`, or `http://127.0.0.1:port` on loopback, without path"
                );
                wrong("cluster.address", what)
            }
            Some(_) | None => Ok(()),
        }
    }
}

/// Whether another controller may be spoken to at this address: without TLS only where nothing leaves the machine.
pub(crate) fn is_peer(text: &str) -> bool {
    let Ok(url) = Url::parse(text) else {
        return false;
    };
    let private = match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(_)) | None => false,
    };
    (url.scheme() == "https" || url.scheme() == "http" && private)
        && url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.path() == "/"
        && url.query().is_none()
        && url.fragment().is_none()
}

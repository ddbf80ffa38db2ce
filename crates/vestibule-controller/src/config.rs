//! The controller's configuration: one TOML file, every key optional, unknown keys refused.
mod address;
pub(crate) mod cluster;
mod oidc;
mod scheduler;

pub use address::TlsConfig;
pub use cluster::ClusterConfig;
pub use oidc::OidcConfig;
pub(crate) use oidc::is_endpoint;
pub use scheduler::{EngineKind, SchedulerConfig};

use crate::state::Deadlines;
use camino::{Utf8Path, Utf8PathBuf};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use serde::Deserialize;
use std::{collections::BTreeMap, net::SocketAddr, ops::RangeInclusive, time::Duration};
use url::Url;
use vestibule_api::{
    egress::{EgressMode, EgressPolicy, Pin},
    ids::{AliasName, ProviderId},
    machine::{DriverChoice, JailSpec, MemoryBackend, VCPUS},
    pack::{self, Override},
};
use vestibule_vault::KeySource;

/// Why there is no configuration to run with.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read the configuration `{path}`")]
    Read {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("understand the configuration `{path}`")]
    Parse {
        path: Utf8PathBuf,
        #[source]
        err: Box<toml::de::Error>,
    },
    #[error("configuration `{path}`, key `{key}`: {what}")]
    Value {
        path: Utf8PathBuf,
        key: String,
        what: String,
    },
    #[error("read the certificate authorities `{path}` of `egress.extra_ca`")]
    ExtraCa {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
}

/// Everything that an operator can set.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address to listen on. Other than loopback only with `tls` and somebody who can sign in. Port 0: any free one;
    /// `$VESTIBULE_HOME/address` says which.
    pub listen: SocketAddr,
    /// TLS on `listen`. The command line then uses a second, plain port on loopback.
    pub tls: Option<TlsConfig>,
    /// Where people sign in to the dashboard besides with a password here; none: nowhere.
    pub oidc: Option<OidcConfig>,
    /// Where people reach the dashboard, `https://name` with a port that is not the scheme's: for links, and as a further
    /// value of the Host header. With `https:`, cookies are `Secure`.
    pub public_url: Option<String>,
    /// Origins whose pages may show the dashboard in a frame, `https://app.example.com`.
    pub frame_ancestors: Vec<String>,
    /// Whose sessions wait, before their credential enters the vault, until their owner has confirmed the account.
    pub confirm_account: ConfirmAccount,
    /// Further values of the Host header that are served, `name:port`: a name that a reverse proxy on this host uses.
    pub allowed_hosts: Vec<String>,
    /// Image alias of new sessions.
    pub image: String,
    pub vm: VmConfig,
    pub limits: Limits,
    /// Restored, paused VMs that are kept ready, by image alias; `image` has one where nothing is said.
    pub pool: BTreeMap<AliasName, u32>,
    pub deadlines: DeadlineConfig,
    pub egress: EgressConfig,
    pub vault: VaultConfig,
    /// `sqlite` (a file in the home directory), or the URL of a PostgreSQL database.
    pub database: String,
    /// Several controllers on one database; none: this one alone.
    pub cluster: Option<ClusterConfig>,
    /// Changes of provider packs, by their id.
    pub providers: BTreeMap<ProviderId, Override>,
    /// The program that runs a VM, with its first arguments; empty: this program, as `run-vm`. Not with an engine.
    pub runner: Vec<String>,
    pub scheduler: SchedulerConfig,
    /// `$VESTIBULE_HOME`. Not a key of the file.
    #[serde(skip)]
    pub home: Utf8PathBuf,
    /// PEM texts of `egress.extra_ca`. Not a key of the file.
    #[serde(skip)]
    extra_ca_pem: Vec<String>,
}

/// `confirm_account`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConfirmAccount {
    /// Those of users and service tokens; not those of the local admin.
    #[default]
    Users,
    Always,
    Never,
}

/// `[vm]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// `vestibule serve` resolves `auto` when it starts: the store is then asked for that driver's snapshots alone.
    pub driver: DriverChoice,
    /// MiB of memory; none: what the image declares.
    pub memory_mib: Option<u32>,
    /// none: what the image declares.
    pub vcpus: Option<u32>,
    /// Where the memory of VMs comes from that begin from a snapshot, under Firecracker.
    pub memory_backend: MemoryBackend,
    /// Users that VMs run as, where the controller is root.
    pub jail: JailSpec,
    /// Why VMs are not jailed on this host, and what to do; none: they are. `vestibule serve` finds out. Not a key of the file.
    #[serde(skip)]
    pub not_jailed: Option<(String, String)>,
}

/// `[limits]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// VMs at a time; further sessions wait.
    pub vms: u32,
    /// Sessions that may wait for a place; further ones are refused with 429.
    pub waiting: u32,
    /// Viewers of one session at a time, screen and terminal each.
    pub viewers: u32,
    /// Sessions of one user at a time (of a service token: of each `userId`); 0: any number. Not the local admin's.
    pub live_per_user: u32,
    /// Sessions of one organisation at a time, where the organisation itself says nothing; 0: any number.
    pub live_per_organisation: u32,
    /// Sign-ins that one user or service token may start a minute; 0: any number. Not the local admin's.
    pub starts_per_minute: u32,
    /// The pool is filled only while the host has so many MiB of memory available besides the VM's, and gives VMs back when
    /// there are less.
    pub min_free_memory_mib: u64,
    /// A VM is started only while the file system of the home directory has so many MiB free.
    pub min_free_mib: u64,
    /// Bytes of the serial console kept from its beginning, and as many from its end.
    pub console_keep_bytes: u64,
    /// Days that an ended session can be looked up.
    pub keep_sessions_days: u32,
    /// Days that the evidence of a VM is kept.
    pub keep_evidence_days: u32,
    /// The evidence of all VMs has at most so many MiB, or the oldest goes; 0: any number.
    pub keep_evidence_mib: u64,
    /// Days that an image stays to which no alias points, from when it was built.
    pub keep_images_days: u32,
}

/// `[deadlines]`, in seconds.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeadlineConfig {
    /// Waiting for a place.
    pub placing_s: u32,
    /// From the runner's start to a painted screen. The session's own deadline is a minute later.
    pub boot_s: u32,
    /// From a runner's start to a VM that is ready, where the VM begins from a snapshot; then another one boots.
    pub restore_s: u32,
    /// A VM of the pool that nobody took for so long is replaced by a new one.
    pub pool_s: u32,
    /// From a painted screen to the tool's start.
    pub login_start_s: u32,
    /// Signing in: an upper bound over what each flow of a pack gives (`timeout_s`).
    pub sign_in_s: u32,
    /// Confirming the account, where that is asked for.
    pub confirm_s: u32,
    /// From a complete (and confirmed) credential to a sealed one.
    pub capture_s: u32,
}

/// `[egress]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EgressConfig {
    /// `open`: every public address; `allow-list`: what the pack names.
    pub mode: EgressMode,
    /// Names with an address of the operator's.
    pub pins: Vec<Pin>,
    /// Files of further certificate authorities in PEM, for the sign-ins without a tool.
    pub extra_ca: Vec<Utf8PathBuf>,
    /// An upstream HTTP proxy, `http://host:port`.
    pub upstream: Option<String>,
}

/// `[vault]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VaultConfig {
    /// An environment file with `VESTIBULE_VAULT_KEY=`; none: systemd's credential, else a key of the vault's own.
    pub environment_file: Option<Utf8PathBuf>,
}

/// Seconds that a sign-in may take; the same bounds as `timeout_s` of a flow.
const SIGN_IN_S: RangeInclusive<u32> = 10..=3600;

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 4000)),
            tls: None,
            oidc: None,
            public_url: None,
            frame_ancestors: Vec::new(),
            confirm_account: ConfirmAccount::default(),
            allowed_hosts: Vec::new(),
            image: "browser".to_owned(),
            vm: VmConfig::default(),
            limits: Limits::default(),
            pool: BTreeMap::new(),
            deadlines: DeadlineConfig::default(),
            egress: EgressConfig::default(),
            vault: VaultConfig::default(),
            database: "sqlite".to_owned(),
            cluster: None,
            providers: BTreeMap::new(),
            runner: Vec::new(),
            scheduler: SchedulerConfig::default(),
            home: Utf8PathBuf::new(),
            extra_ca_pem: Vec::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            vms: 4,
            waiting: 32,
            viewers: 8,
            live_per_user: 4,
            live_per_organisation: 0,
            starts_per_minute: 30,
            min_free_memory_mib: 512,
            min_free_mib: 256,
            console_keep_bytes: 512 << 10,
            keep_sessions_days: 30,
            keep_evidence_days: 30,
            keep_evidence_mib: 4096,
            keep_images_days: 7,
        }
    }
}

impl Default for DeadlineConfig {
    fn default() -> Self {
        Self {
            placing_s: 900,
            boot_s: 300,
            restore_s: 120,
            pool_s: 3600,
            login_start_s: 120,
            sign_in_s: *SIGN_IN_S.end(),
            confirm_s: 300,
            capture_s: 120,
        }
    }
}

impl Default for EgressConfig {
    fn default() -> Self {
        Self {
            mode: EgressMode::Open,
            pins: Vec::new(),
            extra_ca: Vec::new(),
            upstream: None,
        }
    }
}

impl Config {
    /// Where runners keep what they found out about this host.
    pub(crate) fn cache_dir(&self) -> Utf8PathBuf {
        self.home.join("cache")
    }

    /// Reads `path`, else `vestibule.toml` in `home` where there is one, else the defaults.
    ///
    /// # Errors
    /// When the file can't be read, has a key that is not known, or a value that can't be.
    pub fn load(path: Option<&Utf8Path>, home: &Utf8Path) -> Result<Self, ConfigError> {
        let default = home.join("vestibule.toml");
        let mut config = match path {
            Some(path) => Self::read(path)?,
            None if default.exists() => Self::read(&default)?,
            None => Self::default(),
        };
        home.clone_into(&mut config.home);
        let file = path.unwrap_or(&default);
        let wrong = |(key, what): (String, String)| ConfigError::Value {
            path: file.to_owned(),
            key,
            what,
        };
        config.check().map_err(wrong)?;
        for (i, path) in config.egress.extra_ca.iter().enumerate() {
            let pem = std::fs::read_to_string(path).map_err(|err| ConfigError::ExtraCa {
                path: path.clone(),
                err,
            })?;
            check_ca(&pem).map_err(|what| {
                let key = format!("egress.extra_ca[{i}]");
                wrong((key, format!("`{path}` {what}")))
            })?;
            config.extra_ca_pem.push(pem);
        }
        Ok(config)
    }

    fn read(path: &Utf8Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|err| ConfigError::Read {
            path: path.to_owned(),
            err,
        })?;
        toml::from_str(&text).map_err(|err| ConfigError::Parse {
            path: path.to_owned(),
            err: Box::new(err),
        })
    }

    /// The first key with a value that can't be, and what was expected there.
    fn check(&self) -> Result<(), (String, String)> {
        let wrong = |key: &str, what: String| Err((key.to_owned(), what));
        if let Err(err) = self.image.parse::<AliasName>() {
            return wrong("image", err.to_string());
        }
        let JailSpec { first_uid, uids } = self.vm.jail;
        if first_uid < 1000 || uids == 0 || first_uid.checked_add(uids).is_none() {
            let what = format!("{uids} users from {first_uid} on; expected 1 or more from 1000 on");
            return wrong("vm.jail", what);
        }
        if let Some(vcpus) = self.vm.vcpus.filter(|vcpus| !VCPUS.contains(vcpus)) {
            return wrong("vm.vcpus", format!("{vcpus}; expected {VCPUS:?}"));
        }
        if self.limits.vms == 0 {
            return wrong(
                "limits.vms",
                "0 VMs would let every session wait for ever".to_owned(),
            );
        }
        for (key, value) in [
            ("deadlines.restore_s", self.deadlines.restore_s),
            ("deadlines.pool_s", self.deadlines.pool_s),
            ("deadlines.confirm_s", self.deadlines.confirm_s),
        ] {
            if value == 0 {
                return wrong(key, "0; expected 1 or more seconds".to_owned());
            }
        }
        let sign_in_s = self.deadlines.sign_in_s;
        if !SIGN_IN_S.contains(&sign_in_s) {
            return wrong(
                "deadlines.sign_in_s",
                format!("{sign_in_s}; expected {SIGN_IN_S:?} seconds"),
            );
        }
        if !["postgres://", "postgresql://"]
            .iter()
            .any(|scheme| self.database.starts_with(scheme))
            && self.database != "sqlite"
        {
            // The text may hold a password.
            let what = "expected `sqlite`, `postgres://…` or `postgresql://…`";
            return wrong("database", what.to_owned());
        }
        self.check_cluster()?;
        self.check_origins()?;
        if let Some(oidc) = &self.oidc {
            oidc.check()?;
        }
        self.scheduler.check()?;
        self.egress.check()
    }

    /// Where the vault's master key is, for this process.
    pub fn vault_key(&self) -> KeySource {
        let credentials = std::env::var("CREDENTIALS_DIRECTORY").ok();
        KeySource::choose(
            self.vault.environment_file.clone(),
            credentials.as_deref().map(Utf8Path::new),
        )
    }

    /// How many VMs are kept ready, by image alias.
    pub(crate) fn pool(&self) -> BTreeMap<String, u32> {
        let mut pool: BTreeMap<String, u32> = self
            .pool
            .iter()
            .map(|(alias, count)| (alias.to_string(), *count))
            .collect();
        pool.entry(self.image.clone()).or_insert(1);
        pool
    }

    /// How long a person may take whose flow gives `timeout_s`.
    pub(crate) fn sign_in(&self, timeout_s: u32) -> Duration {
        Duration::from_secs(timeout_s.min(self.deadlines.sign_in_s).into())
    }

    /// The policy of a session's way out, where the pack lists `hosts`.
    pub(crate) fn policy(&self, hosts: Vec<String>) -> EgressPolicy {
        EgressPolicy {
            mode: self.egress.mode,
            hosts: if self.egress.mode == EgressMode::AllowList {
                hosts
            } else {
                Vec::new()
            },
            pins: self.egress.pins.clone(),
            extra_ca_pem: self.extra_ca_pem.clone(),
            upstream: self.egress.upstream.clone(),
        }
    }

    pub(crate) fn deadlines(&self) -> Deadlines {
        let secs = |s: u32| Duration::from_secs(u64::from(s));
        let d = &self.deadlines;
        Deadlines {
            requested: secs(60),
            placing: secs(d.placing_s),
            // The runner ends a VM that does not become ready, and knows why; this is for a runner that does not.
            starting: secs(d.boot_s.saturating_add(60)),
            ready: secs(d.login_start_s),
            confirming: secs(d.confirm_s),
            capturing: secs(d.capture_s),
        }
    }
}

impl EgressConfig {
    fn check(&self) -> Result<(), (String, String)> {
        if self.mode == EgressMode::Closed {
            let what = "`closed` would let nobody sign in; expected `open` or `allow-list`";
            return Err(("egress.mode".to_owned(), what.to_owned()));
        }
        for (i, pin) in self.pins.iter().enumerate() {
            let at = |name: &str| format!("egress.pins[{i}].{name}");
            if !pack::is_host(&pin.host) {
                return Err((at("host"), pack::not_host(&pin.host)));
            }
            if pin.port == Some(0) {
                return Err((at("port"), "0; expected 1 to 65535".to_owned()));
            }
            if pin.to.port() == 0 {
                let what = format!("`{}`; expected an address with a port", pin.to);
                return Err((at("to"), what));
            }
        }
        match &self.upstream {
            Some(upstream) if !is_proxy(upstream) => {
                // The text may hold a password.
                let what = "expected `http://host:port`, without user, path and query";
                Err(("egress.upstream".to_owned(), what.to_owned()))
            }
            Some(_) | None => Ok(()),
        }
    }
}

fn is_proxy(text: &str) -> bool {
    Url::parse(text).is_ok_and(|url| {
        url.scheme() == "http"
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
            && url.path() == "/"
            && url.query().is_none()
            && url.fragment().is_none()
    })
}

/// What is wrong with a file of certificate authorities, if anything.
fn check_ca(pem: &str) -> Result<(), String> {
    let mut roots = RootCertStore::empty();
    for (i, certificate) in CertificateDer::pem_slice_iter(pem.as_bytes()).enumerate() {
        let wrong = |err: String| format!("has a certificate {} that is none: {err}", i + 1);
        let certificate = certificate.map_err(|err| wrong(err.to_string()))?;
        roots
            .add(certificate)
            .map_err(|err| wrong(err.to_string()))?;
    }
    if roots.is_empty() {
        return Err("has no certificate; expected PEM with at least one".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests;

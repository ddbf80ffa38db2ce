//! The controller's configuration: one TOML file, every key optional, unknown keys refused.
use crate::state::Deadlines;
use camino::{Utf8Path, Utf8PathBuf};
use serde::Deserialize;
use std::{collections::BTreeMap, net::SocketAddr, time::Duration};
use vestibule_api::{
    egress::{EgressMode, EgressPolicy, Pin},
    ids::{AliasName, ProviderId},
    machine::DriverChoice,
    pack::Override,
};

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
    #[error("configuration key `{key}`: {what}")]
    Value { key: &'static str, what: String },
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
    /// Address to listen on. Loopback only. Port 0: any free one; `$VESTIBULE_HOME/address` says which.
    pub listen: SocketAddr,
    /// Further values of the Host header that are served, `name:port`: a name that a reverse proxy on this host uses.
    pub allowed_hosts: Vec<String>,
    /// Image alias of new sessions.
    pub image: String,
    pub vm: VmConfig,
    pub limits: Limits,
    pub deadlines: DeadlineConfig,
    pub egress: EgressConfig,
    pub vault: VaultConfig,
    /// `sqlite` (a file in the home directory), or the URL of a PostgreSQL database.
    pub database: String,
    /// Changes of provider packs, by their id.
    pub providers: BTreeMap<ProviderId, Override>,
    /// The program that runs a VM, with its first arguments; empty: this program, as `run-vm`.
    pub runner: Vec<String>,
    /// `$VESTIBULE_HOME`. Not a key of the file.
    #[serde(skip)]
    pub home: Utf8PathBuf,
    /// PEM texts of `egress.extra_ca`. Not a key of the file.
    #[serde(skip)]
    extra_ca_pem: Vec<String>,
}

/// `[vm]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    pub driver: DriverChoice,
    /// MiB of memory; none: what the image declares.
    pub memory_mib: Option<u32>,
    /// none: what the image declares.
    pub vcpus: Option<u32>,
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
    /// A VM is started only while the file system of the home directory has so many MiB free.
    pub min_free_mib: u64,
    /// Bytes of the serial console kept from its beginning, and as many from its end.
    pub console_keep_bytes: u64,
    /// Days that an ended session can be looked up.
    pub keep_sessions_days: u32,
}

/// `[deadlines]`, in seconds.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeadlineConfig {
    /// Waiting for a place.
    pub placing_s: u32,
    /// From the runner's start to a painted screen. The session's own deadline is a minute later.
    pub boot_s: u32,
    /// From a painted screen to the tool's start.
    pub login_start_s: u32,
    /// Signing in, where the provider pack does not say.
    pub sign_in_s: u32,
    /// From a complete credential to a sealed one.
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

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 4000)),
            allowed_hosts: Vec::new(),
            image: "browser".to_owned(),
            vm: VmConfig::default(),
            limits: Limits::default(),
            deadlines: DeadlineConfig::default(),
            egress: EgressConfig::default(),
            vault: VaultConfig::default(),
            database: "sqlite".to_owned(),
            providers: BTreeMap::new(),
            runner: Vec::new(),
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
            min_free_mib: 256,
            console_keep_bytes: 512 << 10,
            keep_sessions_days: 30,
        }
    }
}

impl Default for DeadlineConfig {
    fn default() -> Self {
        Self {
            placing_s: 900,
            boot_s: 300,
            login_start_s: 120,
            sign_in_s: 900,
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
        config.check()?;
        for path in &config.egress.extra_ca {
            let pem = std::fs::read_to_string(path).map_err(|err| ConfigError::ExtraCa {
                path: path.clone(),
                err,
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

    fn check(&self) -> Result<(), ConfigError> {
        let value = |key, what: String| Err(ConfigError::Value { key, what });
        if let Err(err) = self.image.parse::<AliasName>() {
            return value("image", err.to_string());
        }
        if self.limits.vms == 0 {
            return value(
                "limits.vms",
                "0 VMs would let every session wait for ever".to_owned(),
            );
        }
        if self.egress.mode == EgressMode::Closed {
            return value(
                "egress.mode",
                "`closed` would let nobody sign in; expected `open` or `allow-list`".to_owned(),
            );
        }
        if self.database != "sqlite" && !self.database.starts_with("postgres://") {
            return value("database", "expected `sqlite` or `postgres://…`".to_owned());
        }
        Ok(())
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
            awaiting_user: secs(d.sign_in_s),
            capturing: secs(d.capture_s),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vestibule_api::error::Chain;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let home = camino_tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("vestibule.toml"), text).unwrap();
        Config::load(None, home.path())
    }

    #[test]
    fn nothing_is_required() {
        let config = load("").unwrap();
        assert!(config.listen.ip().is_loopback());
        assert_eq!(
            config.policy(vec!["a.example".to_owned()]).hosts,
            Vec::<String>::new()
        );
    }

    #[test]
    fn what_tests_and_operators_set() {
        let config = load(
            "listen = '127.0.0.1:0'\n[egress]\nmode = 'allow-list'\n\
             pins = [{ host = 'idp.test', port = 443, to = '127.0.0.1:9443' }]\n\
             [providers.codex]\nenv = { A = 'b' }\nhosts = ['idp.test']\n[vm]\ndriver = 'qemu'\n",
        )
        .unwrap();
        let policy = config.policy(vec!["a.example".to_owned()]);
        assert_eq!((policy.hosts.len(), policy.pins.len()), (1, 1));
        assert_eq!(config.providers.len(), 1);
    }

    #[test]
    fn a_typo_is_named_with_its_place() {
        let err = load("[limits]\nvmss = 3\n").unwrap_err();
        let text = Chain(&err).to_string();
        assert!(text.contains("vmss") && text.contains("line 2"), "{text}");
        for (text, key) in [
            ("[limits]\nvms = 0", "limits.vms"),
            ("image = 'A B'", "image"),
            ("database = 'x'", "database"),
        ] {
            assert!(load(text).unwrap_err().to_string().contains(key), "{text}");
        }
    }
}

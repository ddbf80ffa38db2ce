//! A service unit as a typed thing: its type, its commands, its environment, its limits (`systemd.service(5)`, `systemd.exec(5)`).
use super::{
    Unit,
    command::{self, Command, Refusal},
    envfile, quote_assignment, quote_disk,
    specifier::Specifiers,
    users::Accounts,
};
use crate::{disk::Root, text};
use std::collections::BTreeMap;
use vestibule_api::finding::Quote;

/// `DefaultTimeoutStartSec=` of systemd, in seconds.
pub const DEFAULT_START_TIMEOUT: f64 = 90.0;

/// The keys that run programs, in the order of a start.
const COMMANDS: [&str; 4] = [
    "ExecCondition",
    "ExecStartPre",
    "ExecStart",
    "ExecStartPost",
];

/// A variable of the unit's environment, and the line that sets it.
#[derive(Clone, Debug)]
pub struct Variable {
    pub value: String,
    pub quote: Quote,
}

/// An environment, and what did not get into it.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    pub set: BTreeMap<String, Variable>,
    /// What systemd ignores of environment files and `Environment=`: the text, and where it stands.
    pub ignored: Vec<(String, Quote)>,
    /// Mandatory files that do not exist.
    pub missing: Vec<(String, Quote)>,
    /// Mandatory files with NUL bytes, like UTF-16 has them: systemd reads no such text (`read_full_file`, EBADMSG).
    pub unreadable: Vec<(String, Quote)>,
}

impl Environment {
    /// Names and values alone.
    pub fn values(&self) -> BTreeMap<String, String> {
        self.set
            .iter()
            .map(|(k, v)| (k.clone(), v.value.clone()))
            .collect()
    }
}

/// A service.
#[derive(Debug)]
pub struct Service<'a> {
    pub unit: &'a Unit,
    root: &'a Root,
    hostname: String,
    machine_id: String,
    user: String,
    home: String,
}

impl<'a> Service<'a> {
    /// The service that `unit` describes.
    pub fn new(unit: &'a Unit, root: &'a Root, accounts: &Accounts) -> Self {
        let user = unit.value("Service", "User").unwrap_or("root").to_owned();
        let home = accounts
            .users
            .get(&user)
            .map_or_else(|| "/root".to_owned(), |u| u.home.clone());
        Self {
            unit,
            root,
            hostname: root
                .read_text("/etc/hostname")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            machine_id: root
                .read_text("/etc/machine-id")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            user,
            home,
        }
    }

    fn specifiers(&self) -> Specifiers<'_> {
        Specifiers {
            name: &self.unit.name,
            hostname: &self.hostname,
            machine_id: &self.machine_id,
            fragment: self.unit.fragment.as_deref().unwrap_or_default(),
            user: &self.user,
            home: &self.home,
        }
    }

    /// `text` with the unit's specifiers resolved.
    pub fn expand(&self, text: &str) -> Result<String, String> {
        self.specifiers().expand(text)
    }

    /// The effective `Type=` (`systemd.service(5)`).
    pub fn kind(&self) -> &str {
        match self.unit.value("Service", "Type") {
            Some(
                kind @ ("simple" | "exec" | "forking" | "oneshot" | "dbus" | "notify"
                | "notify-reload" | "idle"),
            ) => kind,
            Some(_) | None if self.unit.has("Service", "BusName") => "dbus",
            Some(_) | None if !self.unit.has("Service", "ExecStart") => "oneshot",
            Some(_) | None => "simple",
        }
    }

    /// Whether its start job ends only when the program says so, or ends.
    pub fn start_is_awaited(&self) -> bool {
        matches!(
            self.kind(),
            "oneshot" | "notify" | "notify-reload" | "forking" | "dbus"
        )
    }

    /// Seconds after which a start is given up.
    pub fn start_timeout(&self) -> f64 {
        let set = self
            .unit
            .seconds("Service", "TimeoutStartSec")
            .or_else(|| self.unit.seconds("Service", "TimeoutSec"));
        let default = if self.kind() == "oneshot" {
            f64::INFINITY
        } else {
            DEFAULT_START_TIMEOUT
        };
        // Zero is an old way to say never.
        set.map_or(default, |s| if s <= 0.0 { f64::INFINITY } else { s })
    }

    /// Every command of a start, in order; refused lines as errors with where they stand.
    pub fn commands(&self) -> Vec<Result<Command, (Refusal, Quote)>> {
        let mut out = Vec::new();
        for key in COMMANDS {
            for a in self.unit.all("Service", key) {
                out.extend(
                    command::parse(a, &self.specifiers())
                        .into_iter()
                        .map(|c| c.map_err(|r| (r, quote_assignment(a)))),
                );
            }
        }
        out
    }

    /// The commands of one key that parse.
    pub fn commands_of(&self, key: &str) -> Vec<Command> {
        self.commands()
            .into_iter()
            .filter_map(Result::ok)
            .filter(|c| c.key == key)
            .collect()
    }

    /// The first `ExecStart=` command.
    pub fn main(&self) -> Option<Command> {
        self.commands_of("ExecStart").into_iter().next()
    }

    /// `WorkingDirectory=`: the path, and whether it may be missing.
    pub fn working_directory(&self) -> Option<(String, bool)> {
        let value = self.unit.value("Service", "WorkingDirectory")?;
        let (path, optional) = value
            .strip_prefix('-')
            .map_or((value, false), |p| (p, true));
        if path == "~" {
            return Some((self.home.clone(), optional));
        }
        Some((self.expand(path).ok()?, optional))
    }

    /// The environment that the program gets from the unit.
    pub fn environment(&self) -> Environment {
        self.environment_over(BTreeMap::new())
    }

    /// The same with what the manager gives to every service.
    pub fn environment_over(&self, set: BTreeMap<String, Variable>) -> Environment {
        let mut env = Environment {
            set,
            ..Environment::default()
        };
        for a in self.unit.all("Service", "Environment") {
            let mut lost = Vec::new();
            for word in text::words(&a.value).unwrap_or_default() {
                // An assignment with an unknown specifier is dropped, alone.
                let Ok(word) = self.expand(&word) else {
                    continue;
                };
                if let Some((name, value)) =
                    word.split_once('=').filter(|(n, _)| envfile::is_name(n))
                {
                    let variable = Variable {
                        value: value.to_owned(),
                        quote: quote_assignment(a),
                    };
                    env.set.insert(name.to_owned(), variable);
                } else {
                    lost.push(word);
                }
            }
            if !lost.is_empty() {
                env.ignored.push((lost.join(" "), quote_assignment(a)));
            }
        }
        for a in self.unit.all("Service", "EnvironmentFile") {
            self.environment_file(&mut env, &a.value, &quote_assignment(a));
        }
        for a in self.unit.all("Service", "UnsetEnvironment") {
            for name in a.value.split_whitespace() {
                env.set.remove(name.split('=').next().unwrap_or(name));
            }
        }
        env
    }

    fn environment_file(&self, env: &mut Environment, value: &str, quote: &Quote) {
        let (path, optional) = value
            .strip_prefix('-')
            .map_or((value, false), |p| (p, true));
        let Ok(path) = self.expand(path) else { return };
        if !path.starts_with('/') {
            return;
        }
        let pattern = path.contains(['*', '?', '[']);
        let files = if pattern {
            glob_files(self.root, &path)
        } else {
            vec![path.clone()]
        };
        let mut any = false;
        for file in files {
            let Some(content) = self.root.read_text(&file) else {
                continue;
            };
            any = true;
            if content.contains('\0') {
                if !optional {
                    env.unreadable.push((file, quote.clone()));
                }
                continue;
            }
            let parsed = envfile::parse(&content);
            for (line, name, value) in parsed.set {
                let quote = quote_disk(&file, Some(line), &format!("{name}={value}"));
                env.set.insert(name, Variable { value, quote });
            }
            for (line, text) in parsed.ignored {
                let quote = quote_disk(&file, Some(line), &text);
                env.ignored.push((text, quote));
            }
        }
        if !any && !optional {
            env.missing.push((path, quote.clone()));
        }
    }

    /// Directories that systemd makes for the unit before it runs: `StateDirectory=` and its like.
    pub fn own_directories(&self) -> Vec<String> {
        let bases = [
            ("RuntimeDirectory", "/run"),
            ("StateDirectory", "/var/lib"),
            ("CacheDirectory", "/var/cache"),
            ("LogsDirectory", "/var/log"),
            ("ConfigurationDirectory", "/etc"),
        ];
        let mut dirs = Vec::new();
        for (key, base) in bases {
            for a in self.unit.all("Service", key) {
                for word in a.value.split_whitespace() {
                    let name = word.split(':').next().unwrap_or(word);
                    dirs.extend(self.expand(name).ok().map(|n| format!("{base}/{n}")));
                }
            }
        }
        dirs
    }
}

/// Files that match a glob in their last component.
pub fn glob_files(root: &Root, pattern: &str) -> Vec<String> {
    let Some((dir, last)) = pattern.rsplit_once('/') else {
        return Vec::new();
    };
    if dir.contains(['*', '?', '[']) {
        let parents = glob_files(root, dir);
        return parents
            .iter()
            .flat_map(|p| glob_files(root, &format!("{p}/{last}")))
            .take(1024)
            .collect();
    }
    root.list(dir)
        .iter()
        .filter(|e| text::glob(last, &e.name))
        .map(|e| format!("{dir}/{}", e.name))
        .collect()
}

//! `/etc/fstab` and what systemd-fstab-generator makes of it (`systemd-fstab-generator(8)`).
use super::{boot::Boot, names, quote_disk};
use crate::disk::Root;
use vestibule_api::finding::Quote;

/// One line.
#[derive(Clone, Debug)]
pub struct Mount {
    pub source: String,
    pub target: String,
    pub kind: String,
    pub options: Vec<String>,
    /// The sixth field: whether it is checked before the mount.
    pub pass: u32,
    pub quote: Quote,
}

impl Mount {
    /// Whether an option is set.
    pub fn has(&self, option: &str) -> bool {
        self.options.iter().any(|o| o == option)
    }

    /// Whether the boot stops where the device does not appear.
    pub fn is_required(&self) -> bool {
        !self.has("nofail")
            && !self.has("noauto")
            && self.kind != "swap"
            && self.target.starts_with('/')
    }

    /// The block device that it waits for, where it names one.
    pub fn device(&self) -> Option<&str> {
        let by_tag = ["UUID=", "LABEL=", "PARTUUID=", "PARTLABEL="]
            .iter()
            .any(|t| self.source.starts_with(t));
        (by_tag || self.source.starts_with("/dev/")).then_some(self.source.as_str())
    }
}

/// The whole file.
#[derive(Clone, Debug, Default)]
pub struct Fstab {
    pub entries: Vec<Mount>,
}

impl Fstab {
    /// Reads `/etc/fstab`.
    pub fn read(root: &Root) -> Self {
        let path = "/etc/fstab";
        let mut entries = Vec::new();
        for (line, content) in
            (1_u64..).zip(root.read_text(path).unwrap_or_default().lines().take(4096))
        {
            let words: Vec<&str> = content.split_whitespace().collect();
            let [source, target, kind, rest @ ..] = words.as_slice() else {
                continue;
            };
            if source.starts_with('#') {
                continue;
            }
            entries.push(Mount {
                source: source.trim_matches('"').replace("=\"", "="),
                target: if *target == "/" {
                    "/".into()
                } else {
                    target.trim_end_matches('/').replace("\\040", " ")
                },
                kind: (*kind).to_owned(),
                options: rest
                    .first()
                    .map(|o| o.split(',').map(str::to_owned).collect())
                    .unwrap_or_default(),
                pass: rest.get(2).and_then(|p| p.parse().ok()).unwrap_or(0),
                quote: quote_disk(path, Some(line), content),
            });
        }
        Self { entries }
    }

    /// The same with the mount units of a boot.
    #[must_use]
    pub fn with_units(&self, boot: &Boot<'_>) -> Self {
        let mut all = self.clone();
        for name in boot.jobs.keys().filter(|n| names::unit_type(n) == "mount") {
            let unit = boot.units.load(name);
            let value = |key| unit.value("Mount", key).unwrap_or_default();
            let deciding = if unit.has("Mount", "Options") {
                "Options"
            } else {
                "Type"
            };
            if value("Where").starts_with('/') {
                all.entries.push(Mount {
                    source: value("What").to_owned(),
                    target: value("Where").to_owned(),
                    kind: value("Type").to_owned(),
                    options: value("Options").split(',').map(str::to_owned).collect(),
                    pass: 0,
                    quote: unit.quote("Mount", deciding),
                });
            }
        }
        all
    }

    /// The entry of `/`.
    pub fn root(&self) -> Option<&Mount> {
        self.entries.iter().find(|m| m.target == "/")
    }

    /// The entry below which `path` lies, the root's excepted.
    pub fn covering(&self, path: &str) -> Option<&Mount> {
        let under = |m: &&Mount| {
            m.target.len() > 1
                && path
                    .strip_prefix(m.target.as_str())
                    .is_some_and(|r| r.is_empty() || r.starts_with('/'))
        };
        self.entries
            .iter()
            .filter(under)
            .max_by_key(|m| m.target.len())
    }
}

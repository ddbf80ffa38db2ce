//! What lies over the disk's own files when a unit's programs look for them: file systems that are made empty at boot, and what the
//! unit's own sandbox mounts (`systemd.exec(5)`, "Paths" and "Sandboxing").
use super::{Unit, fstab::Fstab, quote_assignment, quote_disk};
use vestibule_api::finding::Quote;

/// Something that hides what the disk has at a path.
#[derive(Clone, Debug)]
pub struct Cover {
    /// Where it is mounted.
    pub target: String,
    /// Why nothing of the disk is there, as the end of a sentence.
    pub why: String,
    pub quote: Quote,
}

/// Whether `path` lies below `base`, itself excepted: an empty directory is there.
pub fn is_below(path: &str, base: &str) -> bool {
    let base = base.trim_end_matches('/');
    path.strip_prefix(base)
        .is_some_and(|rest| rest.len() > 1 && rest.starts_with('/'))
}

/// What hides the real path `path` from every process of the guest.
pub fn of_boot(mounts: &Fstab, path: &str) -> Option<Cover> {
    let mount = mounts.covering(path).filter(|m| {
        matches!(m.kind.as_str(), "tmpfs" | "ramfs")
            && !m.has("noauto")
            && is_below(path, &m.target)
    });
    if let Some(mount) = mount {
        return Some(Cover {
            target: mount.target.clone(),
            why: format!(
                "an empty {} is mounted on {} at boot",
                mount.kind, mount.target
            ),
            quote: mount.quote.clone(),
        });
    }
    is_below(path, "/run").then(|| Cover {
        target: "/run".to_owned(),
        why: "/run is a file system that every boot makes anew, empty".to_owned(),
        quote: quote_disk(path, None, "[in the image, and not in /run of a guest]"),
    })
}

/// What hides the real path `path` from the processes of `unit` alone.
pub fn of_unit(unit: &Unit, path: &str) -> Option<Cover> {
    let given = ["BindPaths", "BindReadOnlyPaths"].iter().any(|key| {
        let mut words = unit
            .all("Service", key)
            .into_iter()
            .flat_map(|a| a.value.split_whitespace());
        words.any(|word| {
            let mut parts = word.trim_start_matches('-').split(':');
            let source = parts.next().unwrap_or_default();
            let target = parts.next().unwrap_or(source);
            path == target || is_below(path, target) || is_below(target, path)
        })
    });
    if given || unit.has("Unit", "JoinsNamespaceOf") {
        return None;
    }
    let keys: [(&str, &[&str]); 4] = [
        ("PrivateTmp", &["/tmp", "/var/tmp"]),
        ("ProtectHome", &["/home", "/root", "/run/user"]),
        ("TemporaryFileSystem", &[]),
        ("InaccessiblePaths", &[]),
    ];
    for (key, fixed) in keys {
        let lines = if fixed.is_empty() {
            unit.all("Service", key)
        } else {
            let is_set = |value: &str| {
                crate::text::boolean(value) == Some(true)
                    || (key == "ProtectHome" && value == "tmpfs")
            };
            unit.last("Service", key)
                .filter(|a| is_set(&a.value))
                .into_iter()
                .collect()
        };
        for a in lines {
            let named = a.value.split_whitespace().map(|word| {
                let word = word.trim_start_matches(['-', '+']);
                word.split(':').next().unwrap_or(word)
            });
            let mut targets = named
                .filter(|_| fixed.is_empty())
                .chain(fixed.iter().copied());
            if let Some(target) = targets.find(|t| t.starts_with('/') && is_below(path, t)) {
                return Some(Cover {
                    target: target.to_owned(),
                    why: format!("{key}= hides what is below {target} from the unit"),
                    quote: quote_assignment(a),
                });
            }
        }
    }
    None
}

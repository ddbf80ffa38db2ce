//! Users and groups that exist when a unit starts: `/etc/passwd`, `/etc/group`, and what `sysusers.d(5)` makes at boot.
use crate::disk::Root;
use std::collections::{BTreeMap, BTreeSet};

/// A user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub home: String,
}

/// The accounts of a disk.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    pub users: BTreeMap<String, User>,
    pub groups: BTreeMap<String, u32>,
    /// Group name → member names.
    pub members: BTreeMap<String, BTreeSet<String>>,
    made_at_boot: BTreeSet<String>,
    groups_at_boot: BTreeSet<String>,
    /// Whether names may come from somewhere that is not on the disk (LDAP, SSSD).
    pub remote: bool,
}

impl Accounts {
    /// Reads the accounts of a disk.
    pub fn read(root: &Root) -> Self {
        let mut out = Self::default();
        for line in root.read_text("/etc/passwd").unwrap_or_default().lines() {
            let f: Vec<&str> = line.split(':').collect();
            if let [name, _, uid, gid, _, home, ..] = f.as_slice()
                && let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse())
            {
                out.users.insert(
                    (*name).to_owned(),
                    User {
                        uid,
                        gid,
                        home: (*home).to_owned(),
                    },
                );
            }
        }
        for line in root.read_text("/etc/group").unwrap_or_default().lines() {
            let f: Vec<&str> = line.split(':').collect();
            if let [name, _, gid, rest @ ..] = f.as_slice()
                && let Ok(gid) = gid.parse()
            {
                out.groups.insert((*name).to_owned(), gid);
                let members = rest.first().map(|m| m.split(',').filter(|m| !m.is_empty()));
                out.members.insert(
                    (*name).to_owned(),
                    members.into_iter().flatten().map(str::to_owned).collect(),
                );
            }
        }
        out.read_sysusers(root);
        let nss = root.read_text("/etc/nsswitch.conf").unwrap_or_default();
        out.remote = nss
            .lines()
            .filter(|l| l.starts_with("passwd:") || l.starts_with("group:"))
            .any(|l| {
                l.split_whitespace()
                    .skip(1)
                    .any(|s| matches!(s, "ldap" | "sss" | "nis" | "winbind" | "extrausers"))
            });
        out
    }

    fn read_sysusers(&mut self, root: &Root) {
        for dir in [
            "/etc/sysusers.d",
            "/usr/local/lib/sysusers.d",
            "/usr/lib/sysusers.d",
        ] {
            for entry in root.list(dir).iter().filter(|e| e.name.ends_with(".conf")) {
                for line in root
                    .read_text(&format!("{dir}/{}", entry.name))
                    .unwrap_or_default()
                    .lines()
                {
                    let mut words = line.split_whitespace();
                    match (words.next(), words.next()) {
                        (Some("u" | "u!"), Some(name)) => {
                            self.made_at_boot.insert(name.to_owned());
                            self.groups_at_boot.insert(name.to_owned());
                        }
                        (Some("g"), Some(name)) => {
                            self.groups_at_boot.insert(name.to_owned());
                        }
                        _ => {}
                    }
                }
            }
        }
    }

    /// Whether a `User=` value resolves, or may.
    pub fn has_user(&self, name: &str) -> bool {
        name.parse::<u32>().is_ok()
            || self.remote
            || self.users.contains_key(name)
            || self.made_at_boot.contains(name)
    }

    /// Whether a `Group=` value resolves, or may.
    pub fn has_group(&self, name: &str) -> bool {
        name.parse::<u32>().is_ok()
            || self.remote
            || self.groups.contains_key(name)
            || self.groups_at_boot.contains(name)
    }

    /// The ids that a process of `user` has: uid and every gid. Root where no user is named.
    pub fn ids(&self, user: Option<&str>, group: Option<&str>) -> Option<(u32, Vec<u32>)> {
        let Some(name) = user.filter(|u| *u != "root" && *u != "0") else {
            return Some((0, vec![0]));
        };
        let numeric = name.parse::<u32>().ok();
        let (uid, gid) = match (self.users.get(name), numeric) {
            (Some(user), _) => (user.uid, user.gid),
            (None, Some(uid)) => (uid, uid),
            (None, None) => return None,
        };
        let gid = group
            .and_then(|g| g.parse().ok().or_else(|| self.groups.get(g).copied()))
            .unwrap_or(gid);
        let more = self
            .members
            .iter()
            .filter(|(_, m)| m.contains(name))
            .filter_map(|(g, _)| self.groups.get(g).copied());
        Some((uid, std::iter::once(gid).chain(more).collect()))
    }
}

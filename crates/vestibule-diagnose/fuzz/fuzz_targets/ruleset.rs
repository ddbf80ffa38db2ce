//! A packet filter's ruleset, in a tree whose boot loads it, and whose agent would be out of reach behind it.
#![no_main]
use libfuzzer_sys::fuzz_target;
use std::{collections::BTreeMap, sync::Once};
use vestibule_api::cause::Cause;
use vestibule_diagnose::{
    Evidence, diagnose,
    disk::{Entry, Kind, Meta, Tree, Xattr},
};

const UNITS: &str = "/etc/systemd/system";
const DROPS: &[u8] =
    b"table inet f {\nchain i {\ntype filter hook input priority 0; policy drop;\n}\n}\n";

struct Files(BTreeMap<String, Vec<u8>>);

fn files(ruleset: &[u8]) -> Files {
    let text = |text: &str| text.as_bytes().to_vec();
    let wanted = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/sbin/nft -f /etc/nftables.conf\n";
    Files(BTreeMap::from([
        ("/etc/nftables.conf".into(), ruleset.to_vec()),
        ("/usr/sbin/nft".into(), text("\x7fELF")),
        (format!("{UNITS}/nftables.service"), text(wanted)),
        (
            format!("{UNITS}/vm-browser-agent.service"),
            text("[Service]\nExecStart=/usr/sbin/nft\n"),
        ),
        (
            format!("{UNITS}/default.target"),
            text("[Unit]\nWants=nftables.service vm-browser-agent.service\n"),
        ),
    ]))
}

impl Tree for Files {
    fn lstat(&self, path: &str) -> Option<Meta> {
        let below = format!("{path}/");
        let is_dir = self.0.keys().any(|name| name.starts_with(&below));
        let file = self.0.get(path);
        (is_dir || file.is_some()).then(|| Meta {
            kind: if is_dir { Kind::Dir } else { Kind::File },
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: file.map_or(4096, |bytes| bytes.len() as u64),
        })
    }

    fn read_at(&self, path: &str, offset: u64, len: usize) -> Option<Vec<u8>> {
        let from = usize::try_from(offset).ok()?;
        let rest = self.0.get(path)?.get(from..)?;
        Some(rest[..len.min(rest.len())].to_vec())
    }

    fn link(&self, _path: &str) -> Option<String> {
        None
    }

    fn list(&self, path: &str, limit: usize) -> Option<Vec<Entry>> {
        let below = format!("{}/", path.trim_end_matches('/'));
        let names = self.0.keys().filter_map(|name| name.strip_prefix(&below));
        let mut names: Vec<_> = names.filter_map(|rest| rest.split('/').next()).collect();
        names.dedup();
        let entry = |name: &&str| {
            let meta = self.lstat(&format!("{below}{name}"))?;
            Some(Entry {
                name: (*name).to_owned(),
                meta,
            })
        };
        Some(names.iter().filter_map(entry).take(limit).collect())
    }

    fn xattrs(&self, _path: &str) -> Vec<Xattr> {
        Vec::new()
    }

    fn damage(&self) -> Vec<String> {
        Vec::new()
    }
}

fn dropped(ruleset: &[u8]) -> bool {
    let verdict = diagnose(&Evidence::new().disk(files(ruleset)));
    let also = verdict.also.iter().map(|finding| finding.cause);
    let mut causes = verdict.finding.iter().map(|f| f.cause).chain(also);
    causes.any(|cause| cause == Cause::FirewallDrops)
}

static READ_AT_ALL: Once = Once::new();

fuzz_target!(|bytes: &[u8]| {
    READ_AT_ALL.call_once(|| assert!(dropped(DROPS) && !dropped(b"")));
    dropped(bytes);
});

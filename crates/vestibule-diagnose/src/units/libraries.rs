//! Where the dynamic linker looks for libraries (`ld.so(8)`, `ldconfig(8)`).
use crate::disk::Root;
use std::collections::HashMap;

/// Bytes of `ld.so.cache`; that of a desktop has a few hundred thousand.
const CACHE_LIMIT: usize = 8 << 20;

/// The directories of a disk's linker, and its cache.
#[derive(Debug)]
pub(super) struct LibraryDirs {
    /// Searched by the linker itself.
    built_in: Vec<String>,
    /// Of `ld.so.conf`: searched only by `ldconfig`, which writes the cache.
    listed: Vec<String>,
    /// File name → paths, where there is a cache that can be read and that no boot writes anew.
    cache: Option<HashMap<String, Vec<String>>>,
}

impl LibraryDirs {
    /// Reads `ld.so.conf` and `ld.so.cache`; the built-in ones are Debian's multiarch, `/lib64` and musl's.
    pub(super) fn read(root: &Root) -> Self {
        let mut listed = vec!["/usr/local/lib".to_owned()];
        let mut files = vec!["/etc/ld.so.conf".to_owned()];
        let entries = root.list("/etc/ld.so.conf.d");
        let more = entries.iter().filter(|e| e.name.ends_with(".conf"));
        files.extend(more.map(|e| format!("/etc/ld.so.conf.d/{}", e.name)));
        for file in files {
            for line in root.read_text(&file).unwrap_or_default().lines() {
                let line = line.split('#').next().unwrap_or_default().trim();
                if line.starts_with('/') {
                    listed.push(line.trim_end_matches('/').to_owned());
                }
            }
        }
        let mut built_in = Vec::new();
        for triplet in ["x86_64-linux-gnu", "aarch64-linux-gnu", "i386-linux-gnu"] {
            built_in.push(format!("/lib/{triplet}"));
            built_in.push(format!("/usr/lib/{triplet}"));
        }
        built_in.extend(["/lib64", "/usr/lib64", "/lib", "/usr/lib"].map(str::to_owned));
        built_in.retain(|d| root.is_dir(d));
        listed.retain(|d| root.is_dir(d));
        let rewritten = root.exists("/usr/lib/systemd/system/ldconfig.service");
        let cache = root
            .read_at("/etc/ld.so.cache", 0, CACHE_LIMIT)
            .filter(|_| !rewritten)
            .and_then(|bytes| cached(&bytes));
        Self {
            built_in,
            listed,
            cache,
        }
    }

    /// The paths at which the linker looks for a library, in its order.
    pub(super) fn candidates(&self, name: &str) -> impl Iterator<Item = String> {
        let first = match &self.cache {
            Some(cache) => cache.get(name).cloned().unwrap_or_default(),
            None => self.listed.iter().map(|d| format!("{d}/{name}")).collect(),
        };
        let built_in = self.built_in.iter().map(|d| format!("{d}/{name}"));
        first.into_iter().chain(built_in.collect::<Vec<_>>())
    }

    /// Where a library lies that `ldconfig` would find and has not.
    pub(super) fn unknown_to_cache(&self, root: &Root, name: &str) -> Option<String> {
        let mut paths = self.listed.iter().map(|d| format!("{d}/{name}"));
        paths.find(|p| self.cache.is_some() && root.exists(p))
    }
}

/// The paths of a cache of glibc's format (`dl-cache.h`): its strings are names and paths, each ended by a zero.
fn cached(bytes: &[u8]) -> Option<HashMap<String, Vec<String>>> {
    bytes.strip_prefix(b"glibc-ld.so.cache1.1")?;
    let mut paths: HashMap<String, Vec<String>> = HashMap::new();
    let strings = bytes
        .split(|b| *b == 0)
        .filter(|s| s.first() == Some(&b'/'));
    for path in strings.filter_map(|s| std::str::from_utf8(s).ok()) {
        let name = path.rsplit('/').next().unwrap_or_default();
        paths
            .entry(name.to_owned())
            .or_default()
            .push(path.to_owned());
    }
    Some(paths)
}

//! Which files there are where a controller and its VMs can write: what a session's end has to leave as it was.
use camino::Utf8Path;
use std::{collections::BTreeSet, fs, path::Path};

/// Of a home: what is meant to stay, what comes and goes with the database, and what [`super::residue`] counts.
const KEPT: [&str; 7] = [
    "vms",
    "evidence",
    "vault/records",
    "cache",
    "vestibule.db-wal",
    "vestibule.db-shm",
    "vestibule.db-journal",
];
const SHARED_MEMORY: &str = "/dev/shm";
/// Of shared memory: what other programs of the tests keep there.
const OTHERS: [&str; 2] = ["PostgreSQL.", ".org.chromium."];

/// Every file and directory of a stage's home, its temporary files among them, and of shared memory; without what is kept
/// for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing(BTreeSet<String>);

impl Listing {
    /// As it is now.
    pub fn of(home: &Utf8Path) -> Self {
        let mut found = BTreeSet::new();
        let home = home.as_std_path();
        walk(home, &|path| is_kept(home, path), &mut found);
        walk(Path::new(SHARED_MEMORY), &is_others, &mut found);
        Self(found)
    }

    /// What is there and was not `before`, and what was and is not.
    pub fn since(&self, before: &Self) -> Vec<String> {
        let came = self.0.difference(&before.0);
        let went = before.0.difference(&self.0);
        came.map(|path| format!("new: {path}"))
            .chain(went.map(|path| format!("gone: {path}")))
            .collect()
    }
}

fn is_kept(home: &Path, path: &Path) -> bool {
    KEPT.iter().any(|kept| home.join(kept) == path)
}

fn is_others(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    OTHERS.iter().any(|prefix| name.starts_with(prefix))
}

fn walk(dir: &Path, left_out: &dyn Fn(&Path) -> bool, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if left_out(&path) {
            continue;
        }
        // The kind of the entry itself: links to the shared images are not followed.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, left_out, found);
        }
        found.insert(path.display().to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_and_what_went_is_named() {
        let home = camino_tempfile::tempdir().unwrap();
        let home = home.path();
        fs::create_dir_all(home.join("tmp")).unwrap();
        fs::create_dir_all(home.join("vault/records")).unwrap();
        fs::write(home.join("token"), "").unwrap();
        let before = Listing::of(home);
        assert_eq!(before.since(&before), Vec::<String>::new());
        for kept in ["vestibule.db-wal", "vault/records/1"] {
            fs::write(home.join(kept), "").unwrap();
        }
        fs::write(home.join("tmp/left"), "").unwrap();
        fs::remove_file(home.join("token")).unwrap();
        let shared = format!("{SHARED_MEMORY}/vestibule-listing-{}", std::process::id());
        fs::write(&shared, "").unwrap();
        let mut seen = Listing::of(home).since(&before);
        fs::remove_file(&shared).unwrap();
        // Other tests of this process put something there, too.
        seen.retain(|line| line.contains(home.as_str()) || line.contains("listing"));
        seen.sort();
        let new = |path: String| format!("new: {path}");
        let mut expected = vec![
            format!("gone: {}", home.join("token")),
            new(home.join("tmp/left").into_string()),
            new(shared),
        ];
        expected.sort();
        assert_eq!(seen, expected);
    }
}

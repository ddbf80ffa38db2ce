//! What was found out about this host, kept for the next runner: as long as what it follows from is the same, it need not be
//! found out again, and a VM starts sooner.
use crate::file::FileIdentity;
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io;

/// A finding is smaller than this.
const LIMIT: u64 = 64 << 10;

/// A program and which file it was.
pub(crate) type Of = (Utf8PathBuf, FileIdentity);

/// Which file `program` is; none: there is none.
pub(crate) fn identity(program: &Utf8Path) -> Option<Of> {
    let meta = std::fs::metadata(program).ok()?;
    Some((program.to_owned(), FileIdentity::from(meta)))
}

/// What this boot of the host is told from others by (random(4), `/proc/sys/kernel/random/boot_id`).
pub(crate) fn boot_id() -> io::Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
}

#[derive(Serialize)]
struct Keeping<'a, K, T> {
    of: &'a K,
    found: &'a T,
}

#[derive(Deserialize)]
struct Kept<K, T> {
    of: K,
    found: T,
}

/// What `look` found before and is kept under `name` in `directory` for the same `of`, or else finds now. Where either is not
/// known, nothing is kept; a failure never is.
///
/// # Errors
/// What `look` says.
pub(crate) fn find<K, T, E>(
    directory: Option<&Utf8Path>,
    name: &str,
    of: Option<&K>,
    look: impl FnOnce() -> Result<T, E>,
) -> Result<T, E>
where
    K: Serialize + DeserializeOwned + PartialEq,
    T: Serialize + DeserializeOwned,
{
    let (Some(directory), Some(of)) = (directory, of) else {
        return look();
    };
    if let Some(kept) = read::<K, T>(&directory.join(name)).filter(|kept| kept.of == *of) {
        return Ok(kept.found);
    }
    let found = look()?;
    let keeping = Keeping { of, found: &found };
    if let Err(err) = keep(directory, name, &keeping) {
        // The next one looks again, that is all.
        tracing::debug!(error = %err, %directory, name, "what was found is not kept");
    }
    Ok(found)
}

fn read<K: DeserializeOwned, T: DeserializeOwned>(path: &Utf8Path) -> Option<Kept<K, T>> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).ok()?;
    io::Read::read_to_end(&mut io::Read::take(file, LIMIT), &mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// By rename: others read and write at the same time.
fn keep(directory: &Utf8Path, name: &str, keeping: &impl Serialize) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let new = directory.join(format!("{name}.{}", std::process::id()));
    std::fs::write(&new, serde_json::to_vec(keeping)?)?;
    std::fs::rename(&new, directory.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_finding_is_kept_for_as_long_as_it_follows_from_the_same() {
        let home = camino_tempfile::tempdir().unwrap();
        let (cache, looks) = (home.path().join("cache"), Cell::new(0));
        let found = |of: Option<&u32>, look: Result<u32, ()>| {
            find(Some(&cache), "finding.json", of, || {
                looks.set(looks.get() + 1);
                look
            })
        };
        assert_eq!(found(Some(&1), Err(())), Err(()), "a failure");
        assert_eq!(found(Some(&1), Ok(10)), Ok(10), "is not kept");
        assert_eq!(found(Some(&1), Ok(11)), Ok(10));
        assert_eq!(looks.get(), 2);
        assert_eq!(found(Some(&2), Ok(20)), Ok(20));
        assert_eq!(found(None, Ok(30)), Ok(30));
        assert_eq!(found(Some(&2), Ok(21)), Ok(20));
        std::fs::write(cache.join("finding.json"), "nonsense").unwrap();
        assert_eq!(found(Some(&2), Ok(22)), Ok(22));
        assert_eq!(looks.get(), 5);
        let left: Vec<_> = std::fs::read_dir(&cache).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }
}

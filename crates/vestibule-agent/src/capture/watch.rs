//! Waits for changes to files that may not exist yet, in directories that may not exist yet (inotify(7)).
use futures_util::StreamExt as _;
use inotify::{EventStream, Inotify, WatchMask};
use std::{
    io,
    path::{Path, PathBuf},
};

/// A watch on some paths below one directory.
pub(crate) struct Watch {
    events: EventStream<Vec<u8>>,
    home: PathBuf,
    paths: Vec<String>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch")
            .field("paths", &self.paths)
            .finish_non_exhaustive()
    }
}

impl Watch {
    /// Watches `paths`, relative to `home`.
    ///
    /// # Errors
    /// When the kernel gives no inotify instance, or `home` is not there.
    pub(crate) fn on(home: &Path, paths: Vec<String>) -> io::Result<Self> {
        let events = Inotify::init()?.into_event_stream(vec![0; 4096])?;
        let mut watch = Self {
            events,
            home: home.to_owned(),
            paths,
        };
        watch.add(Path::new(""))?;
        watch.reach();
        Ok(watch)
    }

    /// Waits until something changed in one of the directories. May be dropped and called again; nothing is lost.
    pub(crate) async fn changed(&mut self) {
        // An error (a full queue, a directory that is gone) means: look.
        let _ = self.events.next().await;
        self.reach();
    }

    /// Watches every directory on the way to a path that exists by now.
    fn reach(&mut self) {
        for path in self.paths.clone() {
            let path = Path::new(&path);
            let mut ancestors: Vec<_> = path
                .ancestors()
                .skip(1)
                .filter(|a| !a.as_os_str().is_empty())
                .collect();
            ancestors.reverse();
            for directory in ancestors {
                if self.add(directory).is_err() {
                    break;
                }
            }
        }
    }

    fn add(&mut self, directory: &Path) -> io::Result<()> {
        let mask = WatchMask::CREATE
            | WatchMask::MOVED_TO
            | WatchMask::MODIFY
            | WatchMask::CLOSE_WRITE
            | WatchMask::DELETE
            | WatchMask::ATTRIB
            | WatchMask::ONLYDIR;
        // The same directory again gives the same watch.
        self.events
            .watches()
            .add(self.home.join(directory), mask)
            .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, time::Duration};

    async fn soon(watch: &mut Watch) -> bool {
        tokio::time::timeout(Duration::from_secs(5), watch.changed())
            .await
            .is_ok()
    }

    #[tokio::test]
    async fn directories_made_later_are_watched_to_the_end() {
        let dir = camino_tempfile::tempdir().unwrap();
        let mut watch = Watch::on(
            dir.path().as_std_path(),
            vec![".config/tool/deep/auth.json".into()],
        )
        .unwrap();
        for part in [".config", ".config/tool", ".config/tool/deep"] {
            fs::create_dir(dir.path().join(part)).unwrap();
            assert!(soon(&mut watch).await, "{part}");
        }
        fs::write(dir.path().join(".config/tool/deep/new"), "{}").unwrap();
        assert!(soon(&mut watch).await);
        fs::rename(
            dir.path().join(".config/tool/deep/new"),
            dir.path().join(".config/tool/deep/auth.json"),
        )
        .unwrap();
        assert!(soon(&mut watch).await);
    }

    #[tokio::test]
    async fn a_whole_tree_made_at_once_is_not_missed() {
        let dir = camino_tempfile::tempdir().unwrap();
        let mut watch = Watch::on(dir.path().as_std_path(), vec!["a/b/c".into()]).unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        assert!(soon(&mut watch).await);
        fs::write(dir.path().join("a/b/c"), "x").unwrap();
        assert!(soon(&mut watch).await);
    }
}

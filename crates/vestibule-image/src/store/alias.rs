//! Aliases: the names that point to images, how they move, and what they have pointed to.
use super::{Store, StoreError, io};
use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};
use std::{io::Write as _, str::FromStr as _};
use vestibule_api::{
    ids::{AliasName, ImageDigest},
    time::Timestamp,
};

/// One move of an alias.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    pub at: Timestamp,
    pub digest: ImageDigest,
    pub rollback: bool,
}

impl Store {
    /// Every alias with what it points to. A link that leads elsewhere is no alias.
    pub fn aliases(&self) -> Result<Vec<(AliasName, ImageDigest)>, StoreError> {
        let path = self.home.join("aliases");
        let entries = path
            .read_dir_utf8()
            .map_err(io("read", &path))?
            .filter_map(Result::ok);
        let mut aliases: Vec<_> = entries
            .filter_map(|entry| {
                let alias = AliasName::from_str(entry.file_name()).ok()?;
                let target = entry.path().read_link_utf8().ok()?;
                Some((alias, ImageDigest::from_str(target.file_name()?).ok()?))
            })
            .collect();
        aliases.sort();
        Ok(aliases)
    }

    /// Points `alias` to an image whose verification is green.
    ///
    /// # Errors
    /// [`StoreError::Unverified`], [`StoreError::NotGreen`].
    pub fn publish(&self, digest: &ImageDigest, alias: &AliasName) -> Result<(), StoreError> {
        self.point(digest, alias, false)
    }

    /// Points `alias` to the image before the one it points to, and says which.
    ///
    /// # Errors
    /// [`StoreError::NoEarlier`].
    pub fn rollback(&self, alias: &AliasName) -> Result<ImageDigest, StoreError> {
        let current = self
            .aliases()?
            .into_iter()
            .find(|(name, _)| name == alias)
            .map(|(_, digest)| digest);
        let there = self.digests()?;
        let digest = earlier(&self.history(alias)?, current.as_ref(), &there);
        let digest = digest.ok_or_else(|| StoreError::NoEarlier {
            alias: alias.clone(),
        })?;
        self.point(&digest, alias, true)?;
        Ok(digest)
    }

    /// For each alias, the image that a rollback would point it to, where there is one.
    pub(super) fn rollback_targets(&self) -> Result<Vec<ImageDigest>, StoreError> {
        let there = self.digests()?;
        let mut targets = Vec::new();
        for (alias, current) in self.aliases()? {
            targets.extend(earlier(&self.history(&alias)?, Some(&current), &there));
        }
        Ok(targets)
    }

    fn point(
        &self,
        digest: &ImageDigest,
        alias: &AliasName,
        rollback: bool,
    ) -> Result<(), StoreError> {
        let hold = self.hold(digest)?;
        match self.inspect(digest)?.verification {
            None => {
                return Err(StoreError::Unverified {
                    digest: digest.clone(),
                });
            }
            Some(report) if !report.green || report.digest != *digest => {
                let why = report
                    .problems
                    .first()
                    .cloned()
                    .unwrap_or_else(|| "its report is of another image".to_owned());
                return Err(StoreError::NotGreen {
                    digest: digest.clone(),
                    why,
                });
            }
            Some(_) => {}
        }
        let (link, new) = (
            self.home.join("aliases").join(alias.as_str()),
            self.home.join("aliases").join(format!(".{alias}.new")),
        );
        let _ = std::fs::remove_file(&new);
        std::os::unix::fs::symlink(format!("../images/{digest}"), &new)
            .map_err(io("make the link", &new))?;
        std::fs::rename(&new, &link).map_err(io("move the alias", &link))?;
        drop(hold);
        self.remember(
            alias,
            &HistoryEntry {
                at: Timestamp::now(),
                digest: digest.clone(),
                rollback,
            },
        )
    }

    fn remember(&self, alias: &AliasName, entry: &HistoryEntry) -> Result<(), StoreError> {
        let path = self.history_path(alias);
        let mut line = serde_json::to_vec(entry).map_err(|err| StoreError::Decode {
            path: path.clone(),
            err,
        })?;
        line.push(b'\n');
        let file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path);
        file.and_then(|mut file| file.write_all(&line))
            .map_err(io("write", &path))
    }

    fn history_path(&self, alias: &AliasName) -> Utf8PathBuf {
        self.home.join("aliases/.history").join(alias.as_str())
    }

    /// What an alias has pointed to, the oldest first.
    ///
    /// # Errors
    /// When the history cannot be read; a line that a crash cut is left out.
    pub fn history(&self, alias: &AliasName) -> Result<Vec<HistoryEntry>, StoreError> {
        let path = self.history_path(alias);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect()),
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(err) => Err(io("read", &path)(err)),
        }
    }
}

/// The last image before `current` in the history that is still there.
fn earlier(
    history: &[HistoryEntry],
    current: Option<&ImageDigest>,
    there: &[ImageDigest],
) -> Option<ImageDigest> {
    let at = history
        .iter()
        .rposition(|entry| !entry.rollback && Some(&entry.digest) == current)?;
    let before = history
        .get(..at)?
        .iter()
        .rev()
        .filter(|entry| !entry.rollback)
        .map(|entry| &entry.digest);
    before
        .filter(|digest| Some(*digest) != current)
        .find(|digest| there.contains(digest))
        .cloned()
}

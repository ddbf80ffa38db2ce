//! The evidence bundle: what is kept of a VM. It is taken before the VM is destroyed, and destroying takes it by value.
use crate::log::BoundedLog;
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    fs::{DirBuilder, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
};

/// The directory that holds the bundle. Exists only when [`Bundle::open`] made it, so whoever holds one may destroy.
#[derive(Debug)]
pub struct Bundle {
    directory: Utf8PathBuf,
    /// Parts that could not be taken, and why.
    missing: Vec<String>,
}

impl Bundle {
    /// Opens a bundle in `directory`, made with mode 0700 where it is missing. That it cannot be made is recorded and
    /// stops nothing: a VM must end even where the disk is full.
    pub fn open(directory: &Utf8Path) -> Self {
        let mut bundle = Self {
            directory: directory.to_owned(),
            missing: Vec::new(),
        };
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory);
        bundle.note("the directory", made);
        bundle
    }

    /// Writes one file of mode 0600, whole or not at all. Blocks on the disk.
    pub fn write(&mut self, name: &str, content: &[u8]) {
        let path = self.directory.join(name);
        let partial = self.directory.join(format!(".{name}.partial"));
        let write = || -> io::Result<()> {
            let mut file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&partial)?;
            file.write_all(content)?;
            std::fs::rename(&partial, &path)
        };
        let written = write();
        if written.is_err() {
            // What is left of it would only be mistaken for evidence.
            let _ = std::fs::remove_file(&partial);
        }
        self.note(name, written);
    }

    /// Writes a value as readable JSON.
    pub fn write_json<T: serde::Serialize>(&mut self, name: &str, value: &T) {
        match serde_json::to_vec_pretty(value) {
            Ok(bytes) => self.write(name, &bytes),
            Err(err) => self.missing(name, &err.to_string()),
        }
    }

    /// Writes a log as far as it was kept.
    pub fn write_log(&mut self, name: &str, log: &BoundedLog) {
        match log.render() {
            Ok(bytes) => self.write(name, &bytes),
            Err(err) => self.missing(name, &err.to_string()),
        }
    }

    /// Records that a part is missing.
    pub fn missing(&mut self, part: &str, why: &str) {
        self.missing.push(format!("{part}: {why}"));
    }

    /// What could not be taken so far.
    pub fn gaps(&self) -> &[String] {
        &self.missing
    }

    fn note(&mut self, part: &str, result: io::Result<()>) {
        if let Err(err) = result {
            self.missing(part, &err.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn files_are_private_and_what_is_missing_is_known() {
        let dir = camino_tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er");
        let mut bundle = Bundle::open(&path);
        bundle.write_json("exit.json", &serde_json::json!({"code": 0}));
        bundle.write("no/such/directory", b"x");
        let mode = path
            .join("exit.json")
            .metadata()
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(bundle.gaps().len(), 1, "{:?}", bundle.gaps());
        assert_eq!(path.read_dir_utf8().unwrap().count(), 1);
    }
}

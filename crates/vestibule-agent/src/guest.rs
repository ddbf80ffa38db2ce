//! The guest that the agent lives in: where things are, who the person is, what the image can do. Tests use another one.
use crate::agent::AgentError;
use serde::Deserialize;
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The user that tools and browser run as.
const PERSON: &str = "person";

/// Places and facts of one guest.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    /// Who runs tools and browser; none: whoever runs the agent (tests).
    pub(crate) person: Option<Person>,
    /// The person's home directory.
    pub(crate) home: PathBuf,
    /// Sockets of the agent's own.
    pub(crate) run: PathBuf,
    /// The URL shims, first in a tool's `PATH`.
    pub(crate) shims: PathBuf,
    /// RFB of the X server.
    pub(crate) rfb: PathBuf,
    /// `DISPLAY` and X authority.
    pub(crate) display: String,
    pub(crate) xauthority: PathBuf,
    /// Chromium's profile and program.
    pub(crate) browser_profile: PathBuf,
    pub(crate) browser: PathBuf,
    /// Chromium's managed policies, one file each; it reads them again when one changes.
    pub(crate) browser_policies: PathBuf,
    pub(crate) image: ImageFacts,
}

/// A line of passwd(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Person {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: PathBuf,
    pub(crate) shell: PathBuf,
}

/// `/etc/vestibule/image.json`, written by the image's builder.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ImageFacts {
    /// Units that must be active before the guest is ready.
    pub(crate) required_units: Vec<String>,
    /// `browser`, `terminal`, …
    pub(crate) features: Vec<String>,
}

impl ImageFacts {
    /// The facts of the image at `path`. An image without the file declares nothing.
    fn read(path: &Path) -> Self {
        let Ok(text) = fs::read_to_string(path) else {
            return Self::default();
        };
        serde_json::from_str(&text).unwrap_or_else(|err| {
            tracing::warn!(error = %err, path = %path.display(), "the image's facts are not readable");
            Self::default()
        })
    }

    pub(crate) fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|f| f == feature)
    }
}

impl Guest {
    /// The guest as our images lay it out.
    pub(crate) fn of_this_system() -> Result<Self, AgentError> {
        let person = find_user(Path::new("/etc/passwd"), PERSON)
            .ok()
            .flatten()
            .ok_or(AgentError::User(PERSON))?;
        Ok(Self {
            home: person.home.clone(),
            run: crate::RUN.into(),
            shims: "/usr/lib/vestibule/bin".into(),
            rfb: "/run/vnc/1.sock".into(),
            display: ":1".into(),
            xauthority: "/run/vnc/Xauthority".into(),
            browser_profile: person.home.join(".config/chromium"),
            browser: "/usr/bin/chromium".into(),
            browser_policies: "/etc/chromium/policies/managed".into(),
            image: ImageFacts::read(Path::new("/etc/vestibule/image.json")),
            person: Some(person),
        })
    }

    /// A guest in `dir`, which has `home`, `run` and `bin`; programs run as whoever runs the test.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn for_tests(dir: &Path) -> Self {
        Self {
            person: None,
            home: dir.join("home"),
            run: dir.join("run"),
            shims: dir.join("bin"),
            rfb: dir.join("run/rfb.sock"),
            display: ":1".into(),
            xauthority: dir.join("Xauthority"),
            browser_profile: dir.join("home/profile"),
            browser: dir.join("bin/browser"),
            browser_policies: dir.join("policies"),
            image: ImageFacts::default(),
        }
    }

    /// What `GET /health` lists.
    pub(crate) fn capabilities(&self) -> Vec<String> {
        let mut all = vec!["terminal", "oauth", "egress"];
        if self.image.has("browser") {
            all.extend(["browser", "display"]);
        }
        all.into_iter().map(str::to_owned).collect()
    }
}

/// Looks `name` up in the passwd(5) file at `path`. Not through libc: static glibc would load NSS modules.
pub(crate) fn find_user(path: &Path, name: &str) -> io::Result<Option<Person>> {
    Ok(fs::read_to_string(path)?.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [user, _, uid, gid, _, home, shell] = fields.as_slice() else {
            return None;
        };
        (*user == name).then_some(())?;
        Some(Person {
            name: (*user).to_owned(),
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: home.into(),
            shell: shell.into(),
        })
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_come_from_the_file_and_nothing_else() {
        let dir = camino_tempfile::tempdir().unwrap();
        let file = dir.path().join("passwd");
        fs::write(&file, "root:x:0:0:root:/root:/bin/bash\n# broken\nperson:x:1000:1001:,,,:/home/person:/bin/bash\n").unwrap();
        let person = find_user(file.as_std_path(), "person").unwrap().unwrap();
        assert_eq!(
            (person.uid, person.gid, person.home.to_str()),
            (1000, 1001, Some("/home/person"))
        );
        assert_eq!(find_user(file.as_std_path(), "pers").unwrap(), None);
    }

    #[test]
    fn an_image_without_facts_declares_nothing() {
        assert_eq!(
            ImageFacts::read(Path::new("/nonexistent")),
            ImageFacts::default()
        );
        let facts: ImageFacts =
            serde_json::from_str(r#"{"requiredUnits":["a.service"],"features":["browser"],"x":1}"#)
                .unwrap();
        assert!(facts.has("browser") && !facts.has("terminal"));
    }
}

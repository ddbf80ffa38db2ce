//! The credential files: when they are there, whole, and what they say about account and expiry.
//!
//! A file counts when it is another one than stood there before the sign-in, parses by its format, and has every value
//! that its rule asks for. Everything short of that is [`FileState::Partial`], with the reason.
mod claims;
mod format;
mod watch;

pub(crate) use claims::claims;
pub(crate) use watch::Watch;

use crate::home::{Content, Home, HomeError, Stamp};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use vestibule_api::{
    agent::{CapturedCredential, CapturedFile},
    error::Chain,
    pack::CredentialRule,
    time::Timestamp,
};

/// The state of one rule's file.
#[derive(Debug)]
pub(crate) enum FileState {
    /// Not there, or still the one from before the sign-in.
    Missing,
    /// There, and not a credential (yet).
    Partial(String),
    Complete(Complete),
}

/// A complete file.
#[derive(Debug)]
pub(crate) struct Complete {
    content: Content,
    account: Option<String>,
    expires_at: Option<Timestamp>,
}

/// The rules of one sign-in, with what stood there when it began.
#[derive(Debug)]
pub(crate) struct Capture {
    home: Home,
    rules: Vec<(CredentialRule, Option<Stamp>)>,
}

/// What a look at all files found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Whether every required file is complete.
    pub(crate) complete: bool,
    /// Rules whose file is there and not complete, each with the reason.
    pub(crate) partial: Vec<(String, String)>,
}

impl Capture {
    /// Begins a sign-in: what stands in the files now does not count.
    pub(crate) fn begin(home: Home, rules: Vec<CredentialRule>) -> Self {
        let stamped = rules.into_iter().map(|rule| {
            let before = home
                .read(&rule.path)
                .ok()
                .flatten()
                .map(|content| content.stamp);
            (rule, before)
        });
        Self {
            rules: stamped.collect(),
            home,
        }
    }

    /// The paths to watch, relative to the home directory.
    pub(crate) fn paths(&self) -> Vec<String> {
        self.rules
            .iter()
            .map(|(rule, _)| rule.path.clone())
            .collect()
    }

    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// Looks at every file.
    pub(crate) fn look(&self) -> Progress {
        let mut progress = Progress {
            complete: true,
            partial: Vec::new(),
        };
        for (rule, before) in &self.rules {
            match self.state(rule, *before) {
                FileState::Complete(_) => {}
                FileState::Missing => progress.complete &= rule.optional,
                FileState::Partial(why) => {
                    progress.complete &= rule.optional;
                    progress.partial.push((rule.id.clone(), why));
                }
            }
        }
        progress
    }

    /// Reads every complete file; none while a required one is missing or partial.
    pub(crate) fn collect(&self) -> Option<CapturedCredential> {
        let mut credential = CapturedCredential {
            files: Vec::new(),
            account: None,
            expires_at: None,
        };
        for (rule, before) in &self.rules {
            match self.state(rule, *before) {
                FileState::Complete(file) => {
                    credential.account = credential.account.or(file.account);
                    credential.expires_at = credential.expires_at.or(file.expires_at);
                    credential.files.push(CapturedFile {
                        rule: rule.id.clone(),
                        path: rule.path.clone(),
                        mode: file.content.mode,
                        content: BASE64.encode(&file.content.bytes),
                    });
                }
                FileState::Missing | FileState::Partial(_) if rule.optional => {}
                FileState::Missing | FileState::Partial(_) => return None,
            }
        }
        (!credential.files.is_empty()).then_some(credential)
    }

    fn state(&self, rule: &CredentialRule, before: Option<Stamp>) -> FileState {
        match self.home.read(&rule.path) {
            Ok(None) => FileState::Missing,
            Ok(Some(content)) if Some(content.stamp) == before => FileState::Missing,
            Ok(Some(content)) => judge(rule, content),
            // A path through a file, a link that leads out: not a credential, and the reason is worth saying.
            Err(
                err @ (HomeError::File { .. }
                | HomeError::TooLarge { .. }
                | HomeError::Path(_)
                | HomeError::Home { .. }),
            ) => FileState::Partial(Chain(&err).to_string()),
        }
    }
}

fn judge(rule: &CredentialRule, content: Content) -> FileState {
    if content.bytes.is_empty() {
        return FileState::Partial("the file is empty".to_owned());
    }
    let value = match format::parse(rule, &content.bytes) {
        Ok(value) => value,
        Err(err) => return FileState::Partial(err.to_string()),
    };
    let missing = rule
        .required
        .iter()
        .find(|pointer| !claims::has(&value, pointer));
    if let Some(pointer) = missing {
        return FileState::Partial(format!("it has no value at `{pointer}`"));
    }
    let account = rule
        .account
        .as_deref()
        .and_then(|pointer| claims::account(&value, pointer));
    let expires_at = rule
        .expires_at
        .as_ref()
        .and_then(|expiry| claims::expiry(&value, expiry));
    claims::forget(value);
    FileState::Complete(Complete {
        content,
        account,
        expires_at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    fn rule(value: serde_json::Value) -> CredentialRule {
        serde_json::from_value(value).unwrap()
    }

    fn begin(dir: &camino_tempfile::Utf8TempDir, rules: Vec<CredentialRule>) -> Capture {
        Capture::begin(Home::open(dir.path().as_std_path(), None).unwrap(), rules)
    }

    fn codex() -> CredentialRule {
        rule(
            json!({"id": "auth", "path": ".codex/auth.json", "format": "json",
            "required": ["/tokens/access_token", "/tokens/refresh_token"]}),
        )
    }

    #[test]
    fn half_written_files_are_not_credentials() {
        let dir = camino_tempfile::tempdir().unwrap();
        let capture = begin(&dir, vec![codex()]);
        assert_eq!(capture.look(), Progress::default());
        fs::create_dir(dir.path().join(".codex")).unwrap();
        let file = dir.path().join(".codex/auth.json");
        let whole = r#"{"tokens":{"access_token":"a","refresh_token":"r"}}"#;
        for cut in 0..whole.len() {
            fs::write(&file, &whole[..cut]).unwrap();
            let progress = capture.look();
            assert!(
                !progress.complete && progress.partial.len() == 1,
                "cut at {cut}"
            );
            assert!(capture.collect().is_none());
            // The reason names no content.
            assert!(!progress.partial[0].1.contains("access_token\":\"a"));
        }
        fs::write(
            &file,
            r#"{"tokens":{"access_token":"a","refresh_token":""}}"#,
        )
        .unwrap();
        assert_eq!(
            capture.look().partial,
            [(
                "auth".to_owned(),
                "it has no value at `/tokens/refresh_token`".to_owned()
            )]
        );
        fs::write(&file, whole).unwrap();
        assert_eq!(
            capture.look(),
            Progress {
                complete: true,
                partial: vec![]
            }
        );
        let got = capture.collect().unwrap();
        assert_eq!(
            BASE64.decode(&got.files[0].content).unwrap(),
            whole.as_bytes()
        );
        assert_eq!(
            (got.files[0].path.as_str(), got.files[0].mode & 0o600),
            (".codex/auth.json", 0o600)
        );
    }

    #[test]
    fn what_stood_there_before_does_not_count_until_it_changes() {
        let dir = camino_tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(".codex")).unwrap();
        let file = dir.path().join(".codex/auth.json");
        let text = r#"{"tokens":{"access_token":"a","refresh_token":"r"}}"#;
        fs::write(&file, text).unwrap();
        let capture = begin(&dir, vec![codex()]);
        assert!(!capture.look().complete);
        // Replaced by rename with the very same bytes: another file.
        fs::write(dir.path().join(".codex/new"), text).unwrap();
        fs::rename(dir.path().join(".codex/new"), &file).unwrap();
        assert!(capture.look().complete);
    }

    #[test]
    fn optional_files_are_taken_along_and_not_waited_for() {
        let dir = camino_tempfile::tempdir().unwrap();
        let key = rule(json!({"id": "key", "path": "key", "format": "opaque"}));
        let extra =
            rule(json!({"id": "extra", "path": "extra.json", "format": "json", "optional": true}));
        let capture = begin(&dir, vec![key, extra]);
        fs::write(dir.path().join("key"), [0u8, 255, 1]).unwrap();
        fs::write(dir.path().join("extra.json"), "{").unwrap();
        assert!(capture.look().complete);
        assert_eq!(capture.collect().unwrap().files.len(), 1);
        fs::write(dir.path().join("extra.json"), "{}").unwrap();
        assert_eq!(capture.collect().unwrap().files.len(), 2);
    }
}

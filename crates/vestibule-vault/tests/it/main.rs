//! The vault from outside: what it gives back, and everything that it must refuse.
#![expect(clippy::unwrap_used, reason = "a test's helpers end the test")]
mod no_sync;

use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::Utf8TempDir;
use vestibule_api::{
    ids::{CredentialId, SessionId},
    secret::Secret,
};
use vestibule_vault::{
    Access, Action, AuditError, ContentFile, Fault, KeyError, KeySource, NewCredential, OpenError,
    PutError, ReadError, RecordError, RemoveError, Vault,
};

const SECRET: &[u8] = b"{\"token\":\"sk-very-secret-0123456789\"}\n\0\xff binary too";

struct Room {
    home: Utf8TempDir,
    vault: Vault,
}

impl Room {
    fn new() -> Self {
        let home = camino_tempfile::tempdir().unwrap();
        let vault = Vault::open(home.path(), &KeySource::Own).unwrap();
        Self { home, vault }
    }

    fn put(&self, user: &str) -> CredentialId {
        let new = credential(user, SECRET);
        self.vault.put(&new, &access()).unwrap().credential_id
    }

    fn record(&self, id: CredentialId) -> Utf8PathBuf {
        self.home.path().join("records").join(id.to_string())
    }

    fn log(&self) -> Utf8PathBuf {
        self.home.path().join("audit.log")
    }

    fn reopen(&self) -> Result<Vault, OpenError> {
        Vault::open(self.home.path(), &KeySource::Own)
    }
}

fn access() -> Access {
    Access {
        actor: "test".to_owned(),
        purpose: "proof".to_owned(),
    }
}

fn credential(user: &str, bytes: &[u8]) -> NewCredential {
    NewCredential {
        credential_id: CredentialId::generate(),
        provider: "codex".parse().unwrap(),
        user_id: user.to_owned(),
        session_id: SessionId::generate(),
        account: Some("ada@example.org".to_owned()),
        expires_at: None,
        files: vec![
            ContentFile {
                path: ".codex/auth.json".to_owned(),
                mode: 0o600,
                bytes: Secret::new(bytes.to_vec()),
            },
            ContentFile {
                path: ".empty".to_owned(),
                mode: 0o644,
                bytes: Secret::new(Vec::new()),
            },
        ],
    }
}

fn every_file(dir: &Utf8Path) -> Vec<(Utf8PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in dir.read_dir_utf8().unwrap() {
        let path = entry.unwrap().path().to_owned();
        if path.is_dir() {
            found.extend(every_file(&path));
        } else {
            found.push((path.clone(), std::fs::read(&path).unwrap()));
        }
    }
    found
}

#[test]
fn gives_back_exactly_the_bytes_also_after_reopening() {
    let room = Room::new();
    let id = room.put("ada");
    for vault in [&room.vault, &room.reopen().unwrap()] {
        let content = vault.get(id, &access()).unwrap();
        assert_eq!(content.files[0].bytes.expose(), SECRET);
        assert_eq!(
            (content.files[0].path.as_str(), content.files[0].mode),
            (".codex/auth.json", 0o600)
        );
        assert_eq!(
            (content.files[1].bytes.expose().len(), content.files[1].mode),
            (0, 0o644)
        );
        assert!(!format!("{content:?}").contains("sk-very"));
    }
    let listing = room.vault.list().unwrap();
    assert_eq!(listing.credentials.len(), 1);
    assert_eq!(listing.credentials[0], room.vault.show(id).unwrap());
    assert_eq!(listing.credentials[0].files[0].bytes, SECRET.len());
    let summary = room.vault.audit_check().unwrap();
    assert_eq!(
        (summary.lines, summary.released),
        (4, 2),
        "created, stored, two releases"
    );
}

#[test]
fn nothing_on_disk_is_the_secret_and_nothing_is_for_others() {
    use std::os::unix::fs::PermissionsExt as _;
    let room = Room::new();
    room.put("ada");
    for (path, bytes) in every_file(room.home.path()) {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{path}");
        assert!(
            !bytes
                .windows(16)
                .any(|w| SECRET.windows(16).any(|s| s == w)),
            "{path}"
        );
    }
}

#[test]
fn sealing_again_for_the_same_session_changes_nothing() {
    let room = Room::new();
    let new = credential("ada", SECRET);
    let first = room.vault.put(&new, &access()).unwrap();
    let before = std::fs::read(room.record(first.credential_id)).unwrap();
    assert_eq!(room.vault.put(&new, &access()).unwrap(), first);
    assert_eq!(
        std::fs::read(room.record(first.credential_id)).unwrap(),
        before
    );
    let other = NewCredential {
        session_id: SessionId::generate(),
        ..credential("eve", b"x")
    };
    let other = NewCredential {
        credential_id: first.credential_id,
        ..other
    };
    assert!(matches!(
        room.vault.put(&other, &access()),
        Err(PutError::Taken(_))
    ));
}

#[test]
fn every_bit_counts() {
    let room = Room::new();
    let id = room.put("ada");
    let good = std::fs::read(room.record(id)).unwrap();
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(room.record(id), &bad).unwrap();
        let err = room.vault.get(id, &access()).unwrap_err();
        assert!(matches!(err, ReadError::NotCurrent(_)), "byte {at}: {err}");
    }
    for len in [0, 1, good.len() / 2, good.len() - 1] {
        std::fs::write(room.record(id), &good[..len]).unwrap();
        assert!(room.vault.get(id, &access()).is_err(), "cut to {len}");
    }
    assert_eq!(room.vault.list().unwrap().damaged.len(), 1);
    assert_eq!(
        room.vault.audit_check().unwrap().released,
        0,
        "nothing left"
    );
    std::fs::write(room.record(id), &good).unwrap();
    assert_eq!(
        room.vault.get(id, &access()).unwrap().files[0]
            .bytes
            .expose(),
        SECRET
    );
}

#[test]
fn a_record_under_another_name_is_refused() {
    let room = Room::new();
    let (ada, eve) = (room.put("ada"), room.put("eve"));
    let (a, e) = (
        std::fs::read(room.record(ada)).unwrap(),
        std::fs::read(room.record(eve)).unwrap(),
    );
    std::fs::write(room.record(ada), &e).unwrap();
    std::fs::write(room.record(eve), &a).unwrap();
    for id in [ada, eve] {
        assert!(matches!(
            room.vault.get(id, &access()),
            Err(ReadError::NotCurrent(_))
        ));
    }
    let stranger = CredentialId::generate();
    std::fs::write(room.record(stranger), &a).unwrap();
    assert!(matches!(
        room.vault.get(stranger, &access()),
        Err(ReadError::NotCurrent(_))
    ));
}

#[test]
fn a_removed_record_can_not_be_put_back() {
    let room = Room::new();
    let id = room.put("ada");
    let old = std::fs::read(room.record(id)).unwrap();
    room.vault.remove(id, &access()).unwrap();
    assert!(matches!(
        room.vault.get(id, &access()),
        Err(ReadError::NotFound(_))
    ));
    assert!(matches!(
        room.vault.remove(id, &access()),
        Err(RemoveError::NotFound(_))
    ));
    std::fs::write(room.record(id), &old).unwrap();
    let refused = |vault: &Vault| vault.get(id, &access()).unwrap_err();
    assert!(matches!(refused(&room.vault), ReadError::NotCurrent(_)));
    // As after a kill between the line and the removal: whoever opens it next carries that on.
    assert!(matches!(
        refused(&room.reopen().unwrap()),
        ReadError::NotFound(_)
    ));
    room.put("eve");
    std::fs::write(room.record(id), &old).unwrap();
    assert!(matches!(
        refused(&room.reopen().unwrap()),
        ReadError::NotCurrent(_)
    ));
}

#[test]
fn an_older_version_under_the_same_id_is_refused() {
    let room = Room::new();
    let new = credential("ada", b"old token");
    let id = room.vault.put(&new, &access()).unwrap().credential_id;
    let old = std::fs::read(room.record(id)).unwrap();
    room.vault.remove(id, &access()).unwrap();
    let newer = NewCredential {
        credential_id: id,
        ..credential("ada", b"new token")
    };
    room.vault.put(&newer, &access()).unwrap();
    assert_eq!(
        room.vault.get(id, &access()).unwrap().files[0]
            .bytes
            .expose(),
        b"new token"
    );
    std::fs::write(room.record(id), &old).unwrap();
    assert!(matches!(
        room.vault.get(id, &access()),
        Err(ReadError::NotCurrent(_))
    ));
}

#[test]
fn a_changed_audit_log_is_refused() {
    let room = Room::new();
    let id = room.put("ada");
    drop(room.vault.get(id, &access()).unwrap());
    let good = std::fs::read_to_string(room.log()).unwrap();
    let lines: Vec<&str> = good.lines().collect();
    let dropped = [lines[0], lines[2], ""].join("\n");
    let swapped = [lines[0], lines[2], lines[1], ""].join("\n");
    let changed = good.replacen("proof", "prowl", 1);
    let endless = good.clone() + &"x".repeat(1 << 20);
    for (bad, at, why) in [
        (changed, 2, Fault::Mac),
        (dropped, 2, Fault::Number(3)),
        (swapped, 2, Fault::Number(3)),
        (good.replacen("{", "[", 2), 1, Fault::Form),
        (endless, 4, Fault::Form),
    ] {
        std::fs::write(room.log(), &bad).unwrap();
        let mut sound = 0;
        let read = Vault::read(room.home.path(), &KeySource::Own, &mut |_, _| sound += 1);
        for err in [room.reopen().unwrap_err(), read.unwrap_err()] {
            let OpenError::Audit(AuditError::Broken { line, fault }) = err else {
                panic!("{err}");
            };
            assert_eq!((line, fault), (at, why));
        }
        assert_eq!(sound, at - 1, "lines before the first bad one are given");
        assert_eq!(std::fs::read_to_string(room.log()).unwrap(), bad);
    }
    std::fs::write(room.log(), [lines[0], lines[1], ""].join("\n")).unwrap();
    let err = room.vault.get(id, &access()).unwrap_err();
    assert!(
        matches!(
            err,
            ReadError::Audit {
                err: AuditError::Shrunk,
                ..
            }
        ),
        "{err}"
    );
}

#[test]
fn a_torn_line_is_cut_off() {
    let room = Room::new();
    let id = room.put("ada");
    let mut log = std::fs::read(room.log()).unwrap();
    log.extend_from_slice(b"0000 {\"seq\":3,\"at");
    std::fs::write(room.log(), &log).unwrap();
    let vault = room.reopen().unwrap();
    drop(vault.get(id, &access()).unwrap());
    assert_eq!(vault.audit_check().unwrap().lines, 3);
    assert_eq!(room.reopen().unwrap().audit_check().unwrap().released, 1);
}

#[test]
fn no_line_no_secret() {
    let room = Room::new();
    let id = room.put("ada");
    std::fs::remove_file(room.log()).unwrap();
    std::fs::create_dir(room.log()).unwrap();
    let err = room.vault.get(id, &access()).unwrap_err();
    assert!(matches!(err, ReadError::Audit { .. }), "{err}");
    let err = room
        .vault
        .put(&credential("eve", b"x"), &access())
        .unwrap_err();
    assert!(matches!(err, PutError::Audit { .. }), "{err}");
    assert_eq!(
        every_file(&room.home.path().join("records")).len(),
        1,
        "only the first record"
    );
}

#[test]
fn what_a_killed_process_had_written_down_is_carried_on() {
    let room = Room::new();
    let id = room.put("ada");
    let staged = |id| Utf8PathBuf::from(format!("{}.new", room.record(id)));
    // Killed between the audit line and the record's name.
    std::fs::rename(room.record(id), staged(id)).unwrap();
    // Killed before the audit line.
    let early = CredentialId::generate();
    std::fs::write(staged(early), "half").unwrap();
    let vault = room.reopen().unwrap();
    assert_eq!(
        vault.get(id, &access()).unwrap().files[0].bytes.expose(),
        SECRET
    );
    assert_eq!(every_file(&room.home.path().join("records")).len(), 1);
    assert!(vault.missing().is_empty());
    std::fs::remove_file(room.record(id)).unwrap();
    assert_eq!(vault.missing(), [id]);
}

#[test]
fn a_vault_is_looked_at_without_being_touched() {
    let room = Room::new();
    let id = room.put("ada");
    drop(room.vault.get(id, &access()).unwrap());
    let before = every_file(room.home.path());
    let mut lines = Vec::new();
    let mut each =
        |line: &vestibule_vault::AuditLine, mac: &str| lines.push((line.action, mac.to_owned()));
    let vault = Vault::read(room.home.path(), &KeySource::Own, &mut each).unwrap();
    let actions: Vec<_> = lines.iter().map(|(action, _)| *action).collect();
    assert_eq!(actions, [Action::Created, Action::Stored, Action::Released]);
    assert_eq!(vault.audit_check().unwrap().head, lines[2].1);
    assert_eq!(vault.list().unwrap().credentials.len(), 1);
    assert_eq!(every_file(room.home.path()), before);
    let nowhere = room.home.path().join("nowhere");
    let none = Vault::read(&nowhere, &KeySource::Own, &mut |_, _| {}).unwrap_err();
    assert!(matches!(none, OpenError::None(_)), "{none}");
    assert!(!nowhere.exists());
}

/// A real file system that is really full: a tmpfs in a mount namespace of the test's own, where it runs itself again.
#[test]
fn a_full_disk_lets_nothing_out() {
    let dir = camino_tempfile::tempdir().unwrap();
    let output = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c"])
        .arg("mount -t tmpfs -o size=256k none \"$0\" && exec \"$1\" --exact on_a_full_disk --ignored --nocapture")
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .env("VESTIBULE_TEST_FULL", dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
#[ignore = "run by a_full_disk_lets_nothing_out, on a small file system"]
fn on_a_full_disk() {
    use std::io::{ErrorKind, Write as _};
    let dir = Utf8PathBuf::from(std::env::var("VESTIBULE_TEST_FULL").unwrap());
    let vault = Vault::open(&dir.join("vault"), &KeySource::Own).unwrap();
    let id = vault
        .put(&credential("ada", SECRET), &access())
        .unwrap()
        .credential_id;
    let before = vault.audit_check().unwrap();
    let fill = || {
        let mut filler = std::fs::File::create(dir.join("filler")).unwrap();
        let full = loop {
            if let Err(err) = filler.write_all(&[0; 64]) {
                break err;
            }
        };
        assert_eq!(full.kind(), ErrorKind::StorageFull);
    };
    fill();
    // The log's last page may have room for some lines; each of those is synced, and says what left.
    let mut left = 0;
    let err = loop {
        match vault.get(id, &access()) {
            Ok(_) => left += 1,
            Err(err) => break err,
        }
    };
    let said = vestibule_api::error::Chain(&err).to_string();
    assert!(
        matches!(err, ReadError::Audit { .. }) && said.contains("No space left"),
        "{said}"
    );
    let err = vault
        .put(&credential("eve", SECRET), &access())
        .unwrap_err();
    assert!(matches!(err, PutError::File { .. }), "{err}");
    assert!(matches!(
        vault.remove(id, &access()),
        Err(RemoveError::Audit { .. })
    ));
    assert_eq!(every_file(&dir.join("vault/records")).len(), 1);
    let after = vault.audit_check().unwrap();
    assert_eq!((after.lines, after.released), (before.lines + left, left));
    std::fs::remove_file(dir.join("filler")).unwrap();
    assert_eq!(
        vault.get(id, &access()).unwrap().files[0].bytes.expose(),
        SECRET
    );
    assert_eq!(vault.audit_check().unwrap().released, left + 1);
}

/// A kernel that takes what is written and says that it can't sync it: the line is not on disk, so nothing leaves. What does not
/// ask the kernel to sync would not hear of it.
#[test]
fn a_line_that_is_not_synced_lets_nothing_out() {
    let room = Room::new();
    let id = room.put("ada");
    let before = std::fs::read(room.log()).unwrap();
    let refused = no_sync::during(|| {
        let probe = room.home.path().join("probe");
        std::fs::write(&probe, "written").unwrap();
        let sync = std::fs::File::open(&probe).unwrap().sync_all();
        assert_eq!(
            sync.unwrap_err().raw_os_error(),
            Some(no_sync::ERRNO),
            "the kernel refuses"
        );
        std::fs::remove_file(probe).unwrap();
        let got = room.vault.get(id, &access()).unwrap_err();
        let put = room.vault.put(&credential("eve", SECRET), &access());
        (
            got,
            put.unwrap_err(),
            room.vault.remove(id, &access()).unwrap_err(),
        )
    });
    let (got, put, removed) = refused;
    let said = vestibule_api::error::Chain(&got).to_string();
    assert!(
        matches!(got, ReadError::Audit { .. }) && said.contains("Input/output error"),
        "{said}"
    );
    assert!(matches!(put, PutError::File { .. }), "{put}");
    assert!(matches!(removed, RemoveError::Audit { .. }), "{removed}");
    assert_eq!(
        std::fs::read(room.log()).unwrap(),
        before,
        "no line of what did not happen"
    );
    assert_eq!(every_file(&room.home.path().join("records")).len(), 1);
    let content = room.vault.get(id, &access()).unwrap();
    assert_eq!(content.files[0].bytes.expose(), SECRET);
    assert_eq!(room.vault.audit_check().unwrap().released, 1);
}

#[test]
fn another_master_key_is_refused_at_once() {
    let room = Room::new();
    room.put("ada");
    let key = room.home.path().join("master.key");
    let other = Room::new();
    std::fs::write(
        &key,
        std::fs::read(other.home.path().join("master.key")).unwrap(),
    )
    .unwrap();
    assert!(matches!(
        room.reopen(),
        Err(OpenError::Audit(AuditError::Broken { line: 1, .. }))
    ));
    std::fs::remove_file(&key).unwrap();
    assert!(matches!(
        room.reopen(),
        Err(OpenError::Key(KeyError::Missing { .. }))
    ));
}

#[test]
fn paths_that_lead_out_and_sizes_without_bound_are_refused() {
    let room = Room::new();
    for path in ["/etc/passwd", "../x", "a/../b", "a//b", "", "a\nb", "."] {
        let mut new = credential("ada", SECRET);
        new.files[0].path = path.to_owned();
        let err = room.vault.put(&new, &access()).unwrap_err();
        assert!(
            matches!(
                err,
                PutError::Record {
                    err: RecordError::BadPath { .. },
                    ..
                }
            ),
            "{path:?}: {err}"
        );
    }
    let huge = credential("ada", &vec![0; (4 << 20) + 1]);
    let none = NewCredential {
        files: Vec::new(),
        ..credential("ada", SECRET)
    };
    for new in [huge, none] {
        let err = room.vault.put(&new, &access()).unwrap_err();
        assert!(
            matches!(
                err,
                PutError::Record {
                    err: RecordError::BadSize,
                    ..
                }
            ),
            "{err}"
        );
    }
    assert!(room.vault.list().unwrap().credentials.is_empty());
}

#[test]
fn two_vaults_on_one_directory_keep_one_chain() {
    let room = Room::new();
    let id = room.put("ada");
    let other = room.reopen().unwrap();
    std::thread::scope(|scope| {
        for vault in [&room.vault, &other] {
            scope.spawn(move || {
                for _ in 0..20 {
                    drop(vault.get(id, &access()).unwrap());
                }
            });
        }
    });
    assert_eq!(room.vault.audit_check().unwrap().released, 40);
}

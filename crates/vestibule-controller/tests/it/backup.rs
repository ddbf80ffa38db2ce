//! A home that is saved while its controller serves, and what is put back.
use crate::{
    lifecycle::{FILE, SECRET, nothing_left, signing_in},
    support::{home::Home, people::PASSWORD, wait_for},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::json;
use std::os::unix::fs::PermissionsExt as _;
use vestibule_api::{error::Chain, session::SessionState};
use vestibule_controller::{
    BackupManifest, BackupOptions, RestoreError, RestoreOptions, backup, restore,
};
use vestibule_testkit::postgres;

async fn save(home: &Home, to: &Utf8Path, with_key: bool) -> BackupManifest {
    let config = home.config();
    let options = BackupOptions {
        to: to.to_owned(),
        with_key,
    };
    backup(&config, &options).await.unwrap()
}

async fn put_back(
    from: &Utf8Path,
    home: &Utf8Path,
    key: Option<Utf8PathBuf>,
) -> Result<BackupManifest, RestoreError> {
    let options = RestoreOptions {
        from: from.to_owned(),
        home: home.to_owned(),
        key,
        config: None,
        keep_database: false,
    };
    restore(&options).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_saved_while_it_served_comes_back_to_the_byte() {
    let home = Home::on("sqlite", "");
    std::fs::create_dir(home.path().join("providers")).unwrap();
    let controller = home.serve().await;
    let (done, runner) = signing_in(&home, &controller.api).await;
    runner.capture(FILE, SECRET);
    let credential = controller
        .api
        .until(done, SessionState::Completed)
        .await
        .credential_id
        .unwrap();
    let (open, _runner) = signing_in(&home, &controller.api).await;

    let dir = camino_tempfile::tempdir().unwrap();
    let file = dir.path().join("saved.tar");
    let manifest = save(&home, &file, false).await;
    assert_eq!((manifest.credentials, manifest.audit_lines), (1, 2));
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let bytes = std::fs::read(&file).unwrap();
    let key = std::fs::read(home.path().join("vault/master.key")).unwrap();
    for secret in [SECRET, &key[..32]] {
        assert!(!bytes.windows(secret.len()).any(|window| window == secret));
    }
    assert_eq!(
        dir.path().read_dir_utf8().unwrap().count(),
        1,
        "nothing else is left"
    );
    let again = backup(
        &home.config(),
        &BackupOptions {
            to: file.clone(),
            with_key: false,
        },
    )
    .await
    .unwrap_err();
    assert!(again.to_string().contains("create"), "{again}");
    assert_eq!(std::fs::read(&file).unwrap(), bytes, "never over a backup");

    let running = put_back(&file, home.path(), None).await.unwrap_err();
    assert!(
        Chain(&running).to_string().contains("another controller"),
        "{running}"
    );
    controller.api.cancel(open).await;
    nothing_left(&home).await;
    controller.stop().await;
    let not_empty = put_back(&file, home.path(), None).await.unwrap_err();
    assert!(
        matches!(&not_empty, RestoreError::NotEmpty { names, .. } if names.contains(&"vault".to_owned())),
        "{not_empty}"
    );

    let other = Home::on("sqlite", "");
    let no_key = put_back(&file, other.path(), None).await.unwrap_err();
    assert!(no_key.to_string().contains("--key"), "{no_key}");
    let key = home.path().join("vault/master.key");
    put_back(&file, other.path(), Some(key)).await.unwrap();
    let controller = other.serve().await;
    let path = format!("/api/credentials/{credential}/content");
    let reply = controller
        .api
        .post(&path, &json!({ "purpose": "test" }))
        .await;
    let reply: serde_json::Value = reply.json().await.unwrap();
    let content = BASE64
        .decode(reply["files"][0]["content"].as_str().unwrap())
        .unwrap();
    assert_eq!(content, SECRET);
    assert_eq!(reply["files"][0]["path"], FILE);
    assert_eq!(
        controller.api.session(done).await.state,
        SessionState::Completed
    );
    // Its VM is not here; whoever waits for it hears so.
    let view = controller.api.until(open, SessionState::Failed).await;
    assert_eq!(
        view.failure.unwrap().finding.unwrap().cause.id(),
        "runner-lost"
    );
    wait_for("every place is free", || async {
        let vms = controller.api.json("/api/vms").await;
        vms.as_array().unwrap().is_empty().then_some(())
    })
    .await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_backup_is_refused_and_leaves_nothing() {
    let home = Home::new();
    let controller = home.serve().await;
    let (done, runner) = signing_in(&home, &controller.api).await;
    runner.capture(FILE, SECRET);
    controller.api.until(done, SessionState::Completed).await;
    nothing_left(&home).await;
    let dir = camino_tempfile::tempdir().unwrap();
    let file = dir.path().join("saved.tar");
    let manifest = save(&home, &file, true).await;
    controller.stop().await;
    let good = std::fs::read(&file).unwrap();
    let target = dir.path().join("home");

    let at = |needle: &[u8]| {
        let found = good.windows(needle.len()).rposition(|w| w == needle);
        found.unwrap()
    };
    let mut wrong = vec![
        good[..good.len() / 2].to_vec(),
        b"no tar".to_vec(),
        Vec::new(),
    ];
    // The sealed record, the audit log, the database, the key, a name in the tar's own header.
    for place in [
        at(b"vestibule-credential 1") + 300,
        at(b"first start"),
        at(b"SQLite format 3") + 5000,
        at(b"vault/master.key") + 515,
        at(b"vault/audit.log"),
    ] {
        let mut bad = good.clone();
        bad[place] ^= 1;
        wrong.push(bad);
    }
    for (number, bad) in wrong.into_iter().enumerate() {
        let path = dir.path().join(format!("bad-{number}.tar"));
        std::fs::write(&path, bad).unwrap();
        let err = put_back(&path, &target, None).await.unwrap_err();
        assert!(
            matches!(
                err,
                RestoreError::Damaged { .. }
                    | RestoreError::NotABackup(_)
                    | RestoreError::File { .. }
            ),
            "{number}: {err}"
        );
        let left: Vec<_> = target.read_dir_utf8().unwrap().flatten().collect();
        assert!(
            left.iter()
                .all(|entry| entry.file_name() == "controller.lock"),
            "{number}: {left:?}"
        );
    }
    // Another key, and a file that leads out of the home.
    let stranger = dir.path().join("stranger.key");
    std::fs::write(&stranger, BASE64.encode([7; 32])).unwrap();
    let err = put_back(&file, &target, Some(stranger)).await.unwrap_err();
    assert!(matches!(err, RestoreError::Vault { .. }), "{err}");
    let restored = put_back(&file, &target, None).await.unwrap();
    assert_eq!(restored.audit_head, manifest.audit_head);
    assert!(target.join("vault/master.key").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_home_without_a_credential_comes_back() {
    let home = Home::on("sqlite", "");
    home.serve().await.stop().await;
    let dir = camino_tempfile::tempdir().unwrap();
    let file = dir.path().join("saved.tar");
    save(&home, &file, true).await;
    let other = Home::on("sqlite", "");
    put_back(&file, other.path(), None).await.unwrap();
    other.serve().await.stop().await;
}

/// A backup of one kind of database becomes the other kind, and the way back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_goes_into_the_other_database_and_back() {
    let home = Home::on("sqlite", "");
    let controller = home.serve().await;
    let (done, runner) = signing_in(&home, &controller.api).await;
    runner.capture(FILE, SECRET);
    controller.api.until(done, SessionState::Completed).await;
    nothing_left(&home).await;
    controller.api.user("ada", "signer", None).await;
    let events = controller.api.events(done, 0, |_| false).await;
    let dir = camino_tempfile::tempdir().unwrap();
    let saved = dir.path().join("saved.tar");
    save(&home, &saved, true).await;
    controller.stop().await;

    let (mut from, mut last) = (saved, home);
    for (number, database) in [postgres::cluster().database(), "sqlite".to_owned()]
        .iter()
        .enumerate()
    {
        let next = Home::on(database, "");
        let config = dir.path().join(format!("{number}.toml"));
        std::fs::write(
            &config,
            format!(
                "database = '{database}'
"
            ),
        )
        .unwrap();
        let options = RestoreOptions {
            from: from.clone(),
            home: next.path().to_owned(),
            key: None,
            config: Some(config),
            keep_database: false,
        };
        restore(&options).await.unwrap();
        let controller = next.serve().await;
        assert_eq!(controller.api.events(done, 0, |_| false).await, events);
        let reply = controller.api.log_in("ada", PASSWORD).await;
        assert_eq!(reply.status(), 204, "people are there");
        let list = controller.api.json("/api/credentials").await;
        assert_eq!(list.as_array().unwrap().len(), 1);
        controller.stop().await;
        if database != "sqlite" {
            let other = Home::on(database, "");
            let again = RestoreOptions {
                home: other.path().to_owned(),
                ..options
            };
            let err = restore(&again).await.unwrap_err();
            assert!(matches!(err, RestoreError::DatabaseInUse), "{err}");
            let kept = RestoreOptions {
                keep_database: true,
                ..again
            };
            restore(&kept).await.unwrap();
        }
        from = dir.path().join(format!("{number}.tar"));
        save(&next, &from, true).await;
        last = next;
    }
    assert!(last.stores(b"ada"));
}

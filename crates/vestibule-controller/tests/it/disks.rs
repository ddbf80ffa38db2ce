//! A disk that is full, and one that is slow: each is named, and nothing is lost.
use crate::{
    audit::{content, is_content, is_unaudited, sealed},
    lifecycle::{FILE, SECRET, nothing_left, signing_in},
    support::home::Home,
};
use axum::http::StatusCode;
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::json;
use std::{
    io::Write as _,
    process::Command,
    time::{Duration, Instant},
};
use vestibule_api::session::SessionState;

/// A file system over a home's directory, until it is dropped.
struct Mounted<'a>(&'a Utf8Path);

impl<'a> Mounted<'a> {
    /// By mount(8). Else why not.
    fn over(dir: &'a Utf8Path, words: &[&str]) -> Result<Self, String> {
        done(Command::new("mount").args(words).arg(dir))?;
        Ok(Self(dir))
    }
}

/// What the program says that did not do it.
fn done(command: &mut Command) -> Result<(), String> {
    let said = command
        .output()
        .map_err(|err| format!("{command:?}: {err}"))?;
    let words = String::from_utf8_lossy(&said.stderr);
    match said.status.success() {
        true => Ok(()),
        false => Err(format!("{command:?}: {} {words}", said.status)),
    }
}

/// The file system, or none, with a printed reason. Where `VESTIBULE_NO_SKIP` is set, a host on which nobody can
/// mount fails: it would pass without having tried anything.
#[expect(clippy::print_stdout, reason = "a test that is skipped says why")]
fn or_skip<T>(mounted: Result<T, String>) -> Option<T> {
    let why = match mounted {
        Ok(mounted) => return Some(mounted),
        Err(why) => why,
    };
    let allowed = std::env::var_os("VESTIBULE_NO_SKIP").is_none();
    assert!(allowed, "{why}, and VESTIBULE_NO_SKIP is set");
    println!("skipped: {why}");
    None
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let unmount = Command::new("umount").arg("-l").arg(self.0).status();
        // A test that failed has said more.
        assert!(std::thread::panicking() || unmount.is_ok_and(|status| status.success()));
    }
}

/// One of so little room.
struct Small<'a>(Mounted<'a>);

impl<'a> Small<'a> {
    fn over(dir: &'a Utf8Path) -> Result<Self, String> {
        Mounted::over(dir, &["-t", "tmpfs", "-o", "size=16m", "small"]).map(Self)
    }

    /// Leaves no byte.
    fn fill(&self) -> Utf8PathBuf {
        let path = self.0.0.join("filler");
        let mut file = std::fs::File::create(&path).unwrap();
        for size in [64 << 10, 4 << 10, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
        path
    }
}

/// No room for database, vault and evidence: who asks hears so by name, and the credential that was on its way is sealed as soon as
/// there is some.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_without_room_is_named() {
    let home = Home::on("sqlite", "[limits]\nmin_free_mib = 0\nvms = 1\n");
    let dir = home.path().to_owned();
    let Some(small) = or_skip(Small::over(&dir)) else {
        return;
    };
    home.publish("6.1");
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, runner) = signing_in(&home, api).await;
    let filler = small.fill();
    runner.capture(FILE, SECRET);
    // What its log has room for is taken in.
    let mut refused = 0;
    for _ in 0..200 {
        let start = api
            .post("/api/auth/start", &json!({ "provider": "codex" }))
            .await;
        let status = start.status();
        if status == StatusCode::CREATED {
            continue;
        }
        let body: serde_json::Value = start.json().await.unwrap();
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains("disk is full"), "{message}");
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        refused += 1;
        if refused == 5 {
            break;
        }
    }
    assert_eq!(refused, 5, "there was room for 200 sessions");
    assert_eq!(api.session(id).await.credential_id, None);

    std::fs::remove_file(filler).unwrap();
    let view = api.until(id, SessionState::Completed).await;
    assert!(view.credential_id.is_some());
    controller.stop().await;
}

/// No room for the audit log's line: the credential stays, whoever asked hears why, and gets it when there is some.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vault_without_room_lets_nothing_out() {
    let home = Home::on("sqlite", "[limits]\nmin_free_mib = 0\nvms = 1\n");
    let dir = home.path().to_owned();
    let Some(small) = or_skip(Small::over(&dir)) else {
        return;
    };
    home.publish("6.1");
    let controller = home.serve().await;
    let api = &controller.api;
    let id = sealed(&home, api).await;
    nothing_left(&home).await;
    let filler = small.fill();
    // The log's last page has room for some lines.
    let mut left = 0;
    let refused = loop {
        let reply = content(api, id).await;
        if reply.0 != StatusCode::OK {
            break reply;
        }
        left += 1;
        assert!(left < 100, "there was room for every line");
    };
    is_unaudited(&refused);
    is_unaudited(&content(api, id).await);
    std::fs::remove_file(filler).unwrap();
    is_content(&content(api, id).await);
    let log = std::fs::read_to_string(dir.join("vault/audit.log")).unwrap();
    let lines = log.lines().filter(|line| line.contains("\"released\""));
    assert_eq!(
        lines.count(),
        left + 1,
        "a line for each that left, and no other"
    );
    controller.stop().await;
}

/// An ext4 file system in a file.
struct Loop<'a> {
    mounted: Mounted<'a>,
    _disk: camino_tempfile::NamedUtf8TempFile,
}

impl<'a> Loop<'a> {
    fn over(dir: &'a Utf8Path) -> Result<Self, String> {
        let disk = camino_tempfile::NamedUtf8TempFile::new().map_err(|err| err.to_string())?;
        let sized = disk.as_file().set_len(64 << 20);
        sized.map_err(|err| err.to_string())?;
        let file = disk.path().as_str();
        done(Command::new("/sbin/mkfs.ext4").args(["-q", file]))?;
        let mounted = Mounted::over(dir, &["-o", "loop", file])?;
        Ok(Self {
            mounted,
            _disk: disk,
        })
    }

    /// Whoever writes waits for so long (fsfreeze(8)). Returns when that is over.
    fn freeze(&self, time: Duration) {
        let fsfreeze = |how: &str| {
            let done = Command::new("/sbin/fsfreeze")
                .args([how, self.mounted.0.as_str()])
                .status();
            assert!(done.unwrap().success(), "fsfreeze {how}");
        };
        fsfreeze("--freeze");
        std::thread::sleep(time);
        fsfreeze("--unfreeze");
    }
}

/// A disk that keeps everybody waiting: who asks gets what they asked for, later, and the status says why.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_slow_disk_is_named() {
    let limits = "[limits]\nmin_free_mib = 0\nvms = 1\nwaiting = 1000\n";
    let home = Home::on("sqlite", limits);
    let dir = home.path().to_owned();
    let Some(disk) = or_skip(Loop::over(&dir)) else {
        return;
    };
    home.publish("6.1");
    let controller = home.serve().await;
    let api = &controller.api;
    let database = async || {
        let ready: serde_json::Value = api.get("/ready").await.json().await.unwrap();
        let checks = ready["checks"].as_array().unwrap().clone();
        checks
            .into_iter()
            .find(|check| check["name"] == "database")
            .unwrap()
    };
    assert_eq!(database().await["observed"], "answers");

    let frozen = Duration::from_secs(2);
    let start = async || {
        // Some of it falls into the freeze, whenever that begins.
        let begun = Instant::now();
        while begun.elapsed() < frozen {
            let start = api
                .post("/api/auth/start", &json!({ "provider": "codex" }))
                .await;
            assert_eq!(start.status(), StatusCode::CREATED);
        }
    };
    // What a freeze finds is a commit most of the time. SQLite that only begins one waits as well, before it is counted.
    let mut named = database().await;
    for _ in 0..5 {
        std::thread::scope(|scope| {
            let freezing = scope.spawn(|| disk.freeze(frozen));
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(start()));
            freezing.join().unwrap();
        });
        named = database().await;
        if named["observed"] != "answers" {
            break;
        }
    }
    let database = named;
    let observed = database["observed"].as_str().unwrap();
    assert!(
        observed.starts_with("answers; its disk is slow: a change took "),
        "{observed}"
    );
    assert!(
        database["ok"].as_bool().unwrap() && database["fix"].is_string(),
        "{database}"
    );
    let metrics = api.get("/metrics").await.text().await.unwrap();
    assert!(
        metrics.contains("vestibule_database_commit_seconds_bucket"),
        "{metrics}"
    );
    controller.stop().await;
}

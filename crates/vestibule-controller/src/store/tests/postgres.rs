//! A PostgreSQL server for the tests: one cluster per test process on a Unix socket, one database per test.
use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::Utf8TempDir;
use std::{
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};
use tokio::sync::OnceCell;

const BIN: &str = "/usr/lib/postgresql/15/bin";

struct Cluster {
    dir: Utf8PathBuf,
}

static CLUSTER: OnceCell<Option<Cluster>> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// URL of an empty database; none where no server is installed.
pub(super) async fn fresh() -> Option<String> {
    let cluster = CLUSTER
        .get_or_init(|| async { tokio::task::spawn_blocking(start).await.unwrap() })
        .await;
    let dir = &cluster.as_ref()?.dir;
    let name = format!("t{}", DATABASES.fetch_add(1, Ordering::Relaxed));
    let done = as_postgres("createdb", &["-h", dir.as_str(), &name]);
    assert!(done, "createdb {name}");
    Some(format!("postgres:///{name}?host={dir}&user=postgres"))
}

/// The server ends with the process that keeps its standard input open: this test process.
#[expect(
    clippy::zombie_processes,
    reason = "it ends after this process, which its open input tells it"
)]
fn start() -> Option<Cluster> {
    if !Utf8Path::new(BIN).exists() {
        return None;
    }
    let dir: Utf8PathBuf = Utf8TempDir::with_prefix_in("vestibule-pg-", "/tmp")
        .unwrap()
        .keep();
    assert!(
        Command::new("chown")
            .args(["postgres", dir.as_str()])
            .status()
            .unwrap()
            .success()
    );
    let data = dir.join("data");
    assert!(
        as_postgres("initdb", &["-D", data.as_str(), "-A", "trust", "--no-sync"]),
        "initdb"
    );
    // The shell waits for the end of its input, then stops the server and removes its directory.
    let script = format!(
        "{BIN}/pg_ctl -D {data} -w -l {dir}/log -o '-c listen_addresses= -k {dir} -F -c max_connections=200' start >&2 \
         && echo up && cat >/dev/null; {BIN}/pg_ctl -D {data} -m immediate stop; rm -rf {dir}/data {dir}/log"
    );
    let mut child = Command::new("runuser")
        .args(["-u", "postgres", "--", "setsid", "sh", "-c", &script])
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(
        &mut std::io::BufReader::new(child.stdout.take().unwrap()),
        &mut line,
    )
    .unwrap();
    assert_eq!(line, "up\n", "the server starts");
    // Kept open until the process ends.
    std::mem::forget(child.stdin.take());
    Some(Cluster { dir })
}

fn as_postgres(program: &str, args: &[&str]) -> bool {
    Command::new("runuser")
        .args(["-u", "postgres", "--", &format!("{BIN}/{program}")])
        .args(args)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap()
        .success()
}

//! A PostgreSQL server for tests: one cluster per test process on a Unix socket, without a password and without syncs, and one
//! database per test. It ends with the process.
use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::Utf8TempDir;
use std::{
    io::BufRead as _,
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

/// Where Debian puts the programs of each major version.
const VERSIONS: &str = "/usr/lib/postgresql";

/// A running server.
#[derive(Debug)]
pub struct Cluster {
    bin: Utf8PathBuf,
    dir: Utf8PathBuf,
    databases: AtomicU32,
}

/// The process's cluster, started when it is first asked for.
///
/// # Panics
/// When no server is installed, or it does not start.
pub fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(Cluster::start)
}

/// URL of an empty database of its own.
///
/// # Panics
/// As [`cluster`].
pub async fn database() -> String {
    tokio::task::spawn_blocking(|| cluster().database())
        .await
        .expect("it is made or the test ends")
}

impl Cluster {
    /// The server ends when the process that keeps its standard input open does: this one.
    #[expect(
        clippy::zombie_processes,
        reason = "it ends after this process, which its open input tells it"
    )]
    fn start() -> Self {
        let bin = newest().unwrap_or_else(|| {
            panic!("no PostgreSQL server below {VERSIONS}: apt-get install postgresql")
        });
        let dir = Utf8TempDir::with_prefix_in("vestibule-pg-", "/tmp")
            .expect("make a directory in /tmp")
            .keep();
        if is_root() {
            let mut chown = Command::new("chown");
            let owned = chown.args(["postgres", dir.as_str()]).status();
            let owned = owned.expect("run chown");
            assert!(owned.success(), "chown postgres {dir}");
        }
        let cluster = Self {
            bin,
            dir,
            databases: AtomicU32::new(0),
        };
        let Self { bin, dir, .. } = &cluster;
        let data = dir.join("data");
        cluster.run(
            "initdb",
            &[
                "-D",
                data.as_str(),
                "-U",
                "postgres",
                "-A",
                "trust",
                "--no-sync",
            ],
        );
        // The shell waits for the end of its input, then stops the server and removes its directory.
        let script = format!(
            "{bin}/pg_ctl -D {data} -w -l {dir}/log -o '-c listen_addresses= -k {dir} -F -c max_connections=300' start >&2 \
             && echo up && cat >/dev/null; {bin}/pg_ctl -D {data} -m immediate stop; rm -rf {dir}"
        );
        let mut server = as_server("setsid")
            .args(["sh", "-c", &script])
            // What ends this process's group, as timeout(1) does, is to end the server by its input and not by a signal.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start a shell");
        let mut line = String::new();
        let said = server.stdout.take().expect("its output is piped");
        std::io::BufReader::new(said)
            .read_line(&mut line)
            .expect("hear from the server");
        assert_eq!(line, "up\n", "the server starts; see {dir}/log");
        // Kept open until the process ends.
        std::mem::forget(server.stdin.take());
        cluster
    }

    /// URL of an empty database of its own.
    ///
    /// # Panics
    /// When it can't be made.
    pub fn database(&self) -> String {
        let name = format!("t{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let dir = &self.dir;
        self.run("createdb", &["-h", dir.as_str(), "-U", "postgres", &name]);
        format!("postgres:///{name}?host={dir}&user=postgres")
    }

    /// What the rows of this URL's database hold, as text.
    ///
    /// # Panics
    /// When they can't be read.
    pub fn dump(&self, url: &str) -> Vec<u8> {
        self.run("pg_dump", &["--data-only", "-d", url])
    }

    /// Runs SQL as the superuser in the database that this URL names.
    ///
    /// # Panics
    /// When it fails.
    pub fn psql(&self, url: &str, sql: &str) {
        self.run("psql", &["-v", "ON_ERROR_STOP=1", "-d", url, "-c", sql]);
    }

    fn run(&self, program: &str, args: &[&str]) -> Vec<u8> {
        let output = quiet(as_server(self.bin.join(program).as_str()).args(args))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .output()
            .expect("run a program of PostgreSQL's");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {said}");
        output.stdout
    }
}

fn newest() -> Option<Utf8PathBuf> {
    let versions = Utf8Path::new(VERSIONS).read_dir_utf8().ok()?.flatten();
    let number = |dir: &camino::Utf8DirEntry| dir.file_name().parse::<u32>().ok();
    let dirs = versions.filter_map(|dir| Some((number(&dir)?, dir.path().join("bin"))));
    let installed = dirs.filter(|(_, bin)| bin.join("initdb").exists());
    installed.max().map(|(_, bin)| bin)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The server refuses to run as root.
fn as_server(program: &str) -> Command {
    let mut command = if is_root() {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--", program]);
        command
    } else {
        Command::new(program)
    };
    command.current_dir("/");
    command
}

fn quiet(command: &mut Command) -> &mut Command {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
}

//! The real controller at the end of its file descriptors: who asks hears that, nothing ends, and it goes on when there are some
//! again. No VM.
#![expect(clippy::unwrap_used, reason = "a test that cannot start fails")]
use camino::Utf8Path;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixDatagram,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use vestibule_testkit::runner::store_image;

/// For hangs, not for slowness.
const PATIENCE: Duration = Duration::from_secs(60);
/// Descriptors that the controller may have beyond those it needs to stand there.
const SPARE: u64 = 24;
/// People who are connected before there are none left.
const PEOPLE: usize = 6;

/// More VMs than are ever asked for: what a start that failed half-way has made is removed when there are descriptors again, and is a
/// VM until then.
const CONFIG: &str = "runner = ['/bin/false']\n[limits]\nvms = 100\nwaiting = 100\nlive_per_user = 0\nstarts_per_minute = 0\n[pool]\nbrowser = 0\n\
                      [providers.oidc]\nparameters = { issuer = 'https://idp.test', client_id = 'vestibule' }\n";

/// A controller; killed with the test.
struct Controller {
    child: Child,
    address: SocketAddr,
}

impl Controller {
    /// Returns when it says that it serves.
    fn start(home: &Utf8Path) -> Self {
        let notify = home.join("notify");
        let systemd = UnixDatagram::bind(&notify).unwrap();
        systemd.set_read_timeout(Some(PATIENCE)).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_vestibule"))
            .args(["--home", home.as_str(), "serve", "--listen", "127.0.0.1:0"])
            .env("NOTIFY_SOCKET", &notify)
            .stdout(Stdio::null())
            .stderr(fs::File::create(home.join("log")).unwrap())
            .spawn()
            .unwrap();
        let mut buffer = [0; 1024];
        let address = loop {
            let count = systemd.recv(&mut buffer).unwrap();
            let said = std::str::from_utf8(&buffer[..count]).unwrap();
            if let Some((_, base)) = said.split_once("STATUS=serving on http://") {
                break base.lines().next().unwrap().parse().unwrap();
            }
        };
        Self { child, address }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn open(&self) -> u64 {
        let dir = format!("/proc/{}/fd", self.child.id());
        fs::read_dir(dir).unwrap().count().try_into().unwrap()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// One connection that stays.
struct Person {
    connection: BufReader<TcpStream>,
    token: String,
}

impl Person {
    fn connect(address: SocketAddr, home: &Utf8Path) -> Self {
        let connection = TcpStream::connect(address).unwrap();
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        let token = fs::read_to_string(home.join("token")).unwrap();
        Self {
            connection: BufReader::new(connection),
            token: token.trim().to_owned(),
        }
    }

    /// Status and JSON of the answer.
    fn ask(&mut self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let (token, body) = (&self.token, body.to_string());
        let host = self.connection.get_ref().peer_addr().unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let connection = &mut self.connection;
        connection.get_mut().write_all(request.as_bytes()).unwrap();
        let (mut status, mut length) = (None, 0);
        loop {
            let mut line = String::new();
            connection.read_line(&mut line).unwrap();
            let line = line.trim_end().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(rest) = line.strip_prefix("http/1.1 ") {
                status = rest[..3].parse().ok();
            }
            if let Some(rest) = line.strip_prefix("content-length: ") {
                length = rest.parse().unwrap();
            }
        }
        let mut bytes = vec![0; length];
        connection.read_exact(&mut bytes).unwrap();
        let value = serde_json::from_slice(&bytes).unwrap();
        (status.expect("an answer"), value)
    }

    fn health(&mut self) -> u16 {
        self.ask("GET", "/health", &Value::Null).0
    }

    fn sign_in(&mut self) -> (u16, Value) {
        self.ask("POST", "/api/auth/start", &json!({ "provider": "oidc" }))
    }

    /// How the session ended.
    fn ended(&mut self, id: &str) -> Value {
        let path = format!("/api/auth/session/{id}");
        wait_for("the session's end", || {
            let (status, view) = self.ask("GET", &path, &Value::Null);
            assert!(names_descriptors(status, &view), "{status} {view}");
            (view["state"] == "failed").then_some(view)
        })
    }
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Whether an answer is one, or an error that says what there is none of.
fn names_descriptors(status: u16, body: &Value) -> bool {
    status < 300 || (status == 503 && body.to_string().contains("file descriptor"))
}

#[test]
fn without_descriptors_who_asks_hears_so_and_nothing_ends() {
    let dir = camino_tempfile::tempdir().unwrap();
    let home = dir.path();
    store_image(home, "browser", &["agent", "browser"]).unwrap();
    fs::write(home.join("vestibule.toml"), CONFIG).unwrap();
    let controller = Controller::start(home);
    let connect = || Person::connect(controller.address, home);
    let mut people: Vec<_> = (0..PEOPLE).map(|_| connect()).collect();
    for person in &mut people {
        assert_eq!(person.health(), 200);
    }
    // What a start needs is there, and the first fails for its runner alone.
    let (status, started) = people[0].sign_in();
    assert_eq!(status, 201, "{started}");
    let view = people[0].ended(started["sessionId"].as_str().unwrap());
    assert!(
        !view["failure"].to_string().contains("descriptor"),
        "{view}"
    );

    let limit = controller.open() + SPARE;
    let pid = controller.pid();
    let before = prlimit(
        Some(pid),
        Resource::Nofile,
        Rlimit {
            current: Some(limit),
            maximum: getrlimit(Resource::Nofile).maximum,
        },
    );
    before.unwrap();
    // More than it can take: the others wait in the kernel.
    let strangers: Vec<_> = (0..2 * SPARE)
        .map(|_| TcpStream::connect(controller.address).unwrap())
        .collect();
    wait_for("the last descriptor", || {
        (controller.open() >= limit).then_some(())
    });
    let answers: Vec<_> = thread::scope(|scope| {
        let asking: Vec<_> = people
            .iter_mut()
            .map(|person| scope.spawn(move || (person.sign_in(), person.health())))
            .collect();
        asking
            .into_iter()
            .map(|asked| asked.join().unwrap())
            .collect()
    });
    for ((status, body), health) in &answers {
        assert!(names_descriptors(*status, body), "{status} {body}");
        assert_eq!(*health, 200, "who is connected is served");
    }
    let refused = answers.iter().filter(|((status, _), _)| *status == 503);
    println!("{} of {PEOPLE} refused at once", refused.count());
    for ((_, body), _) in answers.iter().filter(|((status, _), _)| *status == 201) {
        let view = people[0].ended(body["sessionId"].as_str().unwrap());
        assert!(
            view["failure"].to_string().contains("file descriptor"),
            "{view}"
        );
    }
    assert!(controller.open() >= limit, "there were some meanwhile");

    drop(strangers);
    assert_eq!(connect().health(), 200, "who comes anew is served again");
    let (status, started) = connect().sign_in();
    assert_eq!(status, 201, "{started}");
    let view = people[0].ended(started["sessionId"].as_str().unwrap());
    assert!(
        !view["failure"].to_string().contains("descriptor"),
        "{view}"
    );
    kill_process(pid, Signal::TERM).unwrap();
    let mut controller = controller;
    assert!(controller.child.wait().unwrap().success());
    let log = fs::read_to_string(home.join("log")).unwrap();
    assert!(!log.contains("panicked"), "{log}");
    assert!(log.contains("a connection could not be accepted"), "{log}");
}

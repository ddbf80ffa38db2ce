//! A controller as an operator runs it, in a home of its own that shares the built images, and the count of what it must
//! not leave behind.
mod listing;
mod residue;

pub use listing::Listing;
pub use residue::{processes_of, residue};

use crate::{
    api::Api,
    ca::TestCa,
    idp::{self, Idp},
    process::{self, Process, workspace},
    vendor::{self, Vendor},
    wait,
};
use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::Utf8TempDir;
use std::{fmt::Write as _, net::SocketAddr, time::Duration};
use tokio::process::Command;
use vestibule_api::session::SessionView;

/// How long the controller may take until it listens.
const LISTEN: Duration = Duration::from_secs(60);
/// Software emulation on a busy machine: the limit is for hangs, not for slowness.
const BOOT: Duration = Duration::from_secs(540);
/// As they are by default.
const RESTORE: Duration = Duration::from_secs(120);
const LOGIN_START: Duration = Duration::from_secs(120);
/// Where the image `browser-test` has the test's authority.
const CA_IN_GUEST: &str = "/usr/local/share/ca-certificates/vestibule-test-ca.crt";
/// Tools that bring roots of their own, and what adds one; the others trust what the system trusts.
const TRUST_VARIABLES: [(&str, &str); 4] = [
    ("claude", "NODE_EXTRA_CA_CERTS"),
    ("codex", "CODEX_CA_CERTIFICATE"),
    ("gemini", "NODE_EXTRA_CA_CERTS"),
    ("wrangler", "NODE_EXTRA_CA_CERTS"),
];
/// Where a controller listens that nobody has to find again.
const ANYWHERE: &str = "listen = \"127.0.0.1:0\"";
/// Of the home: where the controller and what it starts have their temporary files.
const TMP: &str = "tmp";
/// How long the VMs of ended sessions may take to be gone.
const VMS_END: Duration = Duration::from_secs(60);

/// What VMs run under: `$VESTIBULE_TEST_DRIVER`, else what the controller chooses.
fn driver() -> String {
    std::env::var("VESTIBULE_TEST_DRIVER").unwrap_or_else(|_| String::from("auto"))
}

/// A line of TOML with a VM's processors: `$VESTIBULE_TEST_VCPUS`, else what the image declares.
fn vcpus() -> String {
    std::env::var("VESTIBULE_TEST_VCPUS")
        .map_or_else(|_| String::new(), |vcpus| format!("vcpus = {vcpus}\n"))
}

/// Where the built images are: `$VESTIBULE_TEST_HOME`, else `target/test-home`.
pub fn image_home() -> Utf8PathBuf {
    std::env::var("VESTIBULE_TEST_HOME")
        .map_or_else(|_| workspace().join("target/test-home"), Utf8PathBuf::from)
}

/// The configuration of a stage, as lines of TOML.
#[derive(Clone, Debug)]
pub struct Setting {
    image: String,
    pins: Vec<(String, Option<u16>, SocketAddr)>,
    extra_ca: Vec<Utf8PathBuf>,
    pool: u32,
    snapshots: bool,
    images: Utf8PathBuf,
    runner: Vec<String>,
    crash_at: Option<&'static str>,
    packs: Vec<(&'static str, &'static str)>,
    more: String,
}

impl Setting {
    /// Sessions run in the image with this alias, from its snapshot where it has one. No VM is kept in stock.
    pub fn image(alias: &str) -> Self {
        Self {
            image: alias.to_owned(),
            pins: Vec::new(),
            extra_ca: Vec::new(),
            pool: 0,
            snapshots: true,
            images: image_home(),
            runner: Vec::new(),
            crash_at: None,
            packs: Vec::new(),
            more: String::new(),
        }
    }

    /// The home has no snapshots: VMs boot, and what is saved is the stage's own.
    #[must_use]
    pub fn without_snapshots(mut self) -> Self {
        self.snapshots = false;
        self
    }

    /// Images come from this home instead of the tests'.
    #[must_use]
    pub fn images_of(mut self, home: &Utf8Path) -> Self {
        home.clone_into(&mut self.images);
        self
    }

    /// VMs are run by this program, with these first arguments.
    #[must_use]
    pub fn runner(mut self, words: &[&str]) -> Self {
        self.runner = words.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// The first controller, or every runner that it starts, dies at this point ([`vestibule_api::crash`]); controllers
    /// that come after it and their runners do not.
    #[must_use]
    pub fn crash_at(mut self, point: &'static str) -> Self {
        self.crash_at = Some(point);
        self
    }

    /// There is a provider with this id and this pack.
    #[must_use]
    pub fn pack(mut self, id: &'static str, toml: &'static str) -> Self {
        self.packs.push((id, toml));
        self
    }

    /// The controller keeps so many VMs of the image in stock.
    #[must_use]
    pub fn pool(mut self, vms: u32) -> Self {
        self.pool = vms;
        self
    }

    /// Guests that ask for `host` (and `port`, if given) reach `to`.
    #[must_use]
    pub fn pin(mut self, host: &str, port: Option<u16>, to: SocketAddr) -> Self {
        self.pins.push((host.to_owned(), port, to));
        self
    }

    /// The way out trusts this authority when it speaks TLS itself.
    #[must_use]
    pub fn trust(mut self, ca: &Utf8Path) -> Self {
        self.extra_ca.push(ca.to_owned());
        self
    }

    /// `wrangler` and `oidc` sign in at this identity provider.
    #[must_use]
    pub fn idp(self, idp: &Idp) -> Self {
        let issuer = idp.issuer().as_str().trim_end_matches('/').to_owned();
        let (host, client) = (idp::HOST, idp::CLIENT);
        self.pin(host, None, idp.address()).with(&format!(
            "[providers.wrangler]\nhosts = [\"{host}\"]\nallow_http = true\n\
             env = {{ WRANGLER_AUTH_URL = \"{issuer}/auth\", WRANGLER_TOKEN_URL = \"{issuer}/token\" }}\n\
             [providers.oidc]\nallow_http = true\n\
             parameters = {{ issuer = \"{issuer}\", client_id = \"{client}\" }}\n",
        ))
    }

    /// Guests reach the fake vendor under the names of all vendors; the tools in them trust the authority `ca`, which the
    /// image `browser-test` has.
    #[must_use]
    pub fn vendor(mut self, vendor: &Vendor, ca: &TestCa) -> Self {
        for host in vendor::HOSTS {
            self = self.pin(host, Some(443), vendor.https());
        }
        self = self.trust(ca.path());
        for (provider, variable) in TRUST_VARIABLES {
            self = self.with(&format!(
                "[providers.{provider}.env]\n{variable} = \"{CA_IN_GUEST}\""
            ));
        }
        self
    }

    /// Further TOML: tables only.
    #[must_use]
    pub fn with(mut self, toml: &str) -> Self {
        self.more.push_str(toml);
        self.more.push('\n');
        self
    }

    /// The configuration of a controller.
    pub fn toml(&self) -> String {
        let mut text = format!(
            "{ANYWHERE}\nimage = \"{}\"\nrunner = {:?}\n[vm]\ndriver = \"{}\"\n{}[deadlines]\nboot_s = {}\nrestore_s = {}\nlogin_start_s = {}\n[pool]\n{} = {}\n[egress]\nmode = \"open\"\nextra_ca = {:?}\n",
            self.image,
            self.runner,
            driver(),
            vcpus(),
            wait::patient(BOOT).as_secs(),
            wait::patient(RESTORE).as_secs(),
            wait::patient(LOGIN_START).as_secs(),
            self.image,
            self.pool,
            self.extra_ca.iter().map(|p| p.as_str()).collect::<Vec<_>>(),
        );
        for (host, port, to) in &self.pins {
            let port = port.map_or_else(String::new, |port| format!("port = {port}\n"));
            let _ = write!(
                text,
                "[[egress.pins]]\nhost = \"{host}\"\n{port}to = \"{to}\"\n"
            );
        }
        text.push_str(&self.more);
        text
    }
}

/// A running controller with its home, which is removed with it.
#[derive(Debug)]
pub struct Stage {
    home: Utf8TempDir,
    process: Process,
    api: Api,
}

impl Stage {
    /// Starts `vestibule serve` and waits until it listens.
    ///
    /// # Errors
    /// When the binary or the image is missing, or it does not come up; with the end of its log.
    pub async fn start(setting: &Setting) -> Result<Self> {
        let images = setting.images.clone();
        ensure!(
            images.join("aliases").join(&setting.image).exists(),
            "no image `{}` in `{images}`: `script/test images` builds it",
            setting.image
        );
        let home = camino_tempfile::Builder::new()
            .prefix("vt-")
            .tempdir()
            .context("make a home")?;
        let snapshots = setting.snapshots.then_some("snapshots");
        for shared in ["images", "aliases"].into_iter().chain(snapshots) {
            std::os::unix::fs::symlink(images.join(shared), home.path().join(shared))
                .context("share the images")?;
        }
        for dir in ["providers", TMP] {
            std::fs::create_dir(home.path().join(dir)).context("make a directory of the home")?;
        }
        for (id, pack) in &setting.packs {
            let path = home.path().join(format!("providers/{id}.toml"));
            std::fs::write(path, pack).context("write a provider pack")?;
        }
        configure(home.path(), setting)?;
        Self::serve(home, setting.crash_at).await
    }

    async fn serve(home: Utf8TempDir, crash_at: Option<&str>) -> Result<Self> {
        std::fs::remove_file(home.path().join("address")).ok();
        let log = home.path().join("serve.log");
        let mut command = Command::new(binary()?);
        command
            .arg("--home")
            .arg(home.path())
            .arg("serve")
            .arg("--config")
            .arg(home.path().join("vestibule.toml"))
            // What it and its runners leave there is found, and is nobody else's.
            .env("TMPDIR", home.path().join(TMP))
            .envs(crash_at.map(|point| ("VESTIBULE_CRASH_AT", point)));
        let process = Process::start("vestibule serve", command, &log)?;
        let listening = async {
            let address = process::content(&home.path().join("address"), LISTEN).await?;
            let token = process::content(&home.path().join("token"), LISTEN).await?;
            Api::new(
                address
                    .parse()
                    .with_context(|| format!("understand the address `{address}`"))?,
                &token,
            )
        };
        match listening.await {
            Ok(api) => Ok(Self { home, process, api }),
            Err(err) => Err(err.context(format!("vestibule serve said: {}", tail(&log)))),
        }
    }

    /// The controller's process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// Its API, with the operator's token.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// Its home.
    pub fn home(&self) -> &Utf8Path {
        self.home.path()
    }

    /// Runs `vestibule` with these words on the same home and gives its standard output.
    ///
    /// # Errors
    /// When it fails; with what it said.
    pub async fn vestibule(&self, words: &[&str]) -> Result<Vec<u8>> {
        let output = Command::new(binary()?)
            .arg("--home")
            .arg(self.home.path())
            .args(words)
            .kill_on_drop(true)
            .output()
            .await?;
        if !output.status.success() {
            bail!(
                "`vestibule {}`: {}",
                words.join(" "),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(output.stdout)
    }

    /// Kills the controller without warning and starts it again on the same home.
    ///
    /// # Errors
    /// When it does not come back.
    pub async fn crash_and_restart(self) -> Result<Self> {
        self.process.crash().await?;
        Self::serve(self.home, None).await
    }

    /// [`Stage::crash_and_restart`] at the address that browsers know.
    ///
    /// # Errors
    /// When it does not come back, or somebody has taken the address meanwhile.
    pub async fn crash_and_return(self) -> Result<Self> {
        let path = self.home.path().join("vestibule.toml");
        let text = std::fs::read_to_string(&path).context("read the configuration")?;
        let there = format!("listen = \"{}\"", self.api.address());
        let text = text.replacen(ANYWHERE, &there, 1);
        std::fs::write(&path, text).context("write the configuration")?;
        self.crash_and_restart().await
    }

    /// What the next controller on this home is configured to.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn configure(&self, setting: &Setting) -> Result<()> {
        configure(self.home.path(), setting)
    }

    /// Waits until the controller has died by itself, and starts it again on the same home.
    ///
    /// # Errors
    /// When it lives on, or does not come back.
    pub async fn restart_after_death(mut self, limit: Duration) -> Result<Self> {
        let status = self.process.death(limit).await?;
        ensure!(!status.success(), "the controller ended well: {status}");
        Self::serve(self.home, None).await
    }

    /// Everything of this stage that still runs or lies about, except controller and database.
    pub fn residue(&self) -> Vec<String> {
        residue(self.home.path(), self.process.pid())
    }

    /// [`Stage::end`] for a controller that keeps VMs in stock, which outlive it: another one, which keeps none, ends them.
    ///
    /// # Errors
    /// As [`Stage::start`] and [`Stage::end`].
    pub async fn end_with_stock(self, setting: &Setting) -> Result<()> {
        let none = Setting {
            pool: 0,
            ..setting.clone()
        };
        self.configure(&none)?;
        self.crash_and_restart().await?.end().await
    }

    /// Cancels what still runs, waits until its VMs are gone, and ends the controller: runners outlive it, and would
    /// write their evidence into a home that is no longer there.
    ///
    /// # Errors
    /// When it does not end, or not with success.
    pub async fn end(self) -> Result<()> {
        let sessions: Vec<SessionView> = self.api.get("/api/sessions").await?;
        for session in sessions
            .iter()
            .filter(|session| !session.state.is_terminal())
        {
            self.api.cancel(session.session_id).await?;
        }
        let gone = wait::until("the end of every VM", VMS_END, || {
            let left = self.residue();
            std::future::ready(if left.is_empty() { Ok(()) } else { Err(left) })
        })
        .await;
        let status = self.process.end().await?;
        ensure!(status.success(), "vestibule serve ended with {status}");
        gone
    }

    /// Keeps evidence and logs of a failed test under `target/evidence/<test>`.
    pub fn keep(&self, test: &str) -> Utf8PathBuf {
        let to = workspace().join("target/evidence").join(test);
        std::fs::create_dir_all(&to).ok();
        for name in ["serve.log", "evidence"] {
            let from = self.home.path().join(name);
            // A test that failed reports its own error; evidence that cannot be kept must not hide it.
            let copied = std::process::Command::new("cp")
                .arg("-a")
                .arg(&from)
                .arg(&to)
                .status();
            if !copied.is_ok_and(|status| status.success()) {
                tracing::warn!(%from, "not kept");
            }
        }
        to
    }
}

/// The program under test: `$VESTIBULE_BIN`, else the debug build.
///
/// # Errors
/// When it is not there.
pub fn binary() -> Result<Utf8PathBuf> {
    let path = std::env::var("VESTIBULE_BIN").map_or_else(
        |_| workspace().join("target/debug/vestibule"),
        Utf8PathBuf::from,
    );
    ensure!(
        path.exists(),
        "`{path}` is not built: cargo build -p vestibule"
    );
    Ok(path)
}

fn configure(home: &Utf8Path, setting: &Setting) -> Result<()> {
    std::fs::write(home.join("vestibule.toml"), setting.toml()).context("write the configuration")
}

fn tail(log: &Utf8Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

//! The Debian package where it belongs: on a machine with systemd, which is a VM of the image `tiny` with the package in it. Its
//! sessions have runners without VMs; everything else is what an operator gets.
use super::{alone, guest::Guest, took};
use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::Utf8TempDir;
use std::{
    fs,
    time::{Duration, Instant, SystemTime},
};
use tokio::process::Command;
use vestibule_testkit::{
    process::workspace,
    runner::store_image,
    stage::{binary, image_home},
    wait,
};

/// dpkg, and a service that comes up, under software emulation on a busy machine.
const LONG_S: u32 = 240;
const SOON: Duration = Duration::from_secs(120);
/// Room for the package, unpacked: what the guest writes is memory.
const MEMORY_MIB: u32 = 1024;
/// What an operator makes the unit one with jails by.
const JAILED: &str = "/usr/share/vestibule/vestibule-jailed.conf";
/// Seconds without a sign of life; the unit's own are 30.
const WATCHDOG_S: u32 = 6;

const CONFIGURATION: &str = "image = \"none\"
runner = [\"/opt/vestibule-testkit\", \"runner\", \"--sign-in-ms\", \"0\"]
[pool]
none = 0
[limits]
min_free_mib = 1
[providers.oidc]
allow_http = true
parameters = { issuer = \"http://idp.test\", client_id = \"vestibule\" }
";

async fn run(program: &str, words: &[&str]) -> Result<String> {
    let output = Command::new(program).args(words).output().await?;
    ensure!(
        output.status.success(),
        "{program} {words:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// The newest package, and one that is newer: the same, its version apart. Neither is compressed.
async fn packages(to: &Utf8Path) -> Result<()> {
    let made = workspace().join("target/package");
    let mut found: Vec<(SystemTime, Utf8PathBuf)> = Vec::new();
    for entry in made
        .read_dir_utf8()
        .with_context(|| format!("`{made}`: `script/test package` makes it"))?
    {
        let entry = entry?;
        found.push((entry.metadata()?.modified()?, entry.into_path()));
    }
    let (_, newest) = found.into_iter().max().context("no package is made")?;
    let raw = camino_tempfile::tempdir()?;
    let raw = raw.path().join("raw");
    run(
        "dpkg-deb",
        &["--raw-extract", newest.as_str(), raw.as_str()],
    )
    .await?;
    for name in ["old.deb", "new.deb"] {
        let control = raw.join("DEBIAN/control");
        let text = fs::read_to_string(&control)?;
        let newer = |line: &str| match line.starts_with("Version: ") {
            true => format!("{line}.1\n"),
            false => format!("{line}\n"),
        };
        fs::write(control, text.lines().map(newer).collect::<String>())?;
        let to = to.join(name);
        run(
            "dpkg-deb",
            &[
                "--root-owner-group",
                "-Znone",
                "--build",
                raw.as_str(),
                to.as_str(),
            ],
        )
        .await?;
    }
    Ok(())
}

/// The recipe of such a machine.
async fn recipe() -> Result<Utf8TempDir> {
    let place = camino_tempfile::tempdir()?;
    std::os::unix::fs::symlink(workspace().join("images/tiny"), place.path().join("tiny"))?;
    let recipe = place.path().join("installed");
    let opt = recipe.join("overlay/opt");
    fs::create_dir_all(&opt)?;
    fs::write(
        recipe.join("recipe.toml"),
        "schema = 1\nname = \"installed\"\nbase = \"tiny\"\n",
    )?;
    packages(&opt).await?;
    let testkit = workspace().join("target/debug/vestibule-testkit");
    let to = opt.join("vestibule-testkit");
    run("strip", &["-o", to.as_str(), testkit.as_str()]).await?;
    store_image(
        &recipe.join("overlay/var/lib/vestibule"),
        "none",
        &["agent"],
    )?;
    // A debug build reads them where they were when it was built, by way of its crate.
    for name in [
        "providers",
        "web/dist",
        "crates/vestibule-controller/Cargo.toml",
    ] {
        let from = workspace().join(name);
        let to = recipe.join("overlay").join(from.strip_prefix("/")?);
        fs::create_dir_all(to.parent().unwrap_or(&to))?;
        run("cp", &["-r", from.as_str(), to.as_str()]).await?;
    }
    Ok(place)
}

async fn store(words: &[&str]) -> Result<String> {
    let home = image_home();
    let words: Vec<&str> = ["--home", home.as_str(), "image"]
        .into_iter()
        .chain(words.iter().copied())
        .collect();
    run(binary()?.as_str(), &words).await
}

/// The machine and its service.
struct Installed {
    guest: Guest,
}

impl Installed {
    /// What a script of root's says, if it ends well.
    async fn root(&self, script: &str) -> Result<String> {
        let said = self.guest.root(script, LONG_S).await?;
        Ok(said.trim().to_owned())
    }

    async fn property(&self, name: &str) -> Result<String> {
        self.root(&format!("systemctl show --value -p {name} vestibule"))
            .await
    }

    /// What `vestibule doctor` says in a unit that is like the service in all but what it runs, with a drop-in if there is one.
    async fn doctor(&self, drop_in: Option<&str>) -> Result<serde_json::Value> {
        let drop_in = drop_in.map_or_else(String::new, |path| {
            format!("mkdir $at/asked.service.d && cp {path} $at/asked.service.d/\n")
        });
        let said = self
            .root(&format!(
                "at=/run/systemd/system\n\
                 sed -e 's|^ExecStart=.*|ExecStart=-/usr/bin/vestibule --home /var/lib/vestibule --json doctor|' \
                     -e 's/^Type=.*/Type=oneshot\\nStandardOutput=truncate:\\/run\\/asked.json/' \
                     -e '/^Restart/d; /^WatchdogSec/d; /^NotifyAccess/d' \
                     /lib/systemd/system/vestibule.service >$at/asked.service\n\
                 {drop_in}systemctl daemon-reload && systemctl start asked >&2 && cat /run/asked.json\n\
                 rm -r /run/asked.json $at/asked.service* && systemctl daemon-reload"
            ))
            .await?;
        serde_json::from_str(&said).with_context(|| format!("what it printed: {said}"))
    }

    async fn main_pid(&self) -> Result<u32> {
        Ok(self.property("MainPID").await?.parse()?)
    }

    /// Processes of the service's control group but the controller: runners.
    async fn runners(&self) -> Result<Vec<u32>> {
        let main = self.main_pid().await?;
        let all = self
            .root("cat /sys/fs/cgroup$(systemctl show --value -p ControlGroup vestibule)/cgroup.procs")
            .await?;
        let all: Vec<u32> = all.lines().map(str::parse).collect::<Result<_, _>>()?;
        Ok(all.into_iter().filter(|pid| *pid != main).collect())
    }

    /// The program as its operator runs it.
    async fn vestibule(&self, words: &str) -> Result<serde_json::Value> {
        let said = self
            .root(&format!(
                "runuser -u vestibule -- vestibule --home /var/lib/vestibule --json {words}"
            ))
            .await?;
        serde_json::from_str(&said).with_context(|| format!("what `{words}` printed: {said}"))
    }

    async fn state(&self, session: &str) -> Result<String> {
        let shown = self.vestibule(&format!("session show {session}")).await?;
        Ok(shown["state"].as_str().unwrap_or_default().to_owned())
    }

    async fn becomes(&self, session: &str, wanted: &str) -> Result<()> {
        wait::until(&format!("{session} to be {wanted}"), SOON, || async {
            match self.state(session).await {
                Ok(state) if state == wanted => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await
    }

    /// A sign-in whose person never signs in.
    async fn begin(&self) -> Result<String> {
        let started = self.vestibule("session start oidc").await?;
        let id = started["sessionId"].as_str().context("its id")?.to_owned();
        self.becomes(&id, "awaiting-user").await?;
        Ok(id)
    }

    /// Another controller than `before` is up, and knows the sign-in that goes on with the same runners.
    async fn goes_on(&self, before: u32, session: &str, runners: &[u32]) -> Result<u32> {
        let now = wait::until("another controller", SOON, || async {
            let (state, pid) = (self.property("ActiveState").await, self.main_pid().await);
            match (state.as_deref(), pid) {
                (Ok("active"), Ok(pid)) if pid != before => Ok(pid),
                other => Err(format!("{other:?}")),
            }
        })
        .await?;
        self.becomes(session, "awaiting-user").await?;
        ensure!(self.runners().await? == runners, "its VM is another one");
        Ok(now)
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image tiny and the package; script/test installed"]
async fn under_systemd() -> Result<()> {
    let _alone = alone().await;
    let begin = Instant::now();
    let recipe = recipe().await?;
    let path = recipe.path().join("installed");
    let agent = workspace().join("target/agent/vestibule-agent");
    let image = store(&["build", "--agent", agent.as_str(), path.as_str()]).await?;
    took("an image with the package", begin);
    let lived = life(&image).await;
    // Why it failed comes first: a VM that was left running keeps its image.
    let removed = store(&["rm", &image]).await;
    lived?;
    removed.map(drop)
}

/// The unit as it is lets a VMM confine itself; with the drop-in for jails there is all that root can give.
async fn confinement(host: &Installed) -> Result<()> {
    let said = host.doctor(None).await?;
    ensure!(
        said["confined"]["landlock"].is_number() && said["confined"]["root"] == false,
        "{said}"
    );
    // By it QEMU's own filter is made: without, QEMU knows no `-sandbox`.
    let allowed = host.property("SystemCallFilter").await?;
    ensure!(
        allowed.split_whitespace().any(|name| name == "seccomp"),
        "{allowed}"
    );
    let said = host.doctor(Some(JAILED)).await?;
    let confined = &said["confined"];
    ensure!(
        confined["root"] == true
            && confined["noNamespaces"].is_null()
            && confined["cgroup"]["state"] == "usable"
            && confined["landlock"].is_number(),
        "{said}"
    );
    let left = host
        .root("ls -d /sys/fs/cgroup/vestibule/*/ 2>/dev/null || true")
        .await?;
    ensure!(left.is_empty(), "the probe left {left}");
    let directory = "/run/systemd/system/vestibule.service.d";
    host.root(&format!(
        "cp {JAILED} {directory}/ && systemctl daemon-reload && systemctl start vestibule"
    ))
    .await?;
    let pid = host.main_pid().await?;
    let owner = host
        .root(&format!("stat -c %U /proc/{pid} /var/lib/vestibule"))
        .await?;
    ensure!(owner == "root\nroot", "{owner}");
    host.root(&format!(
        "systemctl stop vestibule && rm {directory}/vestibule-jailed.conf && systemctl daemon-reload"
    ))
    .await?;
    Ok(())
}

async fn life(image: &str) -> Result<()> {
    let place = camino_tempfile::tempdir()?;
    let mut spec = Guest::spec(place.path(), &image_home().join("images").join(image))?;
    spec.memory_mib = MEMORY_MIB;
    let host = Installed {
        guest: Guest::start(&spec).await?,
    };

    let begin = Instant::now();
    let said = host
        .root("dpkg --force-depends --install /opt/old.deb 2>&1")
        .await?;
    took("installed", begin);
    ensure!(said.contains("build and publish an image"), "{said}");
    ensure!(host.property("UnitFileState").await? == "enabled");
    ensure!(host.property("ActiveState").await? == "inactive");
    host.root(&format!(
        "cat >/etc/vestibule/vestibule.toml <<'end'\n{CONFIGURATION}end\n\
         mkdir -p /run/systemd/system/vestibule.service.d\n\
         printf '[Service]\\nWatchdogSec={WATCHDOG_S}\\n' >/run/systemd/system/vestibule.service.d/watchdog.conf\n\
         systemctl daemon-reload"
    ))
    .await?;
    confinement(&host).await?;
    let begin = Instant::now();
    // Returns when the controller has said that it is ready.
    host.root("systemctl start vestibule || { journalctl --no-pager -u vestibule; exit 1; }")
        .await?;
    took("started", begin);
    let first = host.main_pid().await?;
    let status = host
        .root(&format!(
            "cat /proc/{first}/status; id -u vestibule; stat -c %U:%a /var/lib/vestibule"
        ))
        .await?;
    for line in [
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "CapEff:\t0000000000000000",
        "vestibule:700",
    ] {
        ensure!(status.contains(line), "{line} is not in {status}");
    }

    let session = host.begin().await?;
    let runners = host.runners().await?;
    ensure!(!runners.is_empty());
    host.root(&format!("kill -9 {first}")).await?;
    let second = host.goes_on(first, &session, &runners).await?;

    let begin = Instant::now();
    host.root(&format!("kill -STOP {second}")).await?;
    let third = host.goes_on(second, &session, &runners).await?;
    took("a controller that stood still was replaced", begin);
    let log = host
        .root("journalctl --no-pager -o cat -u vestibule")
        .await?;
    ensure!(log.to_lowercase().contains("watchdog timeout"), "{log}");

    let begin = Instant::now();
    host.root("dpkg --force-depends --install /opt/new.deb 2>&1")
        .await?;
    let fourth = host.goes_on(third, &session, &runners).await?;
    took("upgraded", begin);
    ensure!(fourth != third);
    ensure!(
        host.root("cat /etc/vestibule/vestibule.toml").await? == CONFIGURATION.trim(),
        "the operator's configuration is another one"
    );
    host.vestibule(&format!("session cancel {session}")).await?;
    host.becomes(&session, "cancelled").await?;
    wait::until("its VM to be gone", SOON, || async {
        let left = host.runners().await.map_err(|err| format!("{err:#}"))?;
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    })
    .await?;

    host.begin().await?;
    let runners = host.runners().await?;
    host.root("dpkg --remove vestibule 2>&1").await?;
    ensure!(host.property("ActiveState").await? == "inactive");
    for pid in runners {
        wait::until("the last VM to be gone", SOON, || async {
            let there = host.root(&format!("test ! -e /proc/{pid}")).await;
            there.map_err(|err| format!("{err:#}"))
        })
        .await?;
    }
    ensure!(
        host.root("ls /var/lib/vestibule")
            .await?
            .contains("vestibule.db"),
        "its home is gone"
    );
    host.guest.end().await?;
    Ok(())
}

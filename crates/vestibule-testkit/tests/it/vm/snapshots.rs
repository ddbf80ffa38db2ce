//! Snapshots as people take, list and remove them: the program, a real image, and everything that may happen meanwhile.
use super::{alone, guest::Guest, took};
use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::Utf8TempDir;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    fs,
    process::{Output, Stdio},
    time::{Duration, Instant},
};
use tokio::process::{Child, Command};
use vestibule_api::{
    agent::ExecUser,
    client::Runner,
    machine::{MachineView, RestoreSpec},
};
use vestibule_testkit::{
    stage::{binary, image_home},
    wait,
};

/// A boot and a save under software emulation, on a busy machine.
const TAKEN: Duration = Duration::from_secs(300);
/// What is no more than a file or a socket appears within this.
const SOON: Duration = Duration::from_secs(60);

/// A home with the image `tiny`. Its large files are the built image's, everything else is a copy: locks are on copies.
struct Home {
    dir: Utf8TempDir,
    image: String,
}

impl Home {
    fn new() -> Result<Self> {
        let built = image_home()
            .join("aliases/tiny")
            .canonicalize_utf8()
            .context("no image `tiny`: `script/test tiny` builds it")?;
        let home = Self {
            dir: camino_tempfile::tempdir()?,
            image: built.file_name().unwrap_or_default().to_owned(),
        };
        let to = home.image_dir(&home.image);
        fs::create_dir_all(&to)?;
        for entry in built.read_dir_utf8()? {
            let entry = entry?;
            let to = to.join(entry.file_name());
            if entry.path().extension() == Some("json") {
                fs::write(to, fs::read(entry.path())?)?;
            } else {
                std::os::unix::fs::symlink(entry.path(), to)?;
            }
        }
        Ok(home)
    }

    fn image_dir(&self, digest: &str) -> Utf8PathBuf {
        self.dir.path().join("images").join(digest)
    }

    fn snapshots_dir(&self) -> Utf8PathBuf {
        self.dir.path().join("snapshots")
    }

    /// Another image: the same artifacts, another manifest.
    fn image_with(&self, change: impl FnOnce(&mut Value)) -> Result<String> {
        let from = self.image_dir(&self.image);
        let text = fs::read_to_string(from.join("manifest.json"))?;
        let mut manifest: Value = serde_json::from_str(&text)?;
        change(&mut manifest);
        let manifest = serde_json::to_string_pretty(&manifest)?;
        let digest = sha256(manifest.as_bytes());
        let to = self.image_dir(&digest);
        fs::create_dir(&to)?;
        fs::write(to.join("manifest.json"), manifest)?;
        let text = fs::read_to_string(from.join("build.json"))?;
        fs::write(to.join("build.json"), text.replace(&self.image, &digest))?;
        for entry in from.read_dir_utf8()? {
            let entry = entry?;
            if entry.path().extension() != Some("json") {
                std::os::unix::fs::symlink(entry.path(), to.join(entry.file_name()))?;
            }
        }
        Ok(digest)
    }

    /// Another image that is the same but for its name, and as well verified.
    fn second_image(&self) -> Result<String> {
        let digest = self.image_with(|manifest| manifest["recipe"] = "other".into())?;
        let report = fs::read_to_string(self.image_dir(&self.image).join("verification.json"))?;
        fs::write(
            self.image_dir(&digest).join("verification.json"),
            report.replace(&self.image, &digest),
        )?;
        Ok(digest)
    }

    fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(binary()?);
        command
            // What it keeps to be looked at goes with the home.
            .env("TMPDIR", self.dir.path())
            .arg("--home")
            .arg(self.dir.path())
            .args(["--json", "image"])
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        Ok(command)
    }

    async fn run(&self, words: &[&str]) -> Result<Output> {
        let output = tokio::time::timeout(TAKEN, self.command(words)?.output());
        Ok(output.await.with_context(|| format!("{words:?} hangs"))??)
    }

    async fn good(&self, words: &[&str]) -> Result<Value> {
        let output = self.run(words).await?;
        ensure!(output.status.success(), "{words:?}: {}", said(&output));
        if output.stdout.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&output.stdout).with_context(|| format!("what {words:?} printed"))
    }

    /// What it said when it refused.
    async fn refused(&self, words: &[&str]) -> Result<String> {
        let output = self.run(words).await?;
        ensure!(
            output.status.code() == Some(1),
            "{words:?} ended with {}: {}",
            output.status,
            said(&output)
        );
        Ok(said(&output))
    }

    async fn snapshots(&self) -> Result<Vec<Value>> {
        let Value::Array(all) = self.good(&["snapshots"]).await? else {
            bail!("the list is a list");
        };
        Ok(all)
    }

    /// Makes the snapshot of this size one that another version of the runner took.
    fn as_of_another_runner(&self, memory_mib: u64) -> Result<()> {
        for directory in self.snapshots_dir().read_dir_utf8()? {
            let directory = directory?.path().to_owned();
            let file = directory.join("snapshot.json");
            let mut manifest: Value = serde_json::from_slice(&fs::read(&file)?)?;
            if manifest["binding"]["memoryMib"] != memory_mib {
                continue;
            }
            manifest["binding"]["runner"] = "0.0.0".into();
            let text = serde_json::to_vec(&manifest)?;
            fs::write(&file, &text)?;
            fs::rename(&directory, self.snapshots_dir().join(sha256(&text)))?;
        }
        Ok(())
    }

    /// What lies beside the snapshots: what is being taken, and what is left of such.
    fn unfinished(&self) -> Vec<String> {
        let entries = self.snapshots_dir().read_dir_utf8().into_iter().flatten();
        let names = entries.flatten().map(|entry| entry.file_name().to_owned());
        names.filter(|name| name.starts_with('.')).collect()
    }

    /// Of VMs and of snapshots.
    fn nothing_left(&self) -> Result<()> {
        for directory in [self.snapshots_dir(), self.dir.path().join("vms")] {
            let left: Vec<_> = fs::read_dir(&directory)?.flatten().collect();
            ensure!(left.is_empty(), "{left:?}");
        }
        Ok(())
    }

    /// Begins a snapshot; returns when its runner answers, with the runner's process.
    async fn begin(&self, words: &[&str]) -> Result<(Child, u32)> {
        let before = self.unfinished();
        let child = self.command(words)?.spawn()?;
        let directory = wait::until("a snapshot to be begun", SOON, || async {
            let new = |name: &String| !before.contains(name) && !name.ends_with(".log");
            self.unfinished().into_iter().find(new).ok_or(())
        })
        .await?;
        let machine = directory.trim_start_matches(".unfinished-");
        let socket = self.dir.path().join("vms").join(machine);
        let runner = Runner::at(socket.join("runner.sock"));
        let view = wait::until("its runner to answer", SOON, || async {
            let view = runner.get::<MachineView>("/machine").await;
            view.map_err(|err| err.to_string())
        })
        .await?;
        Ok((child, view.runner_pid))
    }
}

fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn field<'a>(value: &'a Value, name: &str) -> Result<&'a str> {
    value[name]
        .as_str()
        .with_context(|| format!("`{name}` of {value}"))
}

fn kill(pid: u32) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("a process id")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// A VM that begins from this snapshot.
async fn restored(home: &Home, dir: &Utf8Path, snapshot: &Value) -> Result<Guest> {
    let mut spec = Guest::spec(dir, &home.image_dir(&home.image))?;
    spec.restore = Some(RestoreSpec {
        id: field(snapshot, "id")?.parse()?,
        dir: field(snapshot, "directory")?.to_owned(),
    });
    Guest::start(&spec).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image tiny; script/test snapshots"]
async fn a_clone_outlives_what_its_image_was_called() -> Result<()> {
    let _alone = alone().await;
    let (home, place) = (Home::new()?, camino_tempfile::tempdir()?);
    let image = home.image.clone();
    // Nobody has verified it: the VM that is saved does.
    fs::remove_file(home.image_dir(&image).join("verification.json"))?;
    let begin = Instant::now();
    home.good(&["publish", "tiny", &image]).await?;
    took("publish with verification and snapshot", begin);
    let verification = home.good(&["inspect", "tiny"]).await?["verification"].take();
    ensure!(verification["green"] == true, "{verification}");
    let snapshots = home.snapshots().await?;
    ensure!(snapshots.len() == 1, "{snapshots:?}");
    let id = field(&snapshots[0], "id")?;
    ensure!(snapshots[0]["aliases"][0] == "tiny" && snapshots[0]["inUse"] == false);
    // There is one that fits: no second is taken.
    home.good(&["publish", "again", &image]).await?;
    ensure!(home.snapshots().await?.len() == 1);

    let begin = Instant::now();
    let guest = restored(&home, place.path(), &snapshots[0]).await?;
    took("restored", begin);
    let shown = guest.view().await?.snapshot_id.context("it is restored")?;
    ensure!(shown.as_str() == id);
    ensure!(home.snapshots().await?[0]["inUse"] == true);
    let refused = home.refused(&["rm-snapshot", &id[..8]]).await?;
    ensure!(refused.contains("in use by a VM"), "{refused}");

    // The aliases go elsewhere, then away altogether; the image is nobody's, and the VM lives.
    let other = home.second_image()?;
    for alias in ["tiny", "again"] {
        home.good(&["publish", "--no-snapshot", alias, &other])
            .await?;
    }
    let gone = home.good(&["gc", "--all"]).await?;
    ensure!(gone["rollbackTargets"][0] == image.as_str(), "{gone}");
    for name in ["tiny", "again"] {
        fs::remove_file(home.dir.path().join("aliases").join(name))?;
    }
    let gone = home.good(&["gc", "--all"]).await?;
    ensure!(gone["inUse"][0] == image.as_str(), "{gone}");
    let refused = home.refused(&["rm", &image]).await?;
    ensure!(refused.contains("in use by a VM"), "{refused}");
    let alive = guest.run(ExecUser::Root, "echo alive", "").await?;
    ensure!(alive == "alive\n", "{alive}");
    guest.end().await?;

    home.good(&["rm", &image]).await?;
    ensure!(home.snapshots().await?.is_empty());
    ensure!(fs::read_dir(home.snapshots_dir())?.count() == 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image tiny; script/test snapshots"]
async fn an_image_that_breaks_its_promise_gets_neither_alias_nor_snapshot() -> Result<()> {
    let _alone = alone().await;
    let home = Home::new()?;
    let promise =
        |manifest: &mut Value| manifest["requiredUnits"] = vec!["promised.service"].into();
    let image = home.image_with(promise)?;
    for _ in 0..2 {
        let refused = home.refused(&["publish", "tiny", &image]).await?;
        ensure!(refused.contains("promised.service"), "{refused}");
    }
    home.nothing_left()?;
    let shown = home.good(&["inspect", &image]).await?;
    ensure!(
        shown["verification"]["green"] == false && shown["aliases"] == Value::Array(Vec::new()),
        "{shown}"
    );
    Ok(())
}

/// Its VM is all that was promised, and the tool that it claims signs nobody in.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image tiny; script/test snapshots"]
async fn an_image_in_which_nobody_can_sign_in_gets_no_alias() -> Result<()> {
    let _alone = alone().await;
    let home = Home::new()?;
    let image = home.image_with(|manifest| {
        manifest["tools"] = json!([{
            "provider": "codex", "package": "none", "version": "1.0.0", "path": "/usr/bin/true",
        }]);
    })?;
    let config = home.dir.path().join("sign-in.toml");
    fs::write(&config, "")?;
    let gate = [
        "publish",
        "tiny",
        &image,
        "--no-snapshot",
        "--sign-in",
        config.as_str(),
    ];
    let begin = Instant::now();
    let refused = home.refused(&gate).await?;
    took("an image refused for its sign-in", begin);
    ensure!(refused.contains("codex"), "{refused}");
    // What was found out is not asked for again, and the gate is not passed by leaving the question out.
    let begin = Instant::now();
    for words in [gate.as_slice(), &gate[..4]] {
        let again = home.refused(words).await?;
        ensure!(again.contains("codex"), "{again}");
    }
    ensure!(begin.elapsed() < SOON, "another VM was booted");
    let shown = home.good(&["inspect", &image]).await?;
    let (report, sign_in) = (&shown["verification"], &shown["verification"]["signIns"][0]);
    ensure!(
        report["green"] == false && shown["aliases"] == json!([]),
        "{shown}"
    );
    ensure!(
        sign_in["state"] == "failed" && sign_in["finding"]["cause"].is_string(),
        "{sign_in}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image tiny; script/test snapshots"]
async fn two_at_once_are_two_sizes_or_one_is_refused() -> Result<()> {
    let _alone = alone().await;
    let home = Home::new()?;
    let image = home.image.clone();
    let (first, _) = home.begin(&["snapshot", &image]).await?;
    let (second, _) = home.begin(&["snapshot", &image, "--memory", "320"]).await?;
    let refused = home.refused(&["snapshot", &image]).await?;
    let holder = format!("process {}", first.id().context("it runs")?);
    ensure!(
        refused.contains("another snapshot of image") && refused.contains(&holder),
        "{refused}"
    );
    // Nothing of theirs is rubbish.
    ensure!(home.good(&["gc"]).await?["unfinishedSnapshots"] == 0);
    for child in [first, second] {
        let output = tokio::time::timeout(TAKEN, child.wait_with_output()).await??;
        ensure!(output.status.success(), "{}", said(&output));
    }
    let sizes: Vec<_> = home
        .snapshots()
        .await?
        .iter()
        .map(|one| one["memoryMib"].as_u64())
        .collect();
    ensure!(
        sizes.contains(&Some(256)) && sizes.contains(&Some(320)),
        "{sizes:?}"
    );
    ensure!(home.unfinished().is_empty());
    // One that no VM begins from here any more is replaced by a newer one of the same size when the image is published.
    home.as_of_another_runner(256)?;
    let published = home.run(&["publish", "tiny", &image]).await?;
    let notes = said(&published);
    ensure!(
        published.status.success() && notes.contains("runner version: the snapshot has 0.0.0"),
        "{notes}"
    );
    // For a day, lest the new one be of no use.
    let gone = home.good(&["gc"]).await?;
    ensure!(gone["snapshots"] == json!([]), "{gone}");
    let gone = home.good(&["gc", "--all"]).await?;
    ensure!(
        gone["snapshots"]
            .as_array()
            .is_some_and(|all| all.len() == 1)
    );
    let left = home.snapshots().await?;
    ensure!(left.len() == 2 && left[0]["memoryMib"] == 256, "{left:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image tiny; script/test snapshots"]
async fn what_a_kill_leaves_goes() -> Result<()> {
    let _alone = alone().await;
    let home = Home::new()?;
    let image = home.image.clone();
    // The runner alone: who started it says so and takes everything away.
    let (child, runner) = home.begin(&["snapshot", &image]).await?;
    kill(runner)?;
    let output = tokio::time::timeout(TAKEN, child.wait_with_output()).await??;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    ensure!(
        said(&output).contains("the runner ended with signal: 9"),
        "{}",
        said(&output)
    );
    home.nothing_left()?;

    // Both, the one who started it first: while the runner lives, its work is not rubbish.
    let (mut child, runner) = home.begin(&["snapshot", &image]).await?;
    child.kill().await?;
    ensure!(home.good(&["gc"]).await?["unfinishedSnapshots"] == 0);
    ensure!(home.unfinished().len() == 2, "{:?}", home.unfinished());
    kill(runner)?;
    wait::until("the killed runner's lock to be free", SOON, || async {
        let gone = home.good(&["gc"]).await.map_err(|err| format!("{err:#}"))?;
        (gone["unfinishedSnapshots"] == 1)
            .then_some(())
            .ok_or_else(|| gone.to_string())
    })
    .await?;
    home.nothing_left()
}

/// A file system of so many bytes below a home. Needs root.
struct Small(Utf8PathBuf);

impl Small {
    fn new(at: Utf8PathBuf, bytes: u64) -> Result<Self> {
        fs::create_dir_all(&at)?;
        let options = std::ffi::CString::new(format!("size={bytes}"))?;
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount(
            "tmpfs",
            at.as_std_path(),
            "tmpfs",
            flags,
            options.as_c_str(),
        )
        .context("mount a tmpfs, as root")?;
        Ok(Self(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        rustix::mount::unmount(self.0.as_std_path(), rustix::mount::UnmountFlags::DETACH).ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image tiny, and root for a small file system; script/test snapshots"]
async fn a_full_disk_is_said_and_does_not_undo_a_publish() -> Result<()> {
    let _alone = alone().await;
    let home = Home::new()?;
    let image = home.image.clone();
    // No room for the memory; then none for the state.
    for bytes in [128 << 20, (256 << 20) + (64 << 10)] {
        let small = Small::new(home.snapshots_dir(), bytes)?;
        let refused = home.refused(&["publish", "tiny", &image]).await?;
        for words in ["tiny is", "host-disk-full", "vestibule image snapshot tiny"] {
            ensure!(refused.contains(words), "{words}: {refused}");
        }
        home.nothing_left()?;
        drop(small);
    }
    // Neither is it the image's fault where nobody had verified that.
    let small = Small::new(home.snapshots_dir(), 128 << 20)?;
    let report = home.image_dir(&image).join("verification.json");
    let kept = fs::read(&report)?;
    fs::remove_file(&report)?;
    let refused = home.refused(&["publish", "other", &image]).await?;
    ensure!(refused.contains("host-disk-full"), "{refused}");
    ensure!(!report.exists(), "it has a verification: {refused}");
    fs::write(&report, kept)?;
    drop(small);
    let images = home.good(&["list"]).await?;
    ensure!(images[0]["aliases"][0] == "tiny" && images[0]["snapshot"].is_null());
    Ok(())
}

//! Controllers, runners and VMMs that die at once, at named points and at random ones: what a sign-in becomes, and that
//! nothing is left.
use anyhow::{Context, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use camino::Utf8Path;
use camino_tempfile::Utf8TempDir;
use hyper::Method;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::time::{Duration, Instant};
use vestibule_api::{
    control::{ContentReply, ContentRequest, VmView},
    crash,
    ids::SessionId,
    session::{CredentialView, SessionState, SessionView},
};
use vestibule_testkit::{
    process::{signal, workspace},
    runner::{secret, store_image},
    stage::{Setting, Stage},
    wait,
};

/// A session is terminal, and nothing of it is left, so long after the controller is back.
const TERMINAL: Duration = Duration::from_secs(10);
/// What follows without a crash, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Lives of an ordinary run with runners without VMs.
const LIVES: u32 = 10;

const PACK: &str = "[providers.oidc]\nallow_http = true\n\
                    parameters = { issuer = \"http://idp.test\", client_id = \"vestibule\" }\n";

/// A home whose only image is one that nothing boots.
fn images() -> Result<Utf8TempDir> {
    let home = camino_tempfile::tempdir()?;
    store_image(home.path(), "none", &["agent"])?;
    Ok(home)
}

/// Sessions get runners without VMs, which take so many milliseconds to come up, to sign in, and to hand over.
fn without_vms(images: &Utf8Path, pace: [&str; 3]) -> Setting {
    let testkit = workspace().join("target/debug/vestibule-testkit");
    let [boot, sign_in, hand_over] = pace;
    Setting::image("none")
        .images_of(images)
        .runner(&[
            testkit.as_str(),
            "runner",
            "--boot-ms",
            boot,
            "--sign-in-ms",
            sign_in,
            "--hand-over-ms",
            hand_over,
        ])
        .with(PACK)
}

/// Waits until the session has ended and nothing of any VM is left on the host or in a row.
async fn over(stage: &Stage, id: SessionId, limit: Duration) -> Result<SessionView> {
    let view = stage
        .api()
        .wait_session(id, "its end", limit, |view| view.state.is_terminal())
        .await?;
    wait::until("nothing left", PATIENCE, || async {
        let mut left = stage.residue();
        match stage.api().get::<Vec<VmView>>("/api/vms").await {
            Ok(vms) => left.extend(vms.iter().map(|vm| format!("row {vm:?}"))),
            Err(err) => left.push(format!("{err:#}")),
        }
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await?;
    Ok(view)
}

/// The credentials in the vault that this session sealed.
async fn sealed_by(stage: &Stage, id: SessionId) -> Result<Vec<CredentialView>> {
    let mut all: Vec<CredentialView> = stage.api().get("/api/credentials").await?;
    all.retain(|credential| credential.session_id == id);
    Ok(all)
}

/// The credential is there exactly where the session completed, and is what the tool wrote.
async fn check_credential(stage: &Stage, view: &SessionView) -> Result<()> {
    if view.state != SessionState::Completed {
        // To discard it is an effect of its own, which may be carried out after the VM is gone.
        let what = format!("nothing sealed by a session that is {}", view.state.id());
        return wait::until(&what, TERMINAL, || async {
            match sealed_by(stage, view.session_id).await {
                Ok(own) if own.is_empty() => Ok(()),
                left => Err(left),
            }
        })
        .await;
    }
    let own = sealed_by(stage, view.session_id).await?;
    ensure!(own.len() == 1, "one credential: {own:?}");
    let path = format!("/api/credentials/{}/content", own[0].credential_id);
    let request = ContentRequest {
        purpose: "test".to_owned(),
    };
    let reply: ContentReply = stage
        .api()
        .call(Method::POST, &path, Some(&request))
        .await?;
    let machine = view.machine_id.context("it had a VM")?;
    let wrote = BASE64.encode(secret(machine));
    ensure!(reply.files[0].content == wrote, "what the tool wrote");
    Ok(())
}

/// The vault is whole: every line follows, and every record is what its line says.
async fn check_vault(stage: &Stage) -> Result<()> {
    stage.vestibule(&["audit", "verify"]).await?;
    let records = stage.home().join("vault/records");
    for entry in records.read_dir_utf8()? {
        let entry = entry?;
        ensure!(!entry.file_name().contains(".new"), "{}", entry.path());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_named_point() -> Result<()> {
    let images = images()?;
    for point in crash::POINTS {
        if *point == "claim:done" {
            // Only a VM of the pool is claimed by its own effect; the simulation comes by there.
            continue;
        }
        killed_at(images.path(), point)
            .await
            .with_context(|| format!("killed at {point}"))?;
    }
    Ok(())
}

async fn killed_at(images: &Utf8Path, point: &'static str) -> Result<()> {
    // What a cancelled session had sealed is discarded: it has to be cancelled while the credential is on its way.
    let cancelled = point.starts_with("discard") || point == "vault:removed";
    let pace = ["20", "20", if cancelled { "1500" } else { "0" }];
    let stage = Stage::start(&without_vms(images, pace).crash_at(point)).await?;
    let id = stage.api().start("oidc", None).await?;
    if cancelled {
        stage
            .api()
            .wait_session(id, "the capture", PATIENCE, |view| {
                view.state == SessionState::Capturing
            })
            .await?;
        stage.api().cancel(id).await?;
    }
    let stage = stage.restart_after_death(PATIENCE).await?;
    let view = over(&stage, id, TERMINAL).await?;
    let expected = if cancelled {
        SessionState::Cancelled
    } else {
        SessionState::Completed
    };
    ensure!(
        view.state == expected,
        "it is {}: {:?}",
        view.state.id(),
        view.failure
    );
    check_credential(&stage, &view).await?;
    check_vault(&stage).await?;
    stage.end().await
}

fn number(name: &str) -> Option<u32> {
    std::env::var(name).ok()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_random() -> Result<()> {
    let images = images()?;
    let setting = without_vms(images.path(), ["60", "60", "60"]);
    let lives = number("VESTIBULE_CRASH_LIVES").unwrap_or(LIVES);
    random_lives(
        &setting,
        lives,
        Duration::from_millis(350),
        &["controller", "runner"],
    )
    .await
}

/// Real VMs of the image tiny: controller, runner or VMM is killed somewhere between start and end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the image tiny; script/test crashes"]
async fn vms_killed_at_random() -> Result<()> {
    let lives = number("VESTIBULE_CRASH_VMS").unwrap_or(3);
    let setting = Setting::image("tiny").with(PACK);
    let victims = ["controller", "runner", "vmm"];
    random_lives(&setting, lives, Duration::from_secs(9), &victims).await
}

#[expect(
    clippy::print_stdout,
    reason = "what a run did is what its reader wants"
)]
async fn random_lives(
    setting: &Setting,
    lives: u32,
    longest: Duration,
    victims: &[&str],
) -> Result<()> {
    let seed = number("VESTIBULE_CRASH_SEED").unwrap_or_else(|| rand::rng().random());
    println!("VESTIBULE_CRASH_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed.into());
    let mut stage = Stage::start(setting).await?;
    let (mut ends, mut slowest) = (std::collections::BTreeMap::new(), Duration::ZERO);
    for life in 0..lives {
        let victim = victims[rng.random_range(0..victims.len())];
        let id = stage.api().start("oidc", None).await?;
        tokio::time::sleep(longest.mul_f64(rng.random())).await;
        stage = kill(stage, victim).await?;
        let begun = Instant::now();
        if victim == "controller" && longest > Duration::from_secs(1) {
            // Its sign-in goes on with the next controller; here its person has had enough.
            stage.api().cancel(id).await?;
        }
        let what = || format!("life {life}, {victim} killed");
        let limit = if victim == "controller" {
            TERMINAL
        } else {
            PATIENCE
        };
        let view = over(&stage, id, limit).await.with_context(what)?;
        slowest = slowest.max(begun.elapsed());
        if setting.toml().contains("vestibule-testkit") {
            check_credential(&stage, &view).await.with_context(what)?;
        }
        *ends
            .entry(format!("{victim}: {}", view.state.id()))
            .or_insert(0) += 1;
    }
    check_vault(&stage).await?;
    println!("{lives} lives: {ends:?}; over after at most {slowest:.1?}");
    stage.end().await
}

/// Kills one of the stage's processes, as far as there is one, and starts the controller again where it was that.
async fn kill(stage: Stage, victim: &str) -> Result<Stage> {
    if victim == "controller" {
        return stage.crash_and_restart().await;
    }
    for line in stage.residue() {
        let mut words = line.split_whitespace();
        let (Some("process"), Some(pid)) = (words.next(), words.next()) else {
            continue;
        };
        let is_vmm = line.contains("qemu") || line.contains("firecracker");
        if is_vmm == (victim == "vmm") {
            signal(pid.parse().ok(), rustix::process::Signal::KILL);
            break;
        }
    }
    Ok(stage)
}

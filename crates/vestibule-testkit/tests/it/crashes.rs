//! Controllers, runners and VMMs that die at once, at named points and at random ones: what a sign-in becomes, and that
//! nothing is left.
mod lives;
mod person;
mod rows;

use anyhow::{Context, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use camino::Utf8Path;
use camino_tempfile::Utf8TempDir;
use hyper::Method;
use lives::Lives;
use person::Person;
use std::time::Duration;
use vestibule_api::{
    control::{ContentReply, ContentRequest, VmView},
    crash,
    ids::SessionId,
    machine::{Disposal, Disposer, MachineState},
    session::{CredentialView, SessionState, SessionView},
};
use vestibule_testkit::{
    process::workspace,
    runner::{store_image, store_snapshot},
    stage::{Listing, Setting, Stage},
    wait,
};

/// A session is terminal, and nothing of it is left, so long after the controller is back.
const TERMINAL: Duration = Duration::from_secs(10);
/// What follows without a crash, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// From a session's start to its tool's question: a boot under software emulation, where the snapshot's VM was killed.
const START: Duration = Duration::from_secs(180);
/// Lives of an ordinary run with runners without VMs.
const LIVES: u32 = 10;
/// And with VMs.
const VMS: u32 = 3;

const PACK: &str = "[providers.oidc]\nallow_http = true\n\
                    parameters = { issuer = \"http://idp.test\", client_id = \"vestibule\" }\n";

/// A home whose only image is one that nothing boots, with a snapshot that nothing restores.
fn images() -> Result<Utf8TempDir> {
    let home = camino_tempfile::tempdir()?;
    let image = store_image(home.path(), "none", &["agent"])?;
    store_snapshot(home.path(), &image)?;
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

/// Waits until the session has ended and nothing of any VM is left on the host or in a row, and no file that was not there
/// before it.
async fn over(
    stage: &Stage,
    id: SessionId,
    limit: Duration,
    before: &Listing,
) -> Result<SessionView> {
    let view = stage
        .api()
        .wait_session(id, "its end", limit, |view| view.state.is_terminal())
        .await?;
    wait::until("nothing left", PATIENCE, || async {
        let mut left = stage.residue();
        left.extend(Listing::of(stage.home()).since(before));
        match rows::unfinished(stage.home()).await {
            Ok(rows) => left.extend(rows),
            Err(err) => left.push(format!("{err:#}")),
        }
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
async fn check_credential(stage: &Stage, view: &SessionView, person: Person) -> Result<()> {
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
    let wrote = BASE64.encode(person.credential(view)?);
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

fn number(name: &str) -> Option<u32> {
    std::env::var(name).ok()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_named_point() -> Result<()> {
    let images = images()?;
    for point in crash::POINTS {
        // What a cancelled session had sealed is discarded: it has to be cancelled while the credential is on its way.
        let pace = ["20", "20", if is_of_discard(point) { "1500" } else { "0" }];
        killed_at(&without_vms(images.path(), pace), point, Person::Absent)
            .await
            .with_context(|| format!("killed at {point}"))?;
    }
    Ok(())
}

/// Passed only where a credential was sealed for a session that is cancelled.
fn is_of_discard(point: &str) -> bool {
    point.starts_with("discard") || point == "vault:removed"
}

/// One sign-in whose controller dies at the point, and what the next controller makes of it.
async fn killed_at(setting: &Setting, point: &'static str, person: Person) -> Result<()> {
    let cancelled = is_of_discard(point);
    let mut setting = setting.clone().crash_at(point);
    if point == "claim:done" {
        // Only a VM of the pool is claimed by an effect of its own.
        setting = setting.pool(1);
    }
    let stage = Stage::start(&setting).await?;
    let before = Listing::of(stage.home());
    if point == "claim:done" {
        stocked(&stage).await?;
        stage.configure(&setting.clone().pool(0))?;
    }
    let id = stage.api().start(person.provider(), None).await?;
    if cancelled {
        stage
            .api()
            .wait_session(id, "the capture", PATIENCE, |view| {
                view.state == SessionState::Capturing
            })
            .await?;
        stage.api().cancel(id).await?;
    }
    // Where the controller dies before anybody can sign in, this fails.
    let signing_in = stage.api().clone();
    let signing_in = tokio::spawn(async move { person.sign_in(&signing_in, id).await });
    let stage = stage.restart_after_death(START + PATIENCE).await?;
    signing_in.abort();
    if !cancelled {
        person.go_on(&stage, id).await?;
    }
    let view = over(&stage, id, TERMINAL, &before).await?;
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
    check_credential(&stage, &view, person).await?;
    check_receipt(&stage, &view)?;
    check_vault(&stage).await?;
    stage.end().await
}

/// A receipt says of a session's VM what there was, and that all of it is gone, whoever was killed. There is none where there was
/// no VM yet: nothing but the controller's own words is left then.
fn check_receipt(stage: &Stage, view: &SessionView) -> Result<Option<Disposal>> {
    let Some(machine) = view.machine_id else {
        return Ok(None);
    };
    let dir = stage.home().join("evidence").join(machine.to_string());
    let mut files: Vec<_> = dir
        .read_dir_utf8()?
        .map(|entry| Ok(entry?.file_name().to_owned()))
        .collect::<Result<_>>()?;
    files.retain(|name| !["session.json", "verdict.json"].contains(&name.as_str()));
    if files.is_empty() {
        return Ok(None);
    }
    let bytes = std::fs::read(dir.join("disposal.json"))
        .with_context(|| format!("no receipt beside {files:?}"))?;
    let receipt: Disposal = serde_json::from_slice(&bytes)?;
    let names_it = receipt.items.iter().any(|item| item.kind == "directory");
    ensure!(receipt.complete && names_it, "{receipt:?}");
    Ok(Some(receipt))
}

/// Waits for the VM of the pool.
async fn stocked(stage: &Stage) -> Result<()> {
    wait::until("a VM in the pool", START, || async {
        let vms = stage.api().get::<Vec<VmView>>("/api/vms").await;
        match vms.map_err(|err| format!("{err:#}"))?.as_slice() {
            [vm] if vm.pooled && vm.state == MachineState::Paused => Ok(()),
            vms => Err(format!("{vms:?}")),
        }
    })
    .await
}

/// Real VMs of the image tiny: the controller dies after the claim of one of the pool, and runners at each point of theirs.
/// With `VESTIBULE_CRASH_POINTS=all`, the controller at all of its points that an uncancelled sign-in passes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the image tiny; script/test crashes"]
async fn vms_killed_at_named_points() -> Result<()> {
    let setting = Setting::image("tiny").pack(person::PROVIDER, person::PACK);
    let all = std::env::var("VESTIBULE_CRASH_POINTS").is_ok_and(|which| which == "all");
    for point in crash::POINTS {
        if *point == "claim:done" || (all && !is_of_discard(point)) {
            killed_at(&setting, point, Person::AtTheTerminal)
                .await
                .with_context(|| format!("killed at {point}"))?;
        }
    }
    for point in crash::RUNNER_POINTS {
        runners_killed_at(&setting, point)
            .await
            .with_context(|| format!("runners killed at {point}"))?;
    }
    Ok(())
}

/// Every runner of one sign-in dies at the point: before its VM is up, the session fails and says so; at the VM's end, the
/// credential is in the vault, the evidence was taken, and the controller ends what the runner did not.
async fn runners_killed_at(setting: &Setting, point: &'static str) -> Result<()> {
    let stage = Stage::start(&setting.clone().crash_at(point)).await?;
    let before = Listing::of(stage.home());
    let person = Person::AtTheTerminal;
    let id = stage.api().start(person.provider(), None).await?;
    let at_its_start = matches!(point, "runner:begin" | "runner:launched");
    if !at_its_start {
        person.sign_in(stage.api(), id).await?;
    }
    let view = over(&stage, id, PATIENCE, &before).await?;
    let evidence = |name: &str| -> Result<bool> {
        let machine = view.machine_id.context("it had a VM")?.to_string();
        Ok(stage
            .home()
            .join("evidence")
            .join(machine)
            .join(name)
            .exists())
    };
    if at_its_start {
        ensure!(view.state == SessionState::Failed, "{view:?}");
        ensure!(view.failure.is_some(), "it says why: {view:?}");
    } else {
        ensure!(view.state == SessionState::Completed, "{view:?}");
        ensure!(evidence("machine.json")?, "the evidence was taken");
    }
    // A runner that lived on would have written its own.
    let receipt = check_receipt(&stage, &view)?;
    ensure!(
        receipt.is_none_or(|receipt| receipt.by == Disposer::Controller),
        "the runner passed the point"
    );
    check_credential(&stage, &view, person).await?;
    check_vault(&stage).await?;
    stage.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_random() -> Result<()> {
    let images = images()?;
    Lives {
        setting: without_vms(images.path(), ["60", "60", "60"]),
        person: Person::Absent,
        longest: Duration::from_millis(350),
        victims: &["controller", "runner"],
    }
    .run(number("VESTIBULE_CRASH_LIVES").unwrap_or(LIVES))
    .await
}

/// Real VMs of the image tiny: controller, runner or VMM is killed somewhere between start and end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the image tiny; script/test crashes"]
async fn vms_killed_at_random() -> Result<()> {
    Lives {
        setting: Setting::image("tiny").pack(person::PROVIDER, person::PACK),
        person: Person::AtTheTerminal,
        longest: Duration::from_secs(6),
        victims: &["controller", "runner", "vmm"],
    }
    .run(number("VESTIBULE_CRASH_VMS").unwrap_or(VMS))
    .await
}

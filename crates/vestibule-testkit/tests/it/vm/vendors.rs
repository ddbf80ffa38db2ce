//! `codex`, `claude` and `gh`, unmodified, in a VM whose way out leads to the fake vendor. The person sees the
//! vendor's page in the VM's Chromium and presses *Allow* or *Deny*.
use super::{END, READY, alone, assert_cause, assert_nothing_left, ended, kept, took};
use anyhow::{Context, Result, ensure};
use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt, time::Instant};
use vestibule_api::{
    cause::Cause,
    session::{Right, SessionEvent, SessionEventKind, SessionState, SessionView, StartKind},
};
use vestibule_testkit::{
    ca::TestCa,
    person::Person,
    process::workspace,
    stage::{Setting, Stage, image_home},
    vendor::{Misbehave, Vendor},
};

struct Case {
    provider: &'static str,
    how: Misbehave,
    deny: bool,
    /// `None`: the sign-in succeeds.
    cause: Option<Cause>,
}

const fn case(provider: &'static str, how: Misbehave, cause: Option<Cause>) -> Case {
    Case {
        provider,
        how,
        deny: false,
        cause,
    }
}

/// Runs the cases one after the other on one controller, each in a VM that starts like this.
async fn run(name: &str, start: StartKind, cases: &[Case]) -> Result<()> {
    let _alone = alone().await;
    let ca = TestCa::in_dir(&workspace().join("target/test-ca"))?;
    let vendor = Vendor::start(&ca).await?;
    let mut setting = Setting::image("browser-test").vendor(&vendor, &ca);
    if start == StartKind::Cold {
        setting = setting.without_snapshots();
    }
    let stage = Stage::start(&setting).await?;
    let result = async {
        for case in cases {
            sign_in(&stage, &vendor, start, case)
                .await
                .with_context(|| {
                    format!("{} with {:?}, deny {}", case.provider, case.how, case.deny)
                })?;
        }
        Ok(())
    }
    .await;
    kept(name, stage, result).await
}

/// One sign-in after a boot with a tool that waits for its vendor for as long as it takes: `gh` gives up after ten seconds.
pub(crate) async fn codex_after_a_boot() -> Result<()> {
    let cases = [case("codex", Misbehave::Not, None)];
    run("codex-cold", StartKind::Cold, &cases).await
}

async fn sign_in(stage: &Stage, vendor: &Vendor, start: StartKind, case: &Case) -> Result<()> {
    let begin = Instant::now();
    vendor.misbehave(case.how);
    let before = vendor.issued().len();
    let api = stage.api();
    let id = api.start(case.provider, None).await?;
    api.wait_session(id, "a tool that waits for the person", READY, |view| {
        view.state == SessionState::AwaitingUser
    })
    .await?;
    took(
        &format!("{} connect to view ({start:?})", case.provider),
        begin,
    );
    let (rfb, _closed) = api.view(id, Right::Control).await?;
    let pictures = workspace().join(format!(
        "target/e2e/vendors/{}-{:?}",
        case.provider, case.how
    ));
    let mut person = Person::at(&rfb, pictures);
    let decides = async {
        if case.provider == "gh" {
            let view = api
                .wait_session(id, "the user code", READY, |view| view.user_code.is_some())
                .await?;
            person
                .enter_code(&view.user_code.unwrap_or_default())
                .await?;
        }
        if case.deny {
            person.deny().await
        } else {
            person.allow().await
        }
    };
    // A sign-in that has ended shows no page; its own words say more than that none came.
    let over = api.wait_session(id, "its end", READY, |view| view.state.is_terminal());
    tokio::select! {
        decided = decides => decided?,
        view = over => {
            let view = view?;
            let meant = case.cause.is_some() || view.state == SessionState::Completed;
            ensure!(meant, "it is {}: {:?}", view.state.id(), view.failure);
        }
    }
    let view = ended(stage, id).await?;
    let all = |event: &SessionEvent| matches!(event.event, SessionEventKind::State { state } if state.is_terminal());
    let events = api.events(id, 0, END, all).await?;
    let started = events.iter().find_map(|event| {
        if let SessionEventKind::Claimed { start, .. } = event.event {
            Some(start)
        } else {
            None
        }
    });
    ensure!(started == Some(start), "it started by {started:?}");
    match case.cause {
        Some(cause) => assert_cause(&view, cause)?,
        None => {
            ensure!(
                view.state == SessionState::Completed,
                "{}: {:?}",
                view.state.id(),
                view.failure
            );
            captured(stage, vendor, before, case.provider, &view).await?;
        }
    }
    assert_nothing_left(stage).await?;
    took(&format!("{} {:?} in all", case.provider, case.how), begin);
    Ok(())
}

/// What `vestibule credential get` writes holds exactly the tokens that the vendor issued for this sign-in.
async fn captured(
    stage: &Stage,
    vendor: &Vendor,
    before: usize,
    provider: &str,
    view: &SessionView,
) -> Result<()> {
    let issued = vendor.issued();
    ensure!(
        issued.len() == before + 1,
        "the vendor issued {} times",
        issued.len() - before
    );
    let issued = &issued[before];
    let id = view
        .credential_id
        .context("a completed session has a credential")?
        .to_string();
    let into = stage.home().join("restored").join(provider);
    fs::create_dir_all(&into)?;
    stage
        .vestibule(&["credential", "get", &id, "--into", into.as_str()])
        .await?;
    let (path, pkce) = match provider {
        "codex" => (".codex/auth.json", true),
        _ => (".config/gh/hosts.yml", false),
    };
    let file = into.join(path);
    let text = fs::read_to_string(&file).with_context(|| format!("read the restored `{path}`"))?;
    // An access token of codex is a JWT that carries the issued one as its id.
    ensure!(
        provider == "codex" || text.contains(&issued.access_token),
        "`{path}` holds another access token"
    );
    ensure!(
        text.contains(&issued.refresh_token),
        "`{path}` holds another refresh token"
    );
    ensure!(issued.pkce == pkce, "PKCE: {}", issued.pkce);
    ensure!(
        fs::metadata(&file)?.permissions().mode() & 0o777 == 0o600,
        "the mode of `{path}`"
    );
    let account = if provider == "gh" {
        "alice"
    } else {
        "alice@example.test"
    };
    ensure!(
        view.account.as_deref() == Some(account),
        "the account is {:?}",
        view.account
    );
    Ok(())
}

/// `script/test images` publishes the image with `--sign-in`: its verification holds a completed sign-in with each pack that
/// the manifest claims, `claude` and `gemini` among them.
#[test]
#[ignore = "needs the image browser-test; script/test vendors"]
fn the_image_was_published_with_a_sign_in_of_each_pack() -> Result<()> {
    let image = image_home().join("aliases/browser-test");
    let read = |name: &str| -> Result<serde_json::Value> {
        let bytes = fs::read(image.join(name)).with_context(|| format!("read its `{name}`"))?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    let (manifest, report) = (read("manifest.json")?, read("verification.json")?);
    let providers = |list: &serde_json::Value| -> BTreeSet<String> {
        let all = list.as_array().into_iter().flatten();
        all.filter_map(|one| Some(one["provider"].as_str()?.to_owned()))
            .collect()
    };
    let claimed = providers(&manifest["tools"]);
    ensure!(claimed.len() == 5, "the image claims {claimed:?}");
    ensure!(
        providers(&report["signIns"]) == claimed,
        "signed in: {}",
        report["signIns"]
    );
    for sign_in in report["signIns"].as_array().into_iter().flatten() {
        ensure!(sign_in["state"] == "completed", "{sign_in}");
    }
    ensure!(report["green"] == true, "it is not green");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image browser-test; script/test vendors"]
async fn codex_signs_in_and_names_each_cause() -> Result<()> {
    let cases = [
        case("codex", Misbehave::Not, None),
        case("codex", Misbehave::WrongState, Some(Cause::StateMismatch)),
        case(
            "codex",
            Misbehave::VerifierRefused,
            Some(Cause::VerifierRefused),
        ),
        case("codex", Misbehave::CodeExpired, Some(Cause::CodeExpired)),
        Case {
            deny: true,
            ..case("codex", Misbehave::Not, Some(Cause::ConsentDenied))
        },
    ];
    run("codex", StartKind::Restore, &cases).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image browser-test; script/test vendors"]
async fn claude_names_a_silent_token_endpoint() -> Result<()> {
    let cases = [case(
        "claude",
        Misbehave::SlowToken { ms: 600_000 },
        Some(Cause::TokenEndpointFailed),
    )];
    run("claude", StartKind::Restore, &cases).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image browser-test; script/test vendors"]
async fn gh_signs_in_after_a_boot() -> Result<()> {
    let cases = [case("gh", Misbehave::Not, None)];
    run("gh-cold", StartKind::Cold, &cases).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image browser-test; script/test vendors"]
async fn gh_names_a_denied_consent() -> Result<()> {
    let cases = [Case {
        deny: true,
        ..case("gh", Misbehave::Not, Some(Cause::ConsentDenied))
    }];
    run("gh", StartKind::Restore, &cases).await
}

//! Sign-ins as part of an image's verification: each pack that the image claims signs in at a test identity provider that
//! grants by itself, by way of a controller like everyone's, whose home is made for this and removed.
use super::progress::Bars;
use crate::{api::Controller, home::Home, output};
use anyhow::{Context as _, ensure};
use camino::Utf8Path;
use hyper::Method;
use std::{
    collections::BTreeSet,
    os::unix::fs::symlink,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;
use vestibule_api::{
    control::VmView,
    ids::{AliasName, ImageDigest, ProviderId},
    session::{SessionEventKind, SessionView, StartReply, StartRequest},
};
use vestibule_controller::Config;
use vestibule_image::{Event, Phase, Progress as _, SignIn, Store};

/// The alias of the image in the controller's home.
const CANDIDATE: &str = "candidate";
/// Seconds until one sign-in has failed: nobody is waited for, only programs under emulation.
const SIGN_IN_S: u32 = 300;
/// How long the VM of the last sign-in may take to be gone, and how often is asked.
const VMS_END: Duration = Duration::from_secs(60);
const ASK: Duration = Duration::from_millis(200);

/// Signs in with every pack that the image claims, one after the other. `config` is a controller's configuration: where the
/// packs find the identity provider.
///
/// The home is kept where one of them failed: its VM's evidence is there.
///
/// # Errors
/// When the sign-ins cannot be tried; one that fails is a result.
pub(super) async fn all(
    store: &Store,
    image: &ImageDigest,
    config: &Utf8Path,
    bars: &Bars,
) -> anyhow::Result<Vec<SignIn>> {
    let manifest = store.manifest(image)?;
    let claimed: BTreeSet<&str> = manifest
        .tools
        .iter()
        .map(|tool| tool.provider.as_str())
        .collect();
    ensure!(
        !claimed.is_empty(),
        "image {} claims no provider's tool, so nobody could sign in with it",
        image.short()
    );
    let claimed: Vec<ProviderId> = claimed
        .into_iter()
        .map(|id| {
            id.parse()
                .with_context(|| format!("the manifest's provider `{id}`"))
        })
        .collect::<Result<_, _>>()?;
    let home = camino_tempfile::Builder::new()
        .prefix("vestibule-sign-ins-")
        .tempdir()
        .context("make a home for the sign-ins")?;
    let config = stage(store, image, config, home.path())?;
    let begun = Instant::now();
    let phase = Phase::SignIns;
    bars.event(&Event::PhaseStarted {
        phase,
        index: 1,
        total: 1,
    });
    let (stop, stopped) = oneshot::channel::<()>();
    let (ready, is_ready) = oneshot::channel();
    let serving = tokio::spawn(async move {
        let stopped = async {
            // A dropped sender is a reason to stop, too.
            let _ = stopped.await;
        };
        vestibule_controller::serve(config, stopped, |_| {
            let _ = ready.send(());
        })
        .await
    });
    let results = match is_ready.await {
        Ok(()) => every(&Controller::of(&Home::at(home.path()))?, &claimed, bars).await,
        // It ended before it served; why is what it returned.
        Err(_) => Ok(Vec::new()),
    };
    drop(stop);
    serving
        .await
        .context("run a controller for the sign-ins")?
        .context("run a controller for the sign-ins")?;
    let results = results?;
    bars.event(&Event::PhaseDone {
        phase,
        cached: false,
        took: begun.elapsed(),
    });
    if results.iter().any(|one| !one.completed()) {
        let kept = home.keep();
        output::note(&format!("the evidence of the sign-ins is in `{kept}`"));
    }
    Ok(results)
}

/// A home whose images are the store's and whose only alias is the image's.
fn stage(
    store: &Store,
    image: &ImageDigest,
    config: &Utf8Path,
    home: &Utf8Path,
) -> anyhow::Result<Config> {
    let shared = || -> std::io::Result<()> {
        for name in ["images", "snapshots"] {
            symlink(store.home().join(name), home.join(name))?;
        }
        std::fs::create_dir(home.join("aliases"))?;
        let to = Utf8Path::new("../images").join(image.as_str());
        symlink(to, home.join("aliases").join(CANDIDATE))
    };
    shared().with_context(|| format!("share the store's images with `{home}`"))?;
    let alias: AliasName = CANDIDATE.parse()?;
    let mut config = Config::load(Some(config), home)?;
    config.listen = ([127, 0, 0, 1], 0).into();
    config.image = CANDIDATE.to_owned();
    config.pool = [(alias, 0)].into();
    config.database = "sqlite".to_owned();
    config.deadlines.sign_in_s = config.deadlines.sign_in_s.min(SIGN_IN_S);
    Ok(config)
}

async fn every(
    controller: &Controller,
    claimed: &[ProviderId],
    bars: &Bars,
) -> anyhow::Result<Vec<SignIn>> {
    let mut results = Vec::new();
    for provider in claimed {
        bars.event(&Event::Detail(provider.to_string()));
        results.push(
            one(controller, provider)
                .await
                .with_context(|| format!("sign in with `{provider}`"))?,
        );
    }
    let deadline = Instant::now() + VMS_END;
    loop {
        let left: Vec<VmView> = controller.get("/api/vms").await?;
        if left.is_empty() {
            return Ok(results);
        }
        ensure!(
            Instant::now() < deadline,
            "{} VMs of the sign-ins are not gone after {VMS_END:?}",
            left.len()
        );
        tokio::time::sleep(ASK).await;
    }
}

async fn one(controller: &Controller, provider: &ProviderId) -> anyhow::Result<SignIn> {
    let begun = Instant::now();
    let request = StartRequest {
        provider: provider.clone(),
        user_id: None,
        owner: None,
        flow: None,
        image: None,
        warm: None,
    };
    let started: StartReply = controller
        .call(Method::POST, "/api/auth/start", Some(&request))
        .await?;
    let mut events = controller.events(started.session_id).await?;
    while let Some(event) = events.next().await? {
        if matches!(event.event, SessionEventKind::State { state } if state.is_terminal()) {
            break;
        }
    }
    let path = format!("/api/auth/session/{}", started.session_id);
    let view: SessionView = controller.get(&path).await?;
    Ok(SignIn {
        provider: provider.clone(),
        state: view.state,
        took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        finding: view.failure.and_then(|verdict| verdict.finding),
    })
}

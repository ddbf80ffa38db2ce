//! From *Connect* to a view that somebody can use, as a client of the API sees it: the session's states, the first frame
//! that shows a browser, and the provider's page.
use super::Report;
use crate::{
    idp::Idp,
    stage::{Setting, Stage},
    vendor::FIELD_RGB,
};
use anyhow::{Context, Result};
use std::time::{Duration, Instant};
use vestibule_api::session::{Right, SessionState};

/// Sign-ins, one after another.
const TURNS: usize = 3;
/// A boot under emulation on a busy machine.
const LIMIT: Duration = Duration::from_secs(600);
/// Pixels of the page's field.
const FIELD: usize = 2000;

/// Runs the bench with the image `browser`.
///
/// # Errors
/// When the image is not built, or a sign-in does not come so far.
pub async fn run() -> Result<Report> {
    let mut report = Report::new("connect");
    let idp = Idp::start().await?;
    let stage = Stage::start(&Setting::image("browser").idp(&idp)).await?;
    let (mut ready, mut frame, mut page) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..TURNS {
        let begun = Instant::now();
        let api = stage.api();
        let id = api.start("oidc", None).await?;
        api.wait_session(id, "a sign-in that waits for the person", LIMIT, |view| {
            view.state == SessionState::AwaitingUser
        })
        .await?;
        ready.push(begun.elapsed().as_secs_f64());
        let (rfb, _closed) = api.view(id, Right::Control).await?;
        rfb.wait_for("a frame with something on it", LIMIT, |frame| {
            (frame.commonest().1 < 99).then_some(())
        })
        .await?;
        frame.push(begun.elapsed().as_secs_f64());
        rfb.wait_for_colour("the provider's page", FIELD_RGB, FIELD, LIMIT)
            .await?;
        page.push(begun.elapsed().as_secs_f64());
        drop(rfb);
        api.cancel(id).await?;
        api.wait_session(id, "the end", LIMIT, |view| view.state.is_terminal())
            .await?;
        crate::wait::until("the end of the VM", LIMIT, || {
            let left = stage.residue();
            std::future::ready(if left.is_empty() { Ok(()) } else { Err(left) })
        })
        .await?;
    }
    stage.end().await.context("end the stage")?;
    report.median("Connect to *waiting for you*", "s", &ready);
    report.median("Connect to the first frame at the viewer", "s", &frame);
    report.median("Connect to the provider's page on the screen", "s", &page);
    report.note("provider `oidc`, whose client is the agent: no tool's own start is in it");
    Ok(report)
}

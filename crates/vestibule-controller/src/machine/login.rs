//! Gives the VM to its session and starts the tool in it.
use super::{EffectError, launch::machine_of, refused};
use crate::{
    core::Shared,
    crash::point,
    state::Event,
    store::{Applied, Facts, SessionRow},
};
use hyper::{Method, StatusCode};
use std::time::Duration;
use vestibule_api::{
    agent::{AgentError, LoginRequest},
    cause::Cause,
    client::{self, CallError},
    finding::{Finding, Quote},
    ids::MachineId,
    machine::{Claim, MachineView},
    pack::ProviderPack,
    session::{Milestone, SessionState},
};

/// A runner answers a claim within this time: it lets the CPUs run and sets the clock.
const CLAIM_TIME: Duration = Duration::from_secs(15);

/// Who clicked *Connect* asks for the screen within this time after *ready*, or does not look at it.
const VIEWER_COMES: Duration = Duration::from_millis(400);
/// A viewer's first frame goes out within this time, or is not waited for.
const VIEWER_SEES: Duration = Duration::from_millis(1500);

/// Carries [`crate::state::Effect::StartLogin`] out.
pub(crate) async fn start(core: &Shared, session: &SessionRow) -> Result<(), EffectError> {
    let Some(machine) = machine_of(core, session).await? else {
        return Ok(());
    };
    if session.state != SessionState::Ready {
        return Ok(());
    }
    let event = match request(core, session) {
        Ok(request) => match claim(core, machine.id, &request).await? {
            Ok(_) => {
                point("login:claimed").await;
                // The tool's start takes every CPU of the VM: a person who looks would wait three times as long for the
                // first frame as the tool is now late.
                core.live
                    .first_look(session.id, VIEWER_COMES, VIEWER_SEES)
                    .await;
                let asked = ask(core, machine.id, &request).await?;
                point("login:asked").await;
                asked
            }
            Err(finding) => Err(finding),
        },
        Err(finding) => Err(*finding),
    };
    let (event, facts) = match event {
        Ok(()) => (Event::LoginStarted, Facts::default()),
        Err(finding) => (Event::LoginFailed, Facts::from(finding)),
    };
    let now = core.now();
    let applied = core.store.apply_there(session, event, &facts, now).await?;
    if applied == Applied::Moved(SessionState::AwaitingUser) {
        core.metrics.phase(
            Milestone::LoginStarted,
            machine.start(),
            session.created_at,
            now,
        );
    }
    Ok(())
}

/// Gives the VM to its session and opens its way out. Done twice it is done once. The outer error is one that may pass;
/// the inner one ends the sign-in.
pub(super) async fn claim(
    core: &Shared,
    machine: MachineId,
    login: &LoginRequest,
) -> Result<Result<MachineView, Finding>, EffectError> {
    let claim = Claim {
        session_id: login.session_id,
        egress: core.config.policy(hosts_of(&login.pack, &login.flow)),
    };
    let request = client::json_request(Method::POST, "/claim", Some(&claim))?;
    let runner = core.runner(machine);
    let call = async {
        let reply = runner.open(request).await?;
        client::body("POST /claim", reply).await
    };
    let reply = tokio::time::timeout(CLAIM_TIME, call).await;
    match reply.map_err(|_| EffectError::Timeout(CLAIM_TIME.as_secs()))? {
        Ok(body) => {
            let decode = |err| CallError::Decode {
                what: "POST /claim".to_owned(),
                err,
            };
            Ok(Ok(serde_json::from_slice(&body).map_err(decode)?))
        }
        Err(err) if err.status() == Some(StatusCode::BAD_REQUEST) => Ok(Err(refused(
            Cause::LaunchRefused,
            &err,
            "the runner refused what the session may reach",
            "correct what the quoted reply names in `[egress]` of the configuration or in the pack's hosts",
        ))),
        Err(err) => Err(err.into()),
    }
}

/// The hosts that a flow names, for a way out that is an allow-list.
fn hosts_of(pack: &ProviderPack, flow: &str) -> Vec<String> {
    let Some(flow) = pack.flow.iter().find(|f| f.id == flow) else {
        return Vec::new();
    };
    let urls = flow.url.iter().flat_map(|url| url.hosts.iter());
    let mut hosts: Vec<_> = flow
        .browser
        .allow_hosts
        .iter()
        .chain(urls)
        .cloned()
        .collect();
    hosts.sort();
    hosts.dedup();
    hosts
}

/// What the session's sign-in asks of the agent.
pub(super) fn request(core: &Shared, session: &SessionRow) -> Result<LoginRequest, Box<Finding>> {
    let pack = match core.packs.get(&session.provider) {
        Some(Ok(pack)) => pack.clone(),
        Some(Err(why)) => return Err(Box::new(unusable(&session.provider, why))),
        None => {
            return Err(Box::new(unusable(
                &session.provider,
                "there is no such pack any more".to_owned(),
            )));
        }
    };
    // The tool's time ends a little before the session's, so that the agent's own, better finding arrives.
    let deadline = session
        .login_timeout
        .saturating_sub(Duration::from_secs(5))
        .max(Duration::from_secs(5));
    Ok(LoginRequest {
        session_id: session.id,
        pack,
        flow: session.flow.clone(),
        deadline_s: u32::try_from(deadline.as_secs()).unwrap_or(u32::MAX),
    })
}

fn unusable(provider: &impl std::fmt::Display, why: String) -> Finding {
    let quote = Quote {
        source: "pack".to_owned(),
        line: None,
        text: why,
    };
    Finding::new(
        Cause::PackIncompatible,
        quote,
        format!("the pack `{provider}` can't be used"),
        format!("vestibule provider check {provider}"),
    )
}

/// Asks the agent. The outer error is one that may pass; the inner one ends the sign-in.
async fn ask(
    core: &Shared,
    machine: MachineId,
    login: &LoginRequest,
) -> Result<Result<(), Finding>, EffectError> {
    let request = client::json_request(Method::POST, "/agent/login", Some(login))?;
    let reply = core.runner(machine).open(request).await?;
    match client::body("POST /agent/login", reply).await {
        Ok(_) => Ok(Ok(())),
        // We asked before and did not live to write it down; or the agent's report overtook us.
        Err(err) if err.status() == Some(StatusCode::CONFLICT) => Ok(Ok(())),
        Err(err) if err.status().is_some_and(|status| status.is_client_error()) => {
            Ok(Err(refused(
                cause_of(&err),
                &err,
                "the agent refused to start the tool",
                "read the quoted reply",
            )))
        }
        Err(err) => Err(err.into()),
    }
}

/// The cause that the agent named, else the pack's.
pub(super) fn cause_of(err: &CallError) -> Cause {
    let named = match err {
        CallError::Status { text, .. } => serde_json::from_str::<AgentError>(text)
            .ok()
            .and_then(|e| e.cause),
        CallError::Connect { .. }
        | CallError::Http { .. }
        | CallError::Request { .. }
        | CallError::Body { .. }
        | CallError::Decode { .. } => None,
    };
    named.unwrap_or(Cause::PackIncompatible)
}

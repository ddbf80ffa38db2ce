//! Gives the VM to its session and starts the tool in it.
use super::{EffectError, launch::machine_of, refused};
use crate::{
    core::Shared,
    state::Event,
    store::{Facts, SessionRow},
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
    session::SessionState,
    time::Timestamp,
};

/// Carries [`crate::state::Effect::StartLogin`] out.
pub(crate) async fn start(core: &Shared, session: &SessionRow) -> Result<(), EffectError> {
    let Some(machine) = machine_of(core, session).await? else {
        return Ok(());
    };
    if session.state != SessionState::Ready {
        return Ok(());
    }
    claim(core, session, machine.id).await?;
    let event = match request(core, session) {
        Ok(request) => ask(core, machine.id, &request).await?,
        Err(finding) => Err(*finding),
    };
    let (event, facts) = match event {
        Ok(()) => (Event::LoginStarted, Facts::default()),
        Err(finding) => (
            Event::LoginFailed,
            Facts {
                finding: Some(finding),
                ..Facts::default()
            },
        ),
    };
    core.store
        .apply(session.id, event, &facts, Timestamp::now())
        .await?;
    Ok(())
}

/// A VM that was started for this session has it in its specification; another one is given to it now.
async fn claim(core: &Shared, session: &SessionRow, machine: MachineId) -> Result<(), EffectError> {
    let runner = core.runner(machine);
    let view: MachineView = runner.get("/machine").await?;
    if view.session_id == Some(session.id) {
        return Ok(());
    }
    let claim = Claim {
        session_id: session.id,
        egress: core.config.policy(Vec::new()),
    };
    runner
        .call::<_, serde_json::Value>(Method::POST, "/claim", Some(&claim))
        .await?;
    Ok(())
}

fn request(core: &Shared, session: &SessionRow) -> Result<LoginRequest, Box<Finding>> {
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
fn cause_of(err: &CallError) -> Cause {
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

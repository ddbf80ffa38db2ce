//! Who signs in while things die.
use super::{PATIENCE, START};
use anyhow::{Context, Result, ensure};
use tokio::io::AsyncWriteExt as _;
use vestibule_api::{
    agent::Report,
    ids::SessionId,
    session::{Right, SessionState, SessionView},
};
use vestibule_testkit::{api::Api, runner::secret, stage::Stage, wait};

/// Of the pack below.
pub(super) const PROVIDER: &str = "paste";
/// A tool that every image has: it asks for a code, and what was typed is its credential.
pub(super) const PACK: &str = r#"
schema = 1

[provider]
id = "paste"
name = "Paste"
vendor = "nobody"
homepage = "https://example.test"

[terms]
url = "https://example.test"
note = "None."
handoff = "organisation"

[[flow]]
id = "paste"
title = "Paste a code"
kind = "paste_code"
argv = ["/bin/sh", "-c", "printf 'Code: '; read -r code; printf '{\"code\":\"%s\"}' \"$code\" > .code.json"]
timeout_s = 600

[flow.url]
sources = ["shim"]
hosts = ["idp.test"]

[flow.done]
exit = 0

[[credential]]
id = "code"
path = ".code.json"
format = "json"
required = ["/code"]
"#;

/// How a sign-in gets its person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Person {
    /// The runner without a VM signs in by itself.
    Absent,
    /// Types a code into the terminal of a real VM.
    AtTheTerminal,
}

impl Person {
    /// What they sign in with.
    pub(super) fn provider(self) -> &'static str {
        match self {
            Self::Absent => "oidc",
            Self::AtTheTerminal => PROVIDER,
        }
    }

    /// The file that the tool of this session writes.
    pub(super) fn credential(self, view: &SessionView) -> Result<String> {
        Ok(match self {
            Self::Absent => secret(view.machine_id.context("it had a VM")?),
            Self::AtTheTerminal => format!("{{\"code\":\"{}\"}}", code(view.session_id)),
        })
    }

    /// Waits to be asked, and answers.
    ///
    /// # Errors
    /// When nobody asks, or the session has left its question before.
    pub(super) async fn sign_in(self, api: &Api, id: SessionId) -> Result<()> {
        if self == Self::Absent {
            return Ok(());
        }
        let asked = |view: &SessionView| view.state == SessionState::AwaitingUser;
        api.wait_session(id, "the tool's question", START, asked)
            .await?;
        let terminal = api.open(id, "terminal", Right::Control).await?;
        let (mut terminal, _closed) = terminal.into_stream();
        let line = format!("{}\r", code(id));
        terminal.write_all(line.as_bytes()).await?;
        // Whoever closes the terminal at once may take the line along.
        api.wait_session(id, "the capture", PATIENCE, |view| !asked(view))
            .await
            .map(drop)
    }

    /// The session goes on under this controller: its VM answers, and who had not signed in yet does.
    ///
    /// # Errors
    /// When it does not come to a good end.
    pub(super) async fn go_on(self, stage: &Stage, id: SessionId) -> Result<SessionView> {
        let api = stage.api();
        let beyond = |view: &SessionView| match self {
            Self::Absent => view.state.is_terminal(),
            Self::AtTheTerminal => {
                matches!(
                    view.state,
                    SessionState::AwaitingUser | SessionState::Capturing
                ) || view.state.is_terminal()
            }
        };
        let view = api.wait_session(id, "its sign-in", START, beyond).await?;
        if view.state == SessionState::AwaitingUser {
            answers(api, id, &view).await?;
        }
        if view.state == SessionState::AwaitingUser
            && let Err(err) = self.sign_in(api, id).await
        {
            // They may have typed it before the controller died, and the tool has ended meanwhile.
            let now = api.session(id).await?;
            ensure!(now.state != SessionState::AwaitingUser, "{err:#}");
        }
        api.wait_session(id, "its completion", PATIENCE, |view| {
            view.state == SessionState::Completed
        })
        .await
    }
}

/// The agent in the VM of this session, and its console, are reached through the controller. The session may end meanwhile,
/// of what its person had typed before.
async fn answers(api: &Api, id: SessionId, view: &SessionView) -> Result<()> {
    let vm = format!("/api/vms/{}", view.machine_id.context("it has a VM")?);
    wait::until("an answer of the VM", PATIENCE, || async {
        let report = api.get::<Report>(&format!("{vm}/report")).await;
        let now = api.session(id).await.map_err(|err| format!("{err:#}"))?;
        match report {
            Ok(_) => Ok(()),
            Err(_) if now.state != SessionState::AwaitingUser => Ok(()),
            Err(err) => Err(format!("{err:#}")),
        }
    })
    .await
}

fn code(id: SessionId) -> String {
    format!("code-of-{id}")
}

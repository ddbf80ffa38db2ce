//! One sign-in: the tool in its terminal (or the agent as the OAuth client), the page it wants opened, the files it writes.
//!
//! ```text
//!              ┌─ screen: prompts answered, codes shown, failures recognised, URL as a last resort
//! POST /login ─┼─ shims and hyperlinks: URL ─▶ allow-list ─▶ browser
//!              ├─ files: complete by the pack's rules ─▶ tool ends ─▶ Captured
//!              └─ tool's end, deadline, cancel ─▶ Captured, Failed or Cancelled
//! ```
//! [`driver`] is the one task that changes a sign-in's state; everything else sends to it. The credential stays in memory
//! and leaves only sealed to a key that the host names.
mod callback;
mod driver;
mod failure;
#[cfg(any(test, fuzzing))]
pub(crate) mod hostile;
mod screen;
#[cfg(test)]
mod tests;
pub(crate) mod url;

pub(crate) use failure::observed;

use crate::{
    agent::Agent,
    home::{Home, HomeError},
    process::ProgramError,
    shim::OpenRequest,
    terminal::{TerminalHandle, redact},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, oneshot, watch};
use vestibule_api::{
    agent::{CapturedCredential, LoginEvent, LoginRequest},
    ids::SessionId,
    pack::{Flow, FlowKind},
    secret::{SealError, SealKey, Sealed, Secret},
};

/// Why a sign-in does not begin, or a request about it is not met.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoginError {
    #[error("begin the sign-in: another one is under way")]
    UnderWay,
    #[error("begin the sign-in: the VM belongs to the session {0}")]
    OtherSession(SessionId),
    #[error("begin the sign-in: the pack has no flow `{0}`")]
    NoFlow(String),
    #[error("begin the sign-in: the flow `{0}` lacks what its kind needs")]
    Incomplete(String),
    #[error("begin the sign-in: a pattern of the pack is not a regular expression")]
    Pattern(#[source] regex::Error),
    #[error("begin the sign-in: prepare the home directory")]
    Home(#[source] HomeError),
    #[error("begin the sign-in: write the browser's policy")]
    Policy(#[source] std::io::Error),
    #[error("begin the sign-in: watch the credential files")]
    Watch(#[source] std::io::Error),
    #[error("begin the sign-in: start the tool")]
    Start(#[source] ProgramError),
    #[error("there is no sign-in under way")]
    None,
    #[error("there is no captured credential")]
    NoCredential,
    #[error("seal the credential")]
    Seal(#[source] SealError),
    #[error("seal the credential: encode it")]
    Encode(#[source] serde_json::Error),
    #[error("open the page: {0}")]
    Url(String),
}

/// The agent's sign-ins: one at a time.
#[derive(Debug)]
pub(crate) struct Logins {
    current: Mutex<Current>,
    /// The terminal of the latest sign-in; it stays to be looked at when its tool has ended.
    pub(crate) terminal: watch::Sender<Option<TerminalHandle>>,
}

#[derive(Debug, Default)]
struct Current {
    /// The driver of the sign-in under way.
    driver: Option<mpsc::Sender<Command>>,
    credential: Option<Secret<Vec<u8>>>,
}

/// What others want of the sign-in under way.
#[derive(Debug)]
pub(crate) enum Command {
    /// A tool's opener, through a shim.
    Open(OpenRequest),
    /// The host asks for a page to be opened (again).
    Reopen(OpenRequest),
    /// The browser came back to the OAuth client's callback; answers the page for the person.
    Callback {
        query: String,
        answer: oneshot::Sender<String>,
    },
    Cancel,
}

impl Logins {
    pub(crate) fn new() -> Self {
        Self {
            current: Mutex::new(Current::default()),
            terminal: watch::Sender::new(None),
        }
    }

    /// Begins a sign-in, which then goes on by itself and reports through events.
    ///
    /// # Errors
    /// When one is under way, or the pack and this guest do not fit. A tool that starts and fails is an event instead.
    pub(crate) fn begin(
        &self,
        agent: &Arc<Agent>,
        request: LoginRequest,
    ) -> Result<(), LoginError> {
        let owner = *agent.session.get_or_init(|| request.session_id);
        if owner != request.session_id {
            return Err(LoginError::OtherSession(owner));
        }
        let mut current = self.lock();
        if current
            .driver
            .as_ref()
            .is_some_and(|driver| !driver.is_closed())
        {
            return Err(LoginError::UnderWay);
        }
        let flow = request
            .pack
            .flow
            .iter()
            .find(|flow| flow.id == request.flow)
            .cloned();
        let flow = flow.ok_or_else(|| LoginError::NoFlow(request.flow.clone()))?;
        let (commands, inbox) = mpsc::channel(16);
        let driver = driver::Driver::prepare(agent, &request, flow, inbox)?;
        *current = Current {
            driver: Some(commands),
            credential: None,
        };
        drop(current);
        self.terminal.send_replace(driver.terminal());
        agent.events.login(LoginEvent::Started {
            provider: request.pack.provider.id.clone(),
            flow: request.flow,
            session_id: request.session_id,
        });
        tokio::spawn(Box::pin(driver.run()));
        Ok(())
    }

    /// A page that a tool wants opened; `Err` says in words why it is not.
    pub(crate) async fn open_url(&self, url: String) -> Result<(), String> {
        self.ask(|answer| Command::Open(OpenRequest { url, answer }))
            .await
            .map_err(|err| err.to_string())?
    }

    /// A page of the sign-in that the host wants opened again.
    ///
    /// # Errors
    /// When no sign-in is under way, or the pack does not allow the page.
    pub(crate) async fn reopen(&self, url: String) -> Result<(), LoginError> {
        self.ask(|answer| Command::Reopen(OpenRequest { url, answer }))
            .await?
            .map_err(LoginError::Url)
    }

    /// The redirect that reached the agent; returns the page for the person.
    ///
    /// # Errors
    /// When no sign-in is under way.
    pub(crate) async fn callback(&self, query: String) -> Result<String, LoginError> {
        self.ask(|answer| Command::Callback { query, answer }).await
    }

    /// Ends the sign-in under way.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) async fn cancel(&self) -> Result<(), LoginError> {
        self.driver()?
            .send(Command::Cancel)
            .await
            .map_err(|_| LoginError::None)
    }

    /// The captured credential, sealed to `key`. May be asked for again, with the same or another key.
    ///
    /// # Errors
    /// When nothing is captured, or `key` is not a key.
    pub(crate) fn sealed(&self, key: &SealKey) -> Result<Sealed, LoginError> {
        let current = self.lock();
        let credential = current
            .credential
            .as_ref()
            .ok_or(LoginError::NoCredential)?;
        key.seal(credential.expose()).map_err(LoginError::Seal)
    }

    /// What the terminal showed, without what looks like a secret.
    pub(crate) fn transcript(&self) -> Option<String> {
        let terminal = self.terminal.borrow().clone()?;
        let text = terminal.emulator().transcript();
        Some(redact(&text))
    }

    fn keep(&self, credential: &CapturedCredential) -> Result<(), LoginError> {
        let bytes = serde_json::to_vec(credential).map_err(LoginError::Encode)?;
        self.lock().credential = Some(Secret::new(bytes));
        Ok(())
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, LoginError> {
        let (answer, answered) = oneshot::channel();
        let driver = self.driver()?;
        driver
            .send(command(answer))
            .await
            .map_err(|_| LoginError::None)?;
        answered.await.map_err(|_| LoginError::None)
    }

    fn driver(&self) -> Result<mpsc::Sender<Command>, LoginError> {
        self.lock().driver.clone().ok_or(LoginError::None)
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the files that must exist before the tool starts.
fn prepare_files(home: &Home, flow: &Flow) -> Result<(), HomeError> {
    flow.files
        .iter()
        .try_for_each(|(path, text)| home.write(path, text.as_bytes()))
}

/// Whether the agent itself is the client of this flow.
fn is_own(flow: &Flow) -> bool {
    match flow.kind {
        FlowKind::Oidc => true,
        FlowKind::Loopback
        | FlowKind::Device
        | FlowKind::PasteCode
        | FlowKind::Poll
        | FlowKind::Tui => false,
    }
}

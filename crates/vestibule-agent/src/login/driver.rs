//! The task that carries one sign-in from its start to its end: the only one that decides.
mod pages;

use super::{
    Command, LoginError,
    callback::{self, Callback},
    failure, is_own, prepare_files,
    screen::{Failure, Reader},
};
use crate::{
    agent::Agent,
    browser::{self, BrowserError},
    capture::{Capture, Progress, Watch},
    home::Home,
    oidc::{self, OwnClient, OwnEvent},
    process::{Cgroup, Program},
    terminal::{self, Size, Started, TerminalHandle},
    tool,
};
use bytes::Bytes;
use std::{process::ExitStatus, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};
use vestibule_api::{
    agent::{LoginEvent, LoginRequest, UrlSource},
    error::Chain,
    finding::Finding,
    pack::{Flow, FlowKind, Verify},
};

/// The screen is read when the tool has been quiet for so long: a URL may come in pieces.
const QUIET: Duration = Duration::from_millis(150);
/// And at the latest so long after something was written.
const READ_AT_LATEST: Duration = Duration::from_secs(1);
/// Files are read when nothing has changed for so long.
const SETTLE: Duration = Duration::from_millis(250);
/// A tool that has what it came for gets so long to end by itself.
const LINGER: Duration = Duration::from_secs(15);
/// One that never ends by itself gets so long to write its optional files.
const LINGER_OPTIONAL: Duration = Duration::from_millis(1500);
/// So much of a tool's log is looked at.
const LOG_TAIL: u64 = 64 * 1024;
/// What a tool wrote just before its end is still read for so long.
const DRAIN: Duration = Duration::from_millis(500);
/// How long a tool may take to end when asked.
const GRACE: Duration = Duration::from_secs(3);
/// The pack's own check of the credential.
const VERIFY_LIMIT: Duration = Duration::from_secs(120);
/// Pages that one sign-in may open.
const PAGES: u32 = 24;
/// The terminal of a flow whose pack does not say; watchers may then resize it.
const DEFAULT_SIZE: (u16, u16) = (120, 40);

/// How a sign-in ends.
#[derive(Debug)]
enum End {
    Complete,
    Failed(Box<Finding>),
    Cancelled,
}

#[derive(Debug)]
struct Tool {
    started: Started,
    activity: Option<watch::Receiver<u64>>,
    status: Option<ExitStatus>,
    /// Set when what the tool wrote before its end has been read.
    drained: bool,
}

/// Moments at which something is due.
#[derive(Debug, Default)]
struct Timers {
    read: Option<Instant>,
    read_at_latest: Option<Instant>,
    settle: Option<Instant>,
    fallback: Option<Instant>,
    linger: Option<Instant>,
    drain: Option<Instant>,
    callback: Option<Instant>,
}

/// One sign-in.
#[derive(Debug)]
pub(super) struct Driver {
    agent: Arc<Agent>,
    flow: Flow,
    verify: Option<Verify>,
    deadline_s: u32,
    deadline: Instant,
    inbox: mpsc::Receiver<Command>,
    tool: Option<Tool>,
    own: Option<OwnClient>,
    reader: Reader,
    capture: Capture,
    watch: Watch,
    opening: JoinSet<Result<(), BrowserError>>,
    timers: Timers,
    progress: Progress,
    pages: u32,
    /// Whether a tool that has what it came for has had its time to end, and to write what is optional.
    lingered: bool,
    /// The preferred source that has given a page so far; a later one is then not used.
    source: Option<UrlSource>,
    refused: Option<String>,
    /// Where the tool waits for the redirect, by the page that it opened.
    callback: Option<Callback>,
}

impl Driver {
    /// Gets everything ready and starts the tool.
    pub(super) fn prepare(
        agent: &Arc<Agent>,
        request: &LoginRequest,
        flow: Flow,
        inbox: mpsc::Receiver<Command>,
    ) -> Result<Self, LoginError> {
        let guest = &agent.guest;
        let open_home = || Home::open(&guest.home, guest.person.as_ref()).map_err(LoginError::Home);
        let home = open_home()?;
        prepare_files(&home, &flow).map_err(LoginError::Home)?;
        browser::allow_loopback(guest, &flow.browser.loopback_fetch_origins)
            .map_err(LoginError::Policy)?;
        let capture = Capture::begin(home, request.pack.credential.clone());
        let reader = Reader::new(&flow)?;
        let paths = capture.paths().into_iter().chain(reader.logs().cloned());
        let watch = Watch::on(&guest.home, paths.collect()).map_err(LoginError::Watch)?;
        let (mut tool, mut own) = (None, None);
        if is_own(&flow) {
            let path = request
                .pack
                .credential
                .first()
                .map(|rule| rule.path.clone());
            let (Some(oidc), Some(path)) = (flow.oidc.clone(), path) else {
                return Err(LoginError::Incomplete(flow.id));
            };
            own = Some(oidc::start(
                Arc::clone(agent),
                oidc,
                flow.url.as_ref(),
                path,
                open_home()?,
            ));
        } else {
            tool = Some(start_tool(agent, &flow)?);
        }
        Ok(Self {
            agent: Arc::clone(agent),
            verify: request.pack.verify.clone(),
            deadline_s: request.deadline_s,
            deadline: Instant::now() + Duration::from_secs(request.deadline_s.into()),
            flow,
            inbox,
            tool,
            own,
            reader,
            capture,
            watch,
            opening: JoinSet::new(),
            timers: Timers::default(),
            progress: Progress::default(),
            pages: 0,
            lingered: false,
            source: None,
            refused: None,
            callback: None,
        })
    }

    pub(super) fn terminal(&self) -> Option<TerminalHandle> {
        self.tool.as_ref().map(|tool| tool.started.terminal.clone())
    }

    /// Runs to the end and reports it.
    pub(super) async fn run(mut self) {
        let end = self.watch_over().await;
        let event = match self.wind_up(end).await {
            Ok(captured) => captured,
            Err(End::Failed(mut finding)) => {
                info!(cause = %finding.cause, "the sign-in failed");
                for quote in &mut finding.evidence {
                    quote.text = self.reader.conceal(&quote.text);
                }
                LoginEvent::Failed { finding: *finding }
            }
            Err(End::Cancelled | End::Complete) => LoginEvent::Cancelled,
        };
        // Closed first, so that whoever reads the event may begin another sign-in.
        self.inbox.close();
        self.agent.events.login(event);
    }

    async fn watch_over(&mut self) -> End {
        loop {
            if let Some(end) = self.verdict() {
                return end;
            }
            let due = self.due();
            tokio::select! {
                command = self.inbox.recv() => match command {
                    Some(Command::Cancel) | None => return End::Cancelled,
                    Some(command) => self.command(command).await,
                },
                news = news(&mut self.tool) => match news {
                    News::Wrote => self.heard(true),
                    News::LetGo => self.heard(false),
                    News::Ended(status) => self.tool_ended(status),
                },
                event = own_event(&mut self.own) => if let Some(end) = self.own_event(event) {
                    return end;
                },
                Some(opened) = self.opening.join_next() => if let Some(end) = self.opened(opened) {
                    return end;
                },
                () = self.watch.changed() => self.timers.settle = Some(Instant::now() + SETTLE),
                () = sleep_until(due) => if let Some(end) = self.on_time().await {
                    return end;
                },
            }
        }
    }

    /// Whether what is known decides the sign-in.
    fn verdict(&self) -> Option<End> {
        let complete = self.progress.complete;
        let Some(tool) = &self.tool else {
            return complete.then_some(End::Complete);
        };
        let wants_exit = self.flow.done.exit;
        let Some(status) = tool.status else {
            let done = complete && wants_exit.is_none() && self.lingered && self.screen_says_done();
            return done.then_some(End::Complete);
        };
        if !tool.drained {
            return None;
        }
        let exit_fits = wants_exit.is_none_or(|code| status.code() == Some(code));
        if complete && exit_fits && self.screen_says_done() {
            return Some(End::Complete);
        }
        Some(failed(failure::ended(
            status,
            &self.transcript(),
            self.progress.partial.first(),
        )))
    }

    fn screen_says_done(&self) -> bool {
        self.flow.done.screen_regex.is_none() || self.reader.done(&self.transcript())
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Open(request) => self.shim_asks(request),
            Command::Reopen(request) => {
                let allowed = self.allowed(&request.url);
                if let Ok(url) = &allowed {
                    self.open(url.clone());
                }
                // Who asked may have gone away.
                let _ = request
                    .answer
                    .send(allowed.map(drop).map_err(|err| err.to_string()));
            }
            Command::Callback { query, answer } => match &self.own {
                Some(own) => own.callback(query, answer).await,
                None => drop(answer),
            },
            Command::Cancel => {}
        }
    }

    fn own_event(&mut self, event: Option<OwnEvent>) -> Option<End> {
        match event? {
            OwnEvent::Page(url) => self.take(UrlSource::Oauth, url),
            OwnEvent::CallbackReached => self.agent.events.login(LoginEvent::CallbackReached),
            OwnEvent::Failed(finding) => return Some(End::Failed(finding)),
        }
        None
    }

    fn heard(&mut self, active: bool) {
        if active {
            let now = Instant::now();
            let latest = *self
                .timers
                .read_at_latest
                .get_or_insert(now + READ_AT_LATEST);
            self.timers.read = Some(latest.min(now + QUIET));
        } else if self.timers.drain.is_some() {
            // The last process has let go of the terminal: nothing more will come.
            self.timers.drain = Some(Instant::now());
        }
    }

    fn tool_ended(&mut self, status: ExitStatus) {
        info!(%status, "the tool ended");
        let open = self
            .tool
            .as_ref()
            .is_some_and(|tool| tool.activity.is_some());
        self.timers.drain = Some(Instant::now() + if open { DRAIN } else { Duration::ZERO });
    }

    /// The next moment at which something is due.
    fn due(&self) -> Instant {
        let Timers {
            read,
            read_at_latest: _,
            settle,
            fallback,
            linger,
            drain,
            callback,
        } = self.timers;
        let failure = if self.progress.complete {
            None
        } else {
            self.reader.failure_due()
        };
        [read, settle, fallback, linger, drain, callback, failure]
            .into_iter()
            .flatten()
            .fold(self.deadline, Instant::min)
    }

    async fn on_time(&mut self) -> Option<End> {
        let now = Instant::now();
        let is_due = |timer: &mut Option<Instant>| timer.take_if(|when| *when <= now).is_some();
        let drained = is_due(&mut self.timers.drain);
        if is_due(&mut self.timers.read) || drained {
            self.timers.read_at_latest = None;
            self.read_screen().await;
        }
        if is_due(&mut self.timers.settle) || drained {
            self.look_at_files();
        }
        if let (true, Some(tool)) = (drained, &mut self.tool) {
            tool.drained = true;
        }
        self.lingered |= is_due(&mut self.timers.linger);
        if is_due(&mut self.timers.fallback) {
            self.fall_back();
        }
        if is_due(&mut self.timers.callback) || now >= self.deadline {
            self.look_for_callback(now);
        }
        if let (Some(said), false) = (self.failure(now, drained), self.progress.complete) {
            return Some(failed(failure::said(&said)));
        }
        (now >= self.deadline).then(|| self.too_late())
    }

    /// What the tool says about a failure, on the terminal or in a log.
    fn failure(&mut self, now: Instant, last: bool) -> Option<Failure> {
        let text = self.tool.is_some().then(|| self.transcript())?;
        let home = self.capture.home();
        self.reader
            .failure(&text, |log| home.tail(log, LOG_TAIL), now, last)
    }

    fn look_for_callback(&mut self, now: Instant) {
        if let Some(callback) = &mut self.callback {
            callback.look();
            self.timers.callback = Some(now + callback::LOOK_EVERY);
        }
    }

    fn too_late(&self) -> End {
        if let Some(gone) = self.callback.as_ref().filter(|c| c.is_out_of_reach()) {
            return failed(failure::unreached(gone.port, &self.transcript()));
        }
        let wants_url = self.flow.url.is_some();
        failed(failure::deadline(
            self.deadline_s,
            self.source.is_some(),
            wants_url,
            self.refused.as_deref(),
            &self.transcript(),
        ))
    }

    async fn read_screen(&mut self) {
        let Some(terminal) = self.terminal() else {
            return;
        };
        let (shown, text) = {
            let emulator = terminal.emulator();
            (emulator.screen(), emulator.transcript())
        };
        for (prompt, send) in self.reader.prompts(&shown) {
            terminal.send(Bytes::from(send)).await;
            self.agent.events.login(LoginEvent::Prompted { prompt });
        }
        for code in self.reader.codes(&text) {
            self.agent.events.login(LoginEvent::UserCode { code });
        }
        let (Some(rule), None) = (&self.flow.url, self.source) else {
            return;
        };
        if let (None, Some((preferred, ..))) = (self.timers.fallback, self.candidate()) {
            let wait = if preferred { 0 } else { rule.fallback_after_s };
            self.timers.fallback = Some(Instant::now() + Duration::from_secs(wait.into()));
        }
    }

    fn look_at_files(&mut self) {
        let progress = self.capture.look();
        for (rule, why) in &progress.partial {
            if !self
                .progress
                .partial
                .iter()
                .any(|(known, before)| known == rule && before == why)
            {
                let (rule, why) = (rule.clone(), why.clone());
                self.agent
                    .events
                    .login(LoginEvent::CredentialPartial { rule, why });
            }
        }
        if progress.complete && !self.progress.complete {
            info!("every required credential file is complete");
            let linger = if self.flow.exits {
                LINGER
            } else {
                LINGER_OPTIONAL
            };
            self.timers.linger = Some(Instant::now() + linger);
        }
        self.progress = progress;
    }

    fn transcript(&self) -> String {
        self.terminal()
            .map(|terminal| terminal.emulator().transcript())
            .unwrap_or_default()
    }

    /// Ends the tool with all that it started, and takes the credential when there is one.
    async fn wind_up(&mut self, end: End) -> Result<LoginEvent, End> {
        if let Some(tool) = &mut self.tool {
            tool.started
                .child
                .end(if matches!(end, End::Complete) {
                    GRACE
                } else {
                    DRAIN
                })
                .await;
        }
        let End::Complete = end else { return Err(end) };
        // Read now and not before: until its end the tool may have written the file again.
        let credential = self.capture.collect();
        let credential = credential
            .ok_or_else(|| failed(failure::invalid("the file changed when the tool ended")))?;
        self.verify().await?;
        self.agent
            .login
            .keep(&credential)
            .map_err(|err| failed(failure::invalid(&Chain(&err).to_string())))?;
        Ok(LoginEvent::Captured {
            account: credential.account.clone(),
            expires_at: credential.expires_at,
        })
    }

    /// Asks the tool itself, where the pack says how and no network is needed for it.
    async fn verify(&self) -> Result<(), End> {
        let Some(verify) = self
            .verify
            .as_ref()
            .filter(|verify| verify.offline && self.tool.is_some())
        else {
            return Ok(());
        };
        let program = program(&self.agent, &self.flow, verify.argv.clone());
        match program.run(b"", VERIFY_LIMIT).await {
            Ok(ran) if ran.code == Some(verify.ok_exit) => Ok(()),
            Ok(ran) if ran.timed_out => {
                warn!(
                    "the pack's check of the credential did not end in time; the files stand for themselves"
                );
                Ok(())
            }
            Ok(ran) => {
                let said = format!(
                    "the tool's own check ended with {:?}: {} {}",
                    ran.code,
                    ran.stdout.trim(),
                    ran.stderr.trim()
                );
                Err(failed(failure::invalid(&said)))
            }
            Err(err) => Err(failed(failure::invalid(&Chain(&err).to_string()))),
        }
    }
}

fn failed(finding: Finding) -> End {
    End::Failed(Box::new(finding))
}

fn program(agent: &Agent, flow: &Flow, argv: Vec<String>) -> Program {
    Program {
        argv,
        env: tool::environment(&agent.guest, flow),
        directory: agent.guest.home.clone(),
        user: agent.guest.person.clone(),
    }
}

fn start_tool(agent: &Agent, flow: &Flow) -> Result<Tool, LoginError> {
    let (cols, rows) = (
        flow.cols.unwrap_or(DEFAULT_SIZE.0),
        flow.rows.unwrap_or(DEFAULT_SIZE.1),
    );
    // A full-screen program follows its watcher; a wide terminal for a tool that writes lines stays wide.
    let fixed = flow.cols.is_some() && flow.kind != FlowKind::Tui;
    let program = program(agent, flow, flow.argv.clone());
    let started = terminal::spawn(
        &program,
        Size::clamped(cols, rows),
        fixed,
        Cgroup::make("login"),
    )
    .map_err(LoginError::Start)?;
    Ok(Tool {
        activity: Some(started.terminal.activity()),
        started,
        status: None,
        drained: false,
    })
}

/// What happens at the terminal.
enum News {
    Wrote,
    /// The last process has closed the terminal. Once.
    LetGo,
    /// The tool itself has ended. Once.
    Ended(ExitStatus),
}

async fn news(tool: &mut Option<Tool>) -> News {
    let Some(Tool {
        started,
        activity,
        status,
        ..
    }) = tool
    else {
        return std::future::pending().await;
    };
    let changed = async {
        match activity {
            Some(activity) => activity.changed().await.is_ok(),
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        wrote = changed => if wrote {
            News::Wrote
        } else {
            *activity = None;
            News::LetGo
        },
        exited = started.child.exited(), if status.is_none() => {
            *status = Some(exited);
            News::Ended(exited)
        }
    }
}

async fn own_event(own: &mut Option<OwnClient>) -> Option<OwnEvent> {
    let Some(client) = own else {
        return std::future::pending().await;
    };
    let event = client.next().await;
    if event.is_none() {
        *own = None;
    }
    event
}

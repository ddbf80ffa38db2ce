//! What the agent in the guest says and is asked, on guest port 8080 and on the stream.
//!
//! | route | what |
//! |---|---|
//! | `GET /health` | [`Health`] |
//! | `GET /report` | [`Report`] |
//! | `GET /events?after=N` | NDJSON of [`AgentEventLine`]: those after `N`, then as they happen |
//! | `POST /login` | [`LoginRequest`] → `202`; one login at a time (`409`) |
//! | `POST /login/cancel` | ends the tool and its process group |
//! | `POST /login/credential` | [`CredentialRequest`] → [`CredentialReply`]; repeatable until the VM ends |
//! | `POST /login/url` | [`OpenUrl`]: opens a URL of the flow's hosts in the browser again |
//! | `GET /terminal?right=control\|view` | WebSocket: binary frames are terminal bytes, text frames [`TerminalControl`] |
//! | `GET /login/transcript` | what the terminal showed, as text |
//! | `POST /clock` | [`ClockRequest`] → [`ClockReply`]; the runner only |
//! | `POST /prepare-snapshot` | warms the browser, ends its pages, clears free memory; the runner only, in a VM of no session. When the stream ends after it, the agent begins anew |
//! | `POST /exec` | [`ExecRequest`] → [`ExecReply`] |
//! | `GET /auth/callback` | the generic OAuth client's redirect target (guest loopback only) |
//!
//! From guest loopback the agent serves only `/health`, `/report` and `/auth/callback`; everything else needs the stream.
use crate::{
    cause::Cause,
    finding::Finding,
    ids::{ProviderId, SessionId},
    pack::ProviderPack,
    secret::{SealKey, Sealed},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

/// `GET /health`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// `starting`, `ready` or `degraded`.
    pub status: HealthStatus,
    pub version: String,
    /// SHA-256 of the agent's own binary, hex. The image's manifest declares the same.
    pub build: String,
    /// Version of this API; a host refuses an agent with another one.
    pub api: u32,
    /// `terminal`, `browser`, `display`, `oauth`, `egress`.
    pub capabilities: Vec<String>,
    /// Seconds since the guest's boot, from its monotonic clock.
    pub uptime_ms: u64,
    /// What is not ready yet, in words; empty when ready.
    #[serde(default)]
    pub waiting_for: Vec<String>,
}

/// Version of the API of this module.
pub const AGENT_API: u32 = 3;
/// The agent's port in the guest.
pub const AGENT_PORT: u16 = 8080;
/// Where the egress proxy listens on the guest's loopback.
pub const PROXY_PORT: u16 = 3128;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    Starting,
    Ready,
    Degraded,
}

/// `GET /report`: what a person would look up with `systemctl`, `ss` and `xwininfo`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Report {
    pub at: Option<Timestamp>,
    pub kernel: String,
    pub hostname: String,
    pub machine_id: String,
    pub boot_id: String,
    pub uptime_ms: u64,
    /// Systemd's `SystemState`: `running`, `degraded`, `starting`, …
    pub system_state: String,
    pub units: Vec<UnitReport>,
    pub jobs: Vec<JobReport>,
    pub listeners: Vec<Listener>,
    /// Those that have used the processors most, the busiest first.
    pub processes: Vec<ProcessReport>,
    pub display: Option<DisplayReport>,
    pub memory: MemoryReport,
    /// Parts that could not be read, and why.
    pub missing: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UnitReport {
    pub name: String,
    /// `loaded`, `not-found`, `masked`, …
    pub load: String,
    /// `active`, `failed`, `inactive`, `activating`, …
    pub active: String,
    pub sub: String,
    /// `Result=` of a service: `success`, `exit-code`, `timeout`, …
    #[serde(default)]
    pub result: String,
    #[serde(default)]
    pub main_exit: Option<i32>,
    #[serde(default)]
    pub restarts: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobReport {
    pub id: u32,
    pub unit: String,
    /// `start`, `stop`, …
    pub kind: String,
    /// `waiting` or `running`.
    pub state: String,
    /// Units with a job that this one waits for.
    #[serde(default)]
    pub waits_for: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Listener {
    /// `tcp`, `tcp6` or `unix`.
    pub family: String,
    /// `127.0.0.1:8080`, `[::]:22`, or a path.
    pub address: String,
    #[serde(default)]
    pub process: Option<String>,
}

/// One process, by proc(5). Never its command line: that of a browser holds the page's URL, and a URL a code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProcessReport {
    pub pid: u32,
    pub name: String,
    /// What Chromium started it for: `renderer`, `gpu-process`, `utility`, …
    #[serde(default)]
    pub role: Option<String>,
    /// `R` runs, `S` sleeps, `D` waits for a disk, `Z` has ended.
    pub state: String,
    /// Processor time since it began, its threads' and its own.
    pub cpu_ms: u64,
    pub memory_kib: u64,
    pub threads: u32,
    /// The thread that has used most, and how much.
    #[serde(default)]
    pub busiest_thread: Option<String>,
    #[serde(default)]
    pub busiest_thread_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DisplayReport {
    pub width: u32,
    pub height: u32,
    /// Whether the framebuffer shows something: more than one colour, and the browser's window mapped.
    pub painted: bool,
    pub browser_window: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MemoryReport {
    pub total_kib: u64,
    pub available_kib: u64,
    /// `some avg10` of `/proc/pressure/memory`, per cent; none where the kernel has no PSI.
    pub pressure_avg10: Option<f64>,
}

/// One line of `GET /events`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentEventLine {
    pub seq: u64,
    pub at: Timestamp,
    pub event: AgentEvent,
}

/// What the agent says unasked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase"
)]
pub enum AgentEvent {
    /// A step on the way to ready: `waiting_for` of [`Health`] changed.
    Starting {
        waiting_for: Vec<String>,
    },
    /// The screen is painted and the browser's window is there.
    Painted {
        width: u32,
        height: u32,
    },
    Ready {
        health: Health,
    },
    /// A required unit is not active.
    Unit {
        unit: UnitReport,
    },
    Login {
        event: LoginEvent,
    },
    /// The browser ended and was started again.
    BrowserRestarted,
}

/// Steps of one sign-in. Terminal ones are `Captured` and `Failed`, and after `Cancelled` nothing comes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "step",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase"
)]
pub enum LoginEvent {
    /// The tool runs in its terminal (or, without a tool, the OAuth client is prepared).
    Started {
        provider: ProviderId,
        flow: String,
        session_id: SessionId,
    },
    /// The tool asked for a page to be opened. Only scheme, host and path: the query carries state and challenge.
    UrlCaptured {
        source: UrlSource,
        host: String,
        path: String,
    },
    /// A page was asked for that the pack's allow-list does not name; it was not opened.
    UrlRefused {
        source: UrlSource,
        host: String,
        why: String,
    },
    /// The browser was told to show the page.
    BrowserOpened,
    /// A device code to be compared or typed by the person.
    UserCode {
        code: String,
    },
    /// A prompt of the pack was answered; the index of the prompt.
    Prompted {
        prompt: u32,
    },
    /// The redirect reached the callback (known only where the agent is the OAuth client).
    CallbackReached,
    /// A credential file exists and is not complete yet.
    CredentialPartial {
        rule: String,
        why: String,
    },
    /// Every required file is complete and parsed.
    Captured {
        account: Option<String>,
        expires_at: Option<Timestamp>,
    },
    Failed {
        finding: Finding,
    },
    Cancelled,
}

/// Where an authorization URL was caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum UrlSource {
    /// `$BROWSER`, `xdg-open` and their like.
    Shim,
    /// An OSC 8 hyperlink on the terminal.
    Osc8,
    /// Text on the terminal's screen.
    Screen,
    /// The agent's own OAuth client.
    Oauth,
}

/// `POST /login`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoginRequest {
    pub session_id: SessionId,
    /// The pack, parameters and the operator's overrides already filled in.
    pub pack: ProviderPack,
    /// Id of the flow in the pack.
    pub flow: String,
    /// Seconds until the login fails with [`Cause::Deadline`].
    pub deadline_s: u32,
}

/// `POST /login/credential`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CredentialRequest {
    pub seal_to: SealKey,
}

/// The credential, sealed to the asker's key. Opened, it is the JSON of [`CapturedCredential`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CredentialReply {
    pub sealed: Sealed,
}

/// The content of a [`CredentialReply`]: exactly the bytes that the tool wrote. It exists in memory only; its
/// `Serialize` is there for sealing.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CapturedCredential {
    pub files: Vec<CapturedFile>,
    pub account: Option<String>,
    pub expires_at: Option<Timestamp>,
}

impl std::fmt::Debug for CapturedCredential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "CapturedCredential({} files, [secret])",
            self.files.len()
        )
    }
}

/// One file of a credential.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CapturedFile {
    /// Id of the rule in the pack.
    pub rule: String,
    /// Path relative to the home directory, as the tool expects it where it runs.
    pub path: String,
    /// Permission bits the tool gave it.
    pub mode: u32,
    /// Base64 of the bytes.
    pub content: String,
}

impl std::fmt::Debug for CapturedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CapturedFile({}, [secret])", self.path)
    }
}

impl Drop for CapturedFile {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.content);
    }
}

/// `POST /login/url`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OpenUrl {
    pub url: String,
}

/// Text frames on the terminal's WebSocket, from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
pub enum TerminalControl {
    Resize { cols: u16, rows: u16 },
}

/// `POST /clock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClockRequest {
    /// What time it was when this was asked, in µs since the epoch: a clock that is before that is set to it first. However late it is
    /// read, it is no later than the time.
    #[serde(default)]
    pub at_least_micros: Option<i64>,
    /// Then set the guest's clock forward by so many µs (back, where negative); 0: leave it.
    pub adjust_micros: i64,
    /// [`ClockReply::adjusted`] of the reading by which it is off by so much. Where the clock has been set since, it is left.
    pub adjusted: u64,
}

/// The guest's clock after that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClockReply {
    /// In µs since the epoch.
    pub now_micros: i64,
    /// How often this agent has set it for its host.
    pub adjusted: u64,
}

/// `POST /exec`: for engineers; refused in a VM that belongs to a session.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExecRequest {
    pub argv: Vec<String>,
    /// `root` or the unprivileged user.
    #[serde(default)]
    pub user: ExecUser,
    #[serde(default)]
    pub stdin: String,
    pub timeout_s: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExecUser {
    #[default]
    Root,
    Person,
}

/// What came of it. Output beyond 1 MiB each is cut, and said so.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExecReply {
    #[serde(default)]
    pub code: Option<i32>,
    #[serde(default)]
    pub signal: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub truncated: bool,
    pub timed_out: bool,
}

/// An error of the agent's.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentError {
    pub message: String,
    #[serde(default)]
    pub cause: Option<Cause>,
}

//! What somebody asked for: one sign-in, from *Connect* to a sealed credential.
use crate::{
    egress::EgressReason,
    finding::{Finding, Verdict},
    ids::{CredentialId, ImageDigest, LoginName, MachineId, ProviderId, SessionId, SnapshotId},
    machine::{MachineState, Phase},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

/// States of a session. The last four are terminal; every other one has a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SessionState {
    /// The row exists.
    Requested,
    /// A place for the VM is looked for.
    Placing,
    /// The VM starts.
    Starting,
    /// Agent and screen are ready; the login is about to start.
    Ready,
    /// The tool runs and the person is at work.
    AwaitingUser,
    /// The tool wrote a complete credential; its owner has still to say that the account is the right one. Nothing has left
    /// the VM.
    Confirming,
    /// The tool wrote a complete credential; it is being sealed.
    Capturing,
    Completed,
    Failed,
    Cancelled,
    Expired,
}

impl SessionState {
    /// Every state, in order.
    pub const ALL: [Self; 11] = [
        Self::Requested,
        Self::Placing,
        Self::Starting,
        Self::Ready,
        Self::AwaitingUser,
        Self::Confirming,
        Self::Capturing,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Expired,
    ];

    /// Whether nothing can follow.
    pub const fn is_terminal(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Failed | Self::Cancelled | Self::Expired
        )
    }

    /// The id on the wire and in the database.
    pub const fn id(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Placing => "placing",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::AwaitingUser => "awaiting-user",
            Self::Confirming => "confirming",
            Self::Capturing => "capturing",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }

    /// The state with this id.
    pub fn from_id(id: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.id() == id)
    }
}

/// How a session's VM begins, slowest first.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum StartKind {
    /// It boots.
    Cold,
    /// It is restored from a memory snapshot when the session gets its place.
    Restore,
    /// It was restored before, and kept paused for whoever comes next.
    Pool,
}

impl StartKind {
    /// Every kind, in order.
    pub const ALL: [Self; 3] = [Self::Cold, Self::Restore, Self::Pool];

    /// The id on the wire, in the database and in metrics.
    pub const fn id(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Restore => "restore",
            Self::Pool => "pool",
        }
    }

    /// The kind with this id.
    pub fn from_id(id: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.id() == id)
    }
}

/// Why a session's VM did not come out of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NotPooled {
    /// Whoever asked for the sign-in wants a boot.
    Asked,
    /// The VM before this one could not be had; the event before says why.
    FellBack,
    /// There is no snapshot of the image for VMs of this size.
    NoSnapshot,
    /// The snapshot was refused not long ago.
    SnapshotRefused,
    /// The snapshot could not be restored not long ago, or VMs that began from it did not become ready.
    SnapshotFailed,
    /// The configuration keeps no VMs of this image in stock.
    NoPool,
    /// No VM was in stock.
    PoolEmpty,
}

impl NotPooled {
    /// For people, after "because".
    pub const fn words(self) -> &'static str {
        match self {
            Self::Asked => "a boot was asked for",
            Self::FellBack => "the one before could not be had",
            Self::NoSnapshot => "the image has no snapshot for VMs of this size",
            Self::SnapshotRefused => "the snapshot was refused not long ago",
            Self::SnapshotFailed => "no VM came up from the snapshot not long ago",
            Self::NoPool => "none of this image are kept in stock",
            Self::PoolEmpty => "none was in stock",
        }
    }
}

/// `POST /api/auth/start`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StartRequest {
    pub provider: ProviderId,
    /// For whom; `local` where nobody is named. A label: whoever asks owns the session. A user asks for themself only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    /// The user to whom the session shall belong, where that is not who asks: they alone view it and confirm its account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<LoginName>,
    /// Id of the pack's flow; none: its first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flow: Option<String>,
    /// Image alias; none: the configured one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// `false`: boot the VM, also where a snapshot of the image or a VM of the pool is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<bool>,
}

/// `201` of `POST /api/auth/start`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct StartReply {
    pub session_id: SessionId,
    pub provider: ProviderId,
    pub state: SessionState,
}

/// `GET /api/auth/session/{id}`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SessionView {
    pub session_id: SessionId,
    pub provider: ProviderId,
    pub flow: String,
    pub user_id: String,
    pub state: SessionState,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    #[serde(default)]
    pub deadline_at: Option<Timestamp>,
    #[serde(default)]
    pub machine_id: Option<MachineId>,
    #[serde(default)]
    pub machine_state: Option<MachineState>,
    #[serde(default)]
    pub image_digest: Option<ImageDigest>,
    /// Whether the alias points to another image by now.
    pub made_from_older_image: bool,
    /// The credential in the vault, once captured. Survives the VM.
    #[serde(default)]
    pub credential_id: Option<CredentialId>,
    #[serde(default)]
    pub account: Option<String>,
    /// A code that the person compares or types.
    #[serde(default)]
    pub user_code: Option<String>,
    /// Why it failed.
    #[serde(default)]
    pub failure: Option<Verdict>,
    /// Whether a view can be opened now.
    pub viewable: bool,
    /// Whether the account has to be confirmed before the credential enters the vault.
    #[serde(default)]
    pub confirm_account: bool,
    /// Who watches now.
    #[serde(default)]
    pub viewers: Vec<ViewerView>,
    /// Whether it is that of whoever asks: only they view it and confirm its account.
    #[serde(default)]
    pub own: bool,
}

/// One event of `GET /api/auth/session/{id}/events`; the SSE `id` is `seq`, its `event` the `type`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SessionEvent {
    /// From 1 in each session, without gaps.
    pub seq: u64,
    pub at: Timestamp,
    pub event: SessionEventKind,
}

/// What a sign-in passes on its way to a view that can be used, in this order; each is timed from the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Milestone {
    /// It has its VM.
    Claimed,
    /// The rest up to *painted* are those of [`Phase`]; a VM that boots is not restored, and one of the pool was started
    /// before it was asked for.
    VmmStarted,
    Restored,
    Resumed,
    KernelOutput,
    StreamUp,
    AgentUp,
    Identity,
    Painted,
    /// The VM is ready.
    Ready,
    /// The tool runs.
    LoginStarted,
    BrowserNavigated,
    /// The first frame went to a viewer.
    FirstFrame,
}

impl Milestone {
    /// Each, in their order.
    pub const ALL: [Self; 13] = [
        Self::Claimed,
        Self::VmmStarted,
        Self::Restored,
        Self::Resumed,
        Self::KernelOutput,
        Self::StreamUp,
        Self::AgentUp,
        Self::Identity,
        Self::Painted,
        Self::Ready,
        Self::LoginStarted,
        Self::BrowserNavigated,
        Self::FirstFrame,
    ];

    /// Its id, in kebab case.
    pub const fn id(self) -> &'static str {
        match self {
            Self::Claimed => "claimed",
            Self::VmmStarted => "vmm-started",
            Self::Restored => "restored",
            Self::Resumed => "resumed",
            Self::KernelOutput => "kernel-output",
            Self::StreamUp => "stream-up",
            Self::AgentUp => "agent-up",
            Self::Identity => "identity",
            Self::Painted => "painted",
            Self::Ready => "ready",
            Self::LoginStarted => "login-started",
            Self::BrowserNavigated => "browser-navigated",
            Self::FirstFrame => "first-frame",
        }
    }

    /// The one that a session passes when it comes into this state.
    pub const fn of_state(state: SessionState) -> Option<Self> {
        match state {
            SessionState::Ready => Some(Self::Ready),
            SessionState::AwaitingUser => Some(Self::LoginStarted),
            SessionState::Requested
            | SessionState::Placing
            | SessionState::Starting
            | SessionState::Confirming
            | SessionState::Capturing
            | SessionState::Completed
            | SessionState::Failed
            | SessionState::Cancelled
            | SessionState::Expired => None,
        }
    }

    /// The one that an event says was passed.
    pub const fn of(event: &SessionEventKind) -> Option<Self> {
        match event {
            SessionEventKind::Claimed { .. } => Some(Self::Claimed),
            SessionEventKind::State { state } => Self::of_state(*state),
            SessionEventKind::Phase { phase } => match phase {
                Phase::VmmStarted => Some(Self::VmmStarted),
                Phase::Restored => Some(Self::Restored),
                Phase::Resumed => Some(Self::Resumed),
                Phase::KernelOutput => Some(Self::KernelOutput),
                Phase::StreamUp => Some(Self::StreamUp),
                Phase::AgentUp => Some(Self::AgentUp),
                Phase::Identity => Some(Self::Identity),
                Phase::Painted => Some(Self::Painted),
                // The session's own state says the last.
                Phase::Ready => None,
            },
            SessionEventKind::BrowserNavigated => Some(Self::BrowserNavigated),
            SessionEventKind::FirstFrame => Some(Self::FirstFrame),
            SessionEventKind::Waiting { .. }
            | SessionEventKind::FellBack { .. }
            | SessionEventKind::UrlOpened { .. }
            | SessionEventKind::UrlRefused { .. }
            | SessionEventKind::UserCode { .. }
            | SessionEventKind::CredentialPartial { .. }
            | SessionEventKind::EgressRefused { .. }
            | SessionEventKind::Viewers { .. }
            | SessionEventKind::ViewerJoined { .. }
            | SessionEventKind::ViewerLeft { .. }
            | SessionEventKind::BrowserRestarted
            | SessionEventKind::Captured { .. }
            | SessionEventKind::Failure { .. } => None,
        }
    }
}

/// What happened in a session, in the words that the timeline shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(
    tag = "type",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase"
)]
pub enum SessionEventKind {
    State {
        state: SessionState,
    },
    /// The VM passed a milestone.
    Phase {
        phase: Phase,
    },
    /// What the start waits for, and since when.
    Waiting {
        // What `rename_all_fields` makes of it; utoipa does not know that attribute.
        #[schema(rename = "waitingFor")]
        waiting_for: Vec<String>,
    },
    /// The session has its VM; `snapshotId` is the snapshot that it began or begins from.
    Claimed {
        start: StartKind,
        #[schema(rename = "snapshotId")]
        snapshot_id: Option<SnapshotId>,
        /// Why it is none of the pool; none: it is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<NotPooled>,
    },
    /// The VM was not ready yet when it failed for this reason; the session gets another one.
    FellBack {
        /// How the VM that failed began.
        from: StartKind,
        /// How the next one begins at most.
        to: StartKind,
        finding: Finding,
    },
    /// The tool asked for this page.
    UrlOpened {
        host: String,
        path: String,
    },
    UrlRefused {
        host: String,
        why: String,
    },
    /// The page was handed to the browser.
    BrowserNavigated,
    UserCode {
        code: String,
    },
    CredentialPartial {
        rule: String,
        why: String,
    },
    EgressRefused {
        host: String,
        port: u16,
        reason: EgressReason,
        count: u64,
    },
    Viewers {
        count: u32,
    },
    /// Somebody began to watch.
    ViewerJoined {
        /// As the ticket names them.
        who: String,
        right: Right,
        pane: Pane,
    },
    ViewerLeft {
        who: String,
        right: Right,
        pane: Pane,
    },
    /// The first frame of the screen went to a viewer.
    FirstFrame,
    /// The browser was closed and started again.
    BrowserRestarted,
    Captured {
        account: Option<String>,
    },
    Failure {
        finding: Finding,
    },
}

/// `POST /api/auth/session/{id}/tickets`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TicketRequest {
    pub right: Right,
    /// Whom the owner gives it to, 1 to 100 characters: so they stand in the list of viewers. None: the owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(
        min_length = 1,
        max_length = 100,
        pattern = r"^[^\x00-\x1f\x7f-\x9f]*$"
    )]
    pub who: Option<String>,
}

/// `POST /api/auth/session/{id}/confirm`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ConfirmRequest {
    /// The account as the session shows it; `null` where the tool names none.
    #[serde(default)]
    pub account: Option<String>,
}

/// Which of a session's streams somebody watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Pane {
    Screen,
    Terminal,
}

/// Somebody who watches now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ViewerView {
    pub who: String,
    pub right: Right,
    pub pane: Pane,
    pub since: Timestamp,
}

/// What a view may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Right {
    Control,
    View,
}

/// A ticket opens one WebSocket, once, within 30 seconds.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TicketReply {
    pub ticket: String,
    pub expires_at: Timestamp,
    pub right: Right,
}

/// Close codes of `…/view` and `…/terminal` (RFC 6455 section 7.4.2, private use), always with a reason in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum CloseCode {
    /// The ticket is missing, used, expired or for another session.
    BadTicket = 4001,
    /// The session has ended.
    SessionEnded = 4002,
    /// The VM is not ready to be viewed yet.
    NotReady = 4003,
    /// The runner or its VM is gone.
    MachineGone = 4004,
    /// Nobody in the guest answers on the other end.
    NobodyListens = 4005,
    /// As many viewers as one session may have.
    TooManyViewers = 4006,
    /// The client sent something that is not the protocol.
    Protocol = 4007,
    /// The client reads too slowly.
    TooSlow = 4008,
    /// The controller stops.
    GoingAway = 4009,
    /// The owner ended the view, or whoever opened it may do so no more.
    Revoked = 4010,
}

/// A provider, as the dashboard shows it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProviderView {
    pub id: ProviderId,
    pub name: String,
    pub vendor: String,
    pub homepage: String,
    /// What the provider's terms say of such a sign-in, in one or two sentences.
    pub terms_note: String,
    pub terms_url: String,
    pub flows: Vec<FlowView>,
    /// Why it can't be used now (a missing parameter, a tool the image lacks); none: it can.
    #[serde(default)]
    pub unavailable: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct FlowView {
    pub id: String,
    pub title: String,
}

/// A credential's metadata. Its content is only in the vault.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CredentialView {
    pub credential_id: CredentialId,
    pub provider: ProviderId,
    pub user_id: String,
    #[serde(default)]
    pub account: Option<String>,
    pub session_id: SessionId,
    pub created_at: Timestamp,
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    pub files: Vec<CredentialFileView>,
}

#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CredentialFileView {
    /// Path relative to the home directory.
    pub path: String,
    pub bytes: u64,
}

//! `vestibule session`: sign-ins by way of the controller's API.
mod bench;

use crate::{
    api::Controller,
    home::Home,
    output::{self, Output},
};
use hyper::Method;
use std::process::ExitCode;
use vestibule_api::{
    ids::{ProviderId, SessionId},
    session::{
        ConfirmRequest, SessionEvent, SessionEventKind, SessionState, SessionView, StartReply,
        StartRequest,
    },
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum SessionCommand {
    /// Start a sign-in; prints its id and where to see it.
    Start {
        provider: ProviderId,
        /// One of the pack's flows [default: its first].
        #[arg(long)]
        flow: Option<String>,
        /// For whom.
        #[arg(long)]
        user: Option<String>,
        /// Stay and print what happens until it ends.
        #[arg(long)]
        follow: bool,
    },
    /// List sessions, newest first.
    List,
    /// Show one session, with why it failed where it did.
    Show { session: SessionId },
    /// Print a session's events as they happen, until it ends.
    Follow { session: SessionId },
    /// Cancel a session and destroy its VM.
    Cancel { session: SessionId },
    /// Say that the account is the right one, where a session waits for that: its credential is then sealed.
    Confirm {
        session: SessionId,
        /// The account as `session show` shows it; leave it out where the tool names none.
        #[arg(long)]
        account: Option<String>,
    },
    /// End every view of a session, and the tickets that were not used yet.
    CloseViews { session: SessionId },
    /// Start and end sign-ins and print how long each phase took, from the request to a view that can be used.
    Bench(bench::BenchArgs),
}

pub(crate) async fn run(
    home: &Home,
    command: SessionCommand,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let controller = Controller::of(home)?;
    match command {
        SessionCommand::Start {
            provider,
            flow,
            user,
            follow: stay,
        } => {
            let request = StartRequest {
                provider,
                user_id: user,
                owner: None,
                flow,
                image: None,
                warm: None,
            };
            let reply: StartReply = controller
                .call(Method::POST, "/api/auth/start", Some(&request))
                .await?;
            out.print(&reply, |reply| {
                format!(
                    "{}\nsee it at {}/#/sessions/{}",
                    reply.session_id,
                    controller.base(),
                    reply.session_id
                )
            })?;
            if stay {
                follow(&controller, reply.session_id, out).await
            } else {
                Ok(ExitCode::SUCCESS)
            }
        }
        SessionCommand::List => {
            let list: Vec<SessionView> = controller.get("/api/sessions?limit=100").await?;
            out.print(&list, |list| {
                let row = |s: &SessionView| {
                    vec![
                        s.session_id.to_string(),
                        s.provider.to_string(),
                        s.state.id().to_owned(),
                        s.account.clone().unwrap_or_default(),
                        s.created_at.to_string(),
                    ]
                };
                output::table(
                    &["SESSION", "PROVIDER", "STATE", "ACCOUNT", "STARTED"],
                    &list.iter().map(row).collect::<Vec<_>>(),
                )
            })?;
            Ok(ExitCode::SUCCESS)
        }
        SessionCommand::Show { session } => {
            let view: SessionView = controller
                .get(&format!("/api/auth/session/{session}"))
                .await?;
            out.print(&view, show)?;
            Ok(ExitCode::SUCCESS)
        }
        SessionCommand::Follow { session } => follow(&controller, session, out).await,
        SessionCommand::Cancel { session } => {
            let path = format!("/api/auth/session/{session}/cancel");
            let view: SessionView = controller.call(Method::POST, &path, None::<&()>).await?;
            out.print(&view, show)?;
            Ok(ExitCode::SUCCESS)
        }
        SessionCommand::Confirm { session, account } => {
            let path = format!("/api/auth/session/{session}/confirm");
            let request = ConfirmRequest { account };
            let view: SessionView = controller.call(Method::POST, &path, Some(&request)).await?;
            out.print(&view, show)?;
            Ok(ExitCode::SUCCESS)
        }
        SessionCommand::CloseViews { session } => {
            let path = format!("/api/auth/session/{session}/tickets");
            let _: serde_json::Value = controller.call(Method::DELETE, &path, None::<&()>).await?;
            output::note(&format!("the views of {session} are closed"));
            Ok(ExitCode::SUCCESS)
        }
        SessionCommand::Bench(args) => bench::run(&controller, args, out).await,
    }
}

fn show(view: &SessionView) -> String {
    let mut text = format!(
        "session   {}\nprovider  {} ({})\nstate     {}\nstarted   {}",
        view.session_id,
        view.provider,
        view.flow,
        view.state.id(),
        view.created_at,
    );
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            text.push_str(&format!("\n{name:<9} {value}"));
        }
    };
    add("vm", view.machine_id.map(|id| id.to_string()));
    add(
        "image",
        view.image_digest.as_ref().map(|d| d.short().to_owned()),
    );
    add("account", view.account.clone());
    let watching = view.viewers.iter();
    let watching: Vec<_> = watching
        .map(|v| format!("{} ({})", v.who, word(&v.pane)))
        .collect();
    add(
        "watched by",
        (!watching.is_empty()).then(|| watching.join(", ")),
    );
    if view.state == SessionState::Confirming {
        add("waits for", Some("the account to be confirmed".to_owned()));
    }
    add("sealed as", view.credential_id.map(|id| id.to_string()));
    if let Some(finding) = view.failure.as_ref().and_then(|v| v.finding.as_ref()) {
        text.push_str(&format!("\n\n{}", output::finding(finding)));
    }
    text
}

/// Prints events until the session is terminal. Exit status 0 only for *completed*.
async fn follow(
    controller: &Controller,
    session: SessionId,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let mut events = controller.events(session).await?;
    while let Some(event) = events.next().await? {
        out.print(&event, describe)?;
        if let SessionEventKind::State { state } = event.event
            && state.is_terminal()
        {
            let done = state == SessionState::Completed;
            return Ok(if done {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
    }
    anyhow::bail!(
        "the controller ended the event stream before session {session} ended; follow it again"
    )
}

/// A word of the API, as it stands on the wire.
fn word(value: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

fn describe(event: &SessionEvent) -> String {
    let what = match &event.event {
        SessionEventKind::State { state } => state.id().to_owned(),
        SessionEventKind::Phase { phase } => format!("  {phase:?}"),
        SessionEventKind::Waiting { waiting_for } => {
            format!("  waits for {}", waiting_for.join(", "))
        }
        SessionEventKind::Claimed {
            start,
            snapshot_id,
            why,
        } => {
            let of = snapshot_id
                .as_ref()
                .map(|id| format!(" of snapshot {}", id.short()));
            let because = why.map(|why| format!(", because {}", why.words()));
            let words = [of, because].map(Option::unwrap_or_default).concat();
            format!("  got a VM: {}{words}", start.id())
        }
        SessionEventKind::FellBack { from, to, finding } => format!(
            "  the VM could not be had ({}); another one: {}\n{}",
            from.id(),
            to.id(),
            output::finding(finding)
        ),
        SessionEventKind::BrowserNavigated => "  the page was handed to the browser".to_owned(),
        SessionEventKind::FirstFrame => "  the first frame went to a viewer".to_owned(),
        SessionEventKind::UrlOpened { host, path } => format!("  opened {host}{path}"),
        SessionEventKind::UrlRefused { host, why } => format!("  did not open {host}: {why}"),
        SessionEventKind::UserCode { code } => format!("  code {code}"),
        SessionEventKind::CredentialPartial { rule, why } => {
            format!("  {rule} is not complete: {why}")
        }
        SessionEventKind::EgressRefused {
            host,
            port,
            reason,
            count,
        } => {
            format!("  way out: {host}:{port} {reason:?} ({count})")
        }
        SessionEventKind::Viewers { count } => format!("  {count} viewing"),
        SessionEventKind::ViewerJoined { who, right, pane } => {
            format!("  {who} watches the {} ({})", word(pane), word(right))
        }
        SessionEventKind::ViewerLeft { who, pane, .. } => {
            format!("  {who} left the {}", word(pane))
        }
        SessionEventKind::BrowserRestarted => "  browser was closed and started again".to_owned(),
        SessionEventKind::Captured { account } => {
            format!(
                "  captured {}",
                account.as_deref().unwrap_or("a credential")
            )
        }
        SessionEventKind::Failure { finding } => output::finding(finding),
    };
    format!("{}  {what}", event.at)
}

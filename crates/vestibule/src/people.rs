//! `vestibule user`, `vestibule token`, `vestibule org`: who may ask the controller, by way of its API.
use crate::{
    api::Controller,
    home::Home,
    output::{self, Output},
};
use anyhow::{Context as _, bail};
use hyper::Method;
use std::{
    io::{BufRead as _, IsTerminal as _, Read as _},
    process::ExitCode,
};
use vestibule_api::{
    ids::{LoginName, OrganisationName},
    people::{
        NewOrganisationRequest, NewTokenReply, NewTokenRequest, NewUserRequest, OrganisationView,
        Password, PasswordRequest, Role, TokenView, UserView,
    },
    time::Timestamp,
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum UserCommand {
    /// Make a user. The password is asked for, or read as the first line of standard input.
    Add {
        name: LoginName,
        /// signer, operator, image-engineer, consumer or admin.
        #[arg(long, default_value = "signer")]
        role: Role,
        /// Confine them to an organisation.
        #[arg(long, value_name = "NAME")]
        org: Option<OrganisationName>,
        /// They sign in at the identity provider (`[oidc]`) and have no password.
        #[arg(long)]
        oidc: bool,
    },
    /// List users.
    List,
    /// Remove a user: signs them out, closes their views, cancels their sessions. Credentials stay.
    Rm { name: LoginName },
    /// Give a user another password, asked for or read as the first line of standard input. Signs them out everywhere.
    Passwd { name: LoginName },
}

#[derive(Debug, clap::Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a service token and print it: the only time that it is shown.
    New {
        /// Which program it is for.
        name: LoginName,
        /// signer, operator, image-engineer, consumer or admin.
        #[arg(long)]
        role: Role,
        /// Confine it to an organisation.
        #[arg(long, value_name = "NAME")]
        org: Option<OrganisationName>,
        /// Days until it is worth nothing [default: until it is revoked].
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=3650))]
        days: Option<u64>,
    },
    /// List service tokens, never the tokens themselves.
    List,
    /// Revoke a service token at once.
    Revoke { name: LoginName },
}

#[derive(Debug, clap::Subcommand)]
pub(crate) enum OrgCommand {
    /// Make an organisation.
    Add {
        name: OrganisationName,
        /// Sessions at a time [default: `limits.live_per_organisation` of the configuration].
        #[arg(long, value_name = "N")]
        max_live: Option<u32>,
    },
    /// List organisations.
    List,
    /// Remove an organisation to which nothing belongs any more.
    Rm { name: OrganisationName },
}

/// `vestibule user`.
pub(crate) async fn user(
    home: &Home,
    command: UserCommand,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let controller = Controller::of(home)?;
    match command {
        UserCommand::Add {
            name,
            role,
            org,
            oidc,
        } => {
            let request = NewUserRequest {
                name,
                role,
                organisation: org,
                password: if oidc { None } else { Some(password()?) },
            };
            let view: UserView = controller
                .call(Method::POST, "/api/users", Some(&request))
                .await?;
            out.print(&view, |view| format!("made {} ({})", view.name, view.role))?;
        }
        UserCommand::List => {
            let list: Vec<UserView> = controller.get("/api/users").await?;
            out.print(&list, |list| {
                let row = |user: &UserView| {
                    vec![
                        user.name.to_string(),
                        user.role.to_string(),
                        organisation(user.organisation.as_ref()),
                        user.created_at.to_string(),
                        time(user.last_login_at),
                    ]
                };
                output::table(
                    &["USER", "ROLE", "ORGANISATION", "MADE", "SIGNED IN"],
                    &list.iter().map(row).collect::<Vec<_>>(),
                )
            })?;
        }
        UserCommand::Rm { name } => {
            remove(
                &controller,
                &format!("/api/users/{}", escaped(name.as_str())),
            )
            .await?;
            output::note(&format!("removed {name}"));
        }
        UserCommand::Passwd { name } => {
            let path = format!("/api/users/{}/password", escaped(name.as_str()));
            let request = PasswordRequest {
                password: password()?,
            };
            let _: serde_json::Value = controller.call(Method::PUT, &path, Some(&request)).await?;
            output::note(&format!("{name} has another password and is signed out"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `vestibule token`.
pub(crate) async fn token(
    home: &Home,
    command: TokenCommand,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let controller = Controller::of(home)?;
    match command {
        TokenCommand::New {
            name,
            role,
            org,
            days,
        } => {
            let request = NewTokenRequest {
                name,
                role,
                organisation: org,
                expires_in_s: days.map(|days| days.saturating_mul(86_400)),
            };
            let reply: NewTokenReply = controller
                .call(Method::POST, "/api/tokens", Some(&request))
                .await?;
            out.print(&reply, |reply| reply.token.clone())?;
        }
        TokenCommand::List => {
            let list: Vec<TokenView> = controller.get("/api/tokens").await?;
            out.print(&list, |list| {
                let row = |token: &TokenView| {
                    vec![
                        token.name.to_string(),
                        token.role.to_string(),
                        organisation(token.organisation.as_ref()),
                        token.created_by.clone(),
                        token.created_at.to_string(),
                        time(token.expires_at),
                        time(token.last_used_at),
                    ]
                };
                output::table(
                    &[
                        "TOKEN",
                        "ROLE",
                        "ORGANISATION",
                        "BY",
                        "MADE",
                        "EXPIRES",
                        "USED",
                    ],
                    &list.iter().map(row).collect::<Vec<_>>(),
                )
            })?;
        }
        TokenCommand::Revoke { name } => {
            let list: Vec<TokenView> = controller.get("/api/tokens").await?;
            let Some(token) = list.into_iter().find(|token| token.name == name) else {
                bail!("there is no token `{name}`; `vestibule token list` shows what there is");
            };
            remove(&controller, &format!("/api/tokens/{}", token.token_id)).await?;
            output::note(&format!("revoked {name}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `vestibule org`.
pub(crate) async fn org(home: &Home, command: OrgCommand, out: Output) -> anyhow::Result<ExitCode> {
    let controller = Controller::of(home)?;
    match command {
        OrgCommand::Add { name, max_live } => {
            let request = NewOrganisationRequest { name, max_live };
            let view: OrganisationView = controller
                .call(Method::POST, "/api/organisations", Some(&request))
                .await?;
            out.print(&view, |view| format!("made {}", view.name))?;
        }
        OrgCommand::List => {
            let list: Vec<OrganisationView> = controller.get("/api/organisations").await?;
            out.print(&list, |list| {
                let row = |org: &OrganisationView| {
                    vec![
                        org.name.to_string(),
                        org.live.to_string(),
                        org.max_live
                            .map(|most| most.to_string())
                            .unwrap_or_default(),
                        org.created_at.to_string(),
                    ]
                };
                output::table(
                    &["ORGANISATION", "LIVE", "AT MOST", "MADE"],
                    &list.iter().map(row).collect::<Vec<_>>(),
                )
            })?;
        }
        OrgCommand::Rm { name } => {
            remove(&controller, &format!("/api/organisations/{name}")).await?;
            output::note(&format!("removed {name}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn remove(controller: &Controller, path: &str) -> anyhow::Result<()> {
    let _: serde_json::Value = controller.call(Method::DELETE, path, None::<&()>).await?;
    Ok(())
}

fn organisation(name: Option<&OrganisationName>) -> String {
    name.map(ToString::to_string).unwrap_or_default()
}

fn time(at: Option<Timestamp>) -> String {
    at.map(|at| at.to_string()).unwrap_or_default()
}

/// A name as one segment of a path: of its alphabet only `+` and `@` could be read otherwise.
fn escaped(name: &str) -> String {
    name.replace('+', "%2B").replace('@', "%40")
}

/// The new password: typed twice on a terminal, else the first line of standard input. Never an argument, which every user
/// of the host can read.
fn password() -> anyhow::Result<Password> {
    if std::io::stdin().is_terminal() {
        let first = Password::new(rpassword::prompt_password("new password: ")?);
        let second = Password::new(rpassword::prompt_password("once more: ")?);
        if first.expose() != second.expose() {
            bail!("the two are not the same; nothing was changed");
        }
        return fit(first);
    }
    // One byte more than the longest, so that a longer one is refused and not cut.
    let limit = u64::try_from(Password::MAX_BYTES + 2).context("the limit of a password")?;
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .take(limit)
        .read_line(&mut line)
        .context("read the password from standard input")?;
    let length = line.trim_end_matches(['\r', '\n']).len();
    line.truncate(length);
    fit(Password::new(line))
}

fn fit(password: Password) -> anyhow::Result<Password> {
    match password.unfit() {
        None => Ok(password),
        Some(why) => bail!("the password has {why}; choose 12 to 1024 characters, of any kind"),
    }
}

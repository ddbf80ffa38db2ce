//! `vestibule host`: the hosts that share the database, by way of the controller's API.
use crate::{
    api::Controller,
    home::Home,
    output::{self, Output},
};
use anyhow::bail;
use hyper::Method;
use std::process::ExitCode;
use vestibule_api::{
    control::{HostState, HostView},
    time::Timestamp,
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum HostCommand {
    /// List hosts: whether their controllers act for them, and their VMs.
    List,
    /// Remove a host that never comes back, with what is known of its VMs. Credentials in its vault are out of reach then.
    Forget {
        /// Its name, or its id.
        host: String,
    },
}

/// `vestibule host`.
pub(crate) async fn run(
    home: &Home,
    command: HostCommand,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let controller = Controller::of(home)?;
    let hosts: Vec<HostView> = controller.get("/api/hosts").await?;
    match command {
        HostCommand::List => out.print(&hosts, |hosts| {
            let row = |host: &HostView| {
                let state = match host.state {
                    HostState::Live => "live",
                    HostState::Lost => "lost",
                };
                let until = host
                    .lease_until
                    .map_or_else(|| "–".to_owned(), Timestamp::to_second);
                vec![
                    host.name.clone(),
                    format!("{state}{}", if host.own { ", this one" } else { "" }),
                    until,
                    host.machines.to_string(),
                    host.address.clone().unwrap_or_else(|| "–".to_owned()),
                    host.host_id.to_string(),
                ]
            };
            output::table(
                &["HOST", "STATE", "LEASE UNTIL", "VMS", "ADDRESS", "ID"],
                &hosts.iter().map(row).collect::<Vec<_>>(),
            )
        })?,
        HostCommand::Forget { host: name } => {
            let is = |host: &&HostView| host.name == name || host.host_id.to_string() == name;
            let found: Vec<_> = hosts.iter().filter(is).collect();
            let [host] = found[..] else {
                bail!(
                    "{} hosts are called `{name}`; `vestibule host list` shows their ids",
                    found.len()
                );
            };
            let path = format!("/api/hosts/{}", host.host_id);
            let _: serde_json::Value = controller.call(Method::DELETE, &path, None::<&()>).await?;
            output::note(&format!("removed {}", host.name));
        }
    }
    Ok(ExitCode::SUCCESS)
}

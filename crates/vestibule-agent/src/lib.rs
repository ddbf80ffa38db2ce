//! The program inside the guest. One static binary, several roles:
//!
//! | started as | role |
//! |---|---|
//! | PID 1 of the initramfs, or `init` | `init`: finds the root, lays the overlay, starts systemd |
//! | `agent` | `agent`: everything the host asks of the guest |
//! | `attach` | `attach`: shows the sign-in's terminal in the xterm on the desktop |
//! | a name in `shim::NAMES` | `shim`: hands a URL that a tool wants opened to the agent |
//!
//! It resolves no names, speaks no TLS, and looks up no users through libc: static glibc would load shared objects for
//! each of these.
#![cfg_attr(
    test,
    allow(clippy::large_futures, reason = "tests run one future at a time")
)]

mod agent;
mod api;
mod attach;
mod browser;
mod capture;
mod clock;
mod config_drive;
mod desktop;
mod events;
mod guest;
mod home;
#[cfg(any(test, fuzzing))]
pub mod hostile;
mod init;
mod link;
mod login;
mod notify;
mod oidc;
mod port;
mod prepare;
mod process;
mod proxy;
mod readiness;
mod renew;
mod report;
mod shim;
mod systemd;
mod terminal;
mod tool;
mod uevent;
mod vsock;
mod watchdog;

use std::{path::Path, process::ExitCode};
use vestibule_api::error::Chain;

/// The agent's runtime directory; its unit's `RuntimeDirectory=`.
const RUN: &str = "/run/vestibule";

/// Plays the role that the program's name and arguments say.
pub fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let program = args.next().unwrap_or_default();
    let name = Path::new(&program)
        .file_name()
        .unwrap_or_default()
        .to_owned();
    if std::process::id() == 1 {
        return init::main();
    }
    let role = args.next().unwrap_or_default();
    match (name.to_str(), role.to_str()) {
        (_, Some("init")) => init::main(),
        (Some(name), _) if shim::NAMES.contains(&name) => {
            shim::main(std::iter::once(role).chain(args), &shim::socket())
        }
        (_, Some("agent")) => finish(agent::main()),
        (_, Some("attach")) => finish(attach::main(&Path::new(RUN).join(attach::SOCKET))),
        (_, _) => {
            say("usage: vestibule-agent agent | attach | init");
            ExitCode::from(2)
        }
    }
}

fn finish<E: std::error::Error + 'static>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            say(&format!("vestibule-agent: {}", Chain(&err)));
            ExitCode::FAILURE
        }
    }
}

/// One line on standard error; nothing can be done where even that is closed.
fn say(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "{line}");
}

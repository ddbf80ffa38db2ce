//! What anybody may send the agent, for tests and for the fuzzer (`fuzz/`): bytes on a connection of the host's or of a program in
//! the guest, and a pack with what its tool writes. Whatever comes, the agent answers and goes on.
//!
//! What is asked for here is done by nobody: the VM is somebody's, so that the agent starts no program for a stranger, and the
//! thread has given up what it would need to set a clock.
use crate::{
    agent::Agent, api, capture::Capture, guest::Guest, home::Home, login, process::Program, tool,
};
use std::{fs, path::Path, time::Duration};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use vestibule_api::{agent::AgentEvent, ids::SessionId, pack::ProviderPack};

/// Longer than everything that the agent waits for. Time that nobody needs is skipped (`tokio::time::pause`).
const PATIENCE: Duration = Duration::from_secs(120);
/// Of an answer, so much is read: a connection's requests may be many.
const ANSWER_LIMIT: u64 = 8 << 20;

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub enum Asker {
    Host,
    /// A program in the guest.
    Guest,
}

/// What an agent answers that is asked `bytes` on one connection, in a runtime of one thread whose time is paused. `dir` is its
/// guest's.
///
/// # Panics
/// When the agent does.
pub async fn answer(dir: &Path, asker: Asker, bytes: &[u8]) -> Vec<u8> {
    give_up_capabilities();
    let agent = Agent::new(guest(dir), String::new());
    agent.session.get_or_init(SessionId::generate);
    let router = match asker {
        Asker::Host => api::for_host(&agent),
        Asker::Guest => api::for_guest(&agent),
    };
    let (near, far) = duplex(64 << 10);
    let served = tokio::spawn(api::serve_connection(far, router));
    let (read, mut write) = tokio::io::split(near);
    let mut answer = Vec::new();
    let mut read = read.take(ANSWER_LIMIT);
    let ask = async {
        // An agent that has heard enough closes the connection.
        drop(write.write_all(bytes).await);
        std::future::pending::<()>().await;
    };
    let hear = async {
        // A stream of events goes on for ever.
        drop(tokio::time::timeout(PATIENCE, read.read_to_end(&mut answer)).await);
    };
    tokio::select! {
        () = ask => {}
        () = hear => {}
    }
    drop((read, write));
    // Behind a stream of events that has further bytes of its client's before it, the client's end shows when one is written.
    agent.events.push(AgentEvent::BrowserRestarted);
    let served = tokio::time::timeout(PATIENCE, served).await;
    let served = served.expect("the connection ends with its client");
    served.expect("the agent serves the connection to its end");
    // What the connection was upgraded to ends with it.
    tokio::task::yield_now().await;
    answer
}

fn guest(dir: &Path) -> Guest {
    for name in ["home", "run", "bin"] {
        fs::create_dir_all(dir.join(name)).expect("make the guest's directories");
    }
    Guest::for_tests(dir)
}

fn give_up_capabilities() {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).expect("give up every capability");
}

/// Does with a pack, as it comes from the controller, what a sign-in does before its tool runs, and with `text` what it does with
/// whatever the tool says and writes.
///
/// # Panics
/// When the agent does, or relies on something that the pack's checks let through.
pub fn sign_in(dir: &Path, pack: &ProviderPack, text: &str) {
    let guest = guest(dir);
    let home = || Home::open(&guest.home, None).expect("the home was made");
    for flow in &pack.flow {
        login::hostile::read(flow, text);
        // Paths that can't be together in one directory are refused in words.
        for (path, content) in &flow.files {
            if let Err(err) = home().write(path, content.as_bytes()) {
                assert!(!err.to_string().is_empty());
            }
        }
        let program = Program {
            argv: flow.argv.clone(),
            env: tool::environment(&guest, flow),
            directory: guest.home.clone(),
            user: None,
        };
        assert_eq!(program.pty_command(None).is_ok(), !flow.argv.is_empty());
        assert!(!program.env.keys().any(|name| name.contains(['=', '\0'])));
        // A pack may do without what every tool gets, and puts nothing else in its place.
        for (name, value) in tool::base_environment(&guest) {
            let given = program.env.get(&name);
            assert!(
                name == "LANG" || given.is_none_or(|given| *given == value),
                "{name}"
            );
        }
    }
    let capture = Capture::begin(home(), pack.credential.clone());
    for rule in &pack.credential {
        if let Err(err) = home().write(&rule.path, text.as_bytes()) {
            assert!(!err.to_string().is_empty());
        }
    }
    let progress = capture.look();
    assert!(progress.partial.iter().all(|(_, why)| !why.is_empty()));
    if let Some(credential) = capture.collect() {
        assert!(progress.complete && !credential.files.is_empty());
    }
}

#[cfg(test)]
mod tests;

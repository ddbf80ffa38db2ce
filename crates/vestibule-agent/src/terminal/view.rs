//! What somebody who looks at a terminal is shown: the screen as it is, then every byte; the screen again when they fell
//! behind, or when the next sign-in has a terminal of its own.
use super::{Size, TerminalHandle};
use bytes::Bytes;
use tokio::sync::{
    broadcast::{self, error::TryRecvError},
    watch,
};
use vestibule_api::agent::TerminalControl;

/// Shown while there is no terminal yet.
const NOTHING_YET: &[u8] =
    b"\x1b[0m\x1b[2J\x1b[HVestibule: the sign-in's terminal will appear here.\r\n";

/// One watcher's view.
#[derive(Debug)]
pub(crate) struct View {
    terminals: Option<watch::Receiver<Option<TerminalHandle>>>,
    shown: Option<Shown>,
    greeted: bool,
}

#[derive(Debug)]
struct Shown {
    terminal: TerminalHandle,
    bytes: broadcast::Receiver<Bytes>,
    activity: watch::Receiver<u64>,
    ended: bool,
}

impl View {
    /// Follows whichever terminal is the current one, for ever.
    pub(crate) fn following(mut terminals: watch::Receiver<Option<TerminalHandle>>) -> Self {
        terminals.mark_changed();
        Self {
            terminals: Some(terminals),
            shown: None,
            greeted: false,
        }
    }

    /// Shows one terminal, to its end.
    pub(crate) fn of(terminal: TerminalHandle) -> Self {
        let (_, shown) = Shown::attach(terminal);
        Self {
            terminals: None,
            shown: Some(shown),
            greeted: true,
        }
    }

    /// The next bytes to show; none at the end. May be dropped and called again: nothing is lost.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        loop {
            tokio::select! {
                changed = changed(&mut self.terminals) => {
                    let terminal = changed?;
                    if let Some(bytes) = self.show(terminal) {
                        return Some(bytes);
                    }
                }
                bytes = more(&mut self.shown) => match bytes {
                    Some(bytes) => return Some(bytes),
                    None if self.terminals.is_none() => return None,
                    None => {}
                },
            }
        }
    }

    fn show(&mut self, terminal: Option<TerminalHandle>) -> Option<Bytes> {
        if let Some(terminal) = terminal {
            let (snapshot, shown) = Shown::attach(terminal);
            self.shown = Some(shown);
            self.greeted = true;
            return Some(snapshot);
        }
        let first = !std::mem::replace(&mut self.greeted, true);
        first.then(|| Bytes::from_static(NOTHING_YET))
    }

    /// Types into the terminal that is shown.
    pub(crate) async fn send(&self, bytes: Bytes) {
        if let Some(shown) = &self.shown {
            shown.terminal.send(bytes).await;
        }
    }

    /// Does what a watcher with the right to control asks.
    pub(crate) async fn control(&self, control: TerminalControl) {
        let TerminalControl::Resize { cols, rows } = control;
        if let Some(shown) = &self.shown {
            shown.terminal.resize(Size::clamped(cols, rows)).await;
        }
    }
}

impl Shown {
    fn attach(terminal: TerminalHandle) -> (Bytes, Self) {
        let (snapshot, bytes) = terminal.attach();
        let activity = terminal.activity();
        (
            snapshot.into(),
            Self {
                terminal,
                bytes,
                activity,
                ended: false,
            },
        )
    }
}

async fn changed(
    terminals: &mut Option<watch::Receiver<Option<TerminalHandle>>>,
) -> Option<Option<TerminalHandle>> {
    let Some(terminals) = terminals else {
        return std::future::pending().await;
    };
    terminals.changed().await.ok()?;
    Some(terminals.borrow_and_update().clone())
}

/// Bytes, a snapshot where some were missed, none once when the terminal has ended.
async fn more(shown: &mut Option<Shown>) -> Option<Bytes> {
    let Some(Shown {
        terminal,
        bytes,
        activity,
        ended: ended @ false,
    }) = shown
    else {
        return std::future::pending().await;
    };
    let end = async { while activity.changed().await.is_ok() {} };
    let received = tokio::select! {
        biased;
        received = bytes.recv() => received.ok(),
        // Its last bytes may have come between the two looks.
        () = end => match bytes.try_recv() {
            Ok(last) => Some(last),
            Err(TryRecvError::Lagged(_)) => None,
            Err(TryRecvError::Empty | TryRecvError::Closed) => {
                *ended = true;
                return None;
            }
        },
    };
    Some(received.unwrap_or_else(|| {
        let (snapshot, again) = terminal.attach();
        *bytes = again;
        snapshot.into()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{process::tests::shell, terminal::spawn};

    fn start(script: &str) -> TerminalHandle {
        let started = spawn(&shell(script), Size::clamped(80, 24), false, None).unwrap();
        let terminal = started.terminal.clone();
        let mut child = started.child;
        tokio::spawn(async move { child.exited().await });
        terminal
    }

    async fn until(view: &mut View, text: &str) -> String {
        let mut seen = String::new();
        let waited = tokio::time::timeout(std::time::Duration::from_secs(10), async {
            while let Some(bytes) = view.next().await {
                seen.push_str(&String::from_utf8_lossy(&bytes));
                if seen.contains(text) {
                    return;
                }
            }
        });
        waited
            .await
            .unwrap_or_else(|_| panic!("`{text}` did not come: {seen}"));
        seen
    }

    #[tokio::test]
    async fn a_view_goes_from_one_sign_in_to_the_next() {
        let terminals = watch::Sender::new(None);
        let mut view = View::following(terminals.subscribe());
        until(&mut view, "will appear here").await;
        let first = start("echo first; read x; echo got $x");
        terminals.send_replace(Some(first));
        until(&mut view, "first").await;
        view.send(Bytes::from_static(b"it\r")).await;
        until(&mut view, "got it").await;
        terminals.send_replace(Some(start("echo second; sleep 1000")));
        until(&mut view, "second").await;
        let mut late = View::following(terminals.subscribe());
        until(&mut late, "second").await;
    }

    #[tokio::test]
    async fn who_falls_behind_gets_the_screen_and_not_the_past() {
        let terminal = start("read x; seq 1 200000; echo END; read y");
        let mut view = View::of(terminal.clone());
        view.send(Bytes::from_static(b"\r")).await;
        let mut activity = terminal.activity();
        while !terminal.emulator().screen().contains("END") {
            activity.changed().await.unwrap();
        }
        assert!(until(&mut view, "END").await.len() < 8_000_000);
        view.send(Bytes::from_static(b"\r")).await;
        while view.next().await.is_some() {}
    }
}

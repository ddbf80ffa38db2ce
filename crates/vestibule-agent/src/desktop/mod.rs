//! The desktop: browser above, terminal below, whatever size the screen has; and whether there is something to see.
//!
//! One thread talks to the X server, because Xlib's wire protocol is request and reply and a reply under emulation takes its
//! time. It looks when something changed (windows, screen size, until the first paint also damage) and not otherwise.
pub(crate) mod act;
pub(crate) mod authority;
mod layout;
mod paint;
mod screen;

use crate::{agent::Agent, readiness::Condition};
use inotify::{Inotify, WatchMask};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
pub(crate) use screen::ScreenError;
use screen::{Screen, Windows};
use std::{path::Path, sync::Arc, thread, time::Duration};
use tracing::{info, warn};
use vestibule_api::{
    agent::{AgentEvent, DisplayReport},
    error::Chain,
};

/// Two looks are so far apart at least: a page that animates must not keep us busy.
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);
/// The X server's socket is tried again after so long even if nothing was seen to change.
const RETRY_S: i64 = 2;

/// Watches the desktop for as long as the agent runs; only in images with a browser.
pub(crate) fn start(agent: &Arc<Agent>) {
    if !agent.guest.image.has("browser") {
        return;
    }
    let agent = Arc::clone(agent);
    let started = thread::Builder::new()
        .name("desktop".to_owned())
        .spawn(move || run(&agent));
    if let Err(err) = started {
        warn!(error = %err, "start the desktop's thread");
    }
}

fn run(agent: &Agent) {
    let mut desktop = Desktop {
        agent,
        painted_once: false,
        browser: None,
        closed: false,
        laid_out: None,
    };
    loop {
        let screen = wait_for_server(agent);
        if let Err(err) = desktop.watch(&screen) {
            warn!(error = %Chain(&err), "the X server went away");
        }
        agent.display.send_replace(None);
        agent
            .readiness
            .set(Condition::Painted, vec!["the X server".to_owned()]);
        desktop.laid_out = None;
    }
}

/// Connects when the server's socket is there: looks whenever its directory changes.
fn wait_for_server(agent: &Agent) -> Screen {
    let number = agent.guest.display.trim_start_matches(':');
    let socket = Path::new("/tmp/.X11-unix").join(format!("X{number}"));
    let changes = Inotify::init().ok();
    let mut told = false;
    loop {
        if let Some(inotify) = &changes {
            for directory in ["/tmp", "/tmp/.X11-unix"] {
                // Not there yet: then the watch on its parent tells.
                let _ = inotify.watches().add(
                    directory,
                    WatchMask::CREATE | WatchMask::ATTRIB | WatchMask::ONLYDIR,
                );
            }
        }
        match Screen::connect(&socket, &agent.guest.xauthority) {
            Ok(screen) => return screen,
            Err(err) if !told => {
                info!(error = %Chain(&err), "waiting for the X server");
                told = true;
            }
            Err(_) => {}
        }
        if let Some(inotify) = &changes {
            let mut fds = [PollFd::new(inotify, PollFlags::IN)];
            let limit = Timespec {
                tv_sec: RETRY_S,
                tv_nsec: 0,
            };
            if poll(&mut fds, Some(&limit)).is_ok_and(|ready| ready > 0) {
                drain(inotify);
            }
        } else {
            thread::sleep(Duration::from_secs(RETRY_S.unsigned_abs()));
        }
    }
}

fn drain(inotify: &Inotify) {
    let mut bytes = [0; 1024];
    // The descriptor does not block; what was in it only means: look.
    while rustix::io::read(inotify, &mut bytes).is_ok_and(|read| read > 0) {}
}

struct Desktop<'a> {
    agent: &'a Agent,
    painted_once: bool,
    browser: Option<u32>,
    /// The browser's window is gone since the last look that saw one.
    closed: bool,
    /// Size and windows of the last layout.
    laid_out: Option<((u16, u16), Windows)>,
}

impl Desktop<'_> {
    fn watch(&mut self, screen: &Screen) -> Result<(), ScreenError> {
        let mut damage = Some(screen.report_damage()?);
        loop {
            let display = self.look(screen)?;
            let painted = display.painted;
            self.report(display);
            if let (true, Some(watched)) = (painted, damage) {
                // From now on only windows matter.
                screen.stop_damage(watched)?;
                damage = None;
            }
            screen.wait()?;
            thread::sleep(BETWEEN_LOOKS);
            screen.forget_pending(damage)?;
        }
    }

    fn look(&mut self, screen: &Screen) -> Result<DisplayReport, ScreenError> {
        let size = screen.size()?;
        let windows = screen.windows()?;
        if self.laid_out != Some((size, windows)) {
            screen.arrange(size, windows)?;
            self.laid_out = Some((size, windows));
        }
        if let Some(browser) = windows.browser {
            let other = self.browser.is_some_and(|before| before != browser);
            if std::mem::take(&mut self.closed) || other {
                self.agent.events.push(AgentEvent::BrowserRestarted);
            }
            self.browser = Some(browser);
        } else if let Some(before) = self.browser {
            // Not one that is only hidden. The next browser may get the place of this one in the X server, and then its
            // window has the same number.
            self.closed |= !screen.has_browser(before)?;
        }
        let painted = match windows.browser {
            Some(_) => {
                paint::is_painted(&screen.samples(layout::browser(size))?, !self.painted_once)
            }
            None => false,
        };
        Ok(DisplayReport {
            width: size.0.into(),
            height: size.1.into(),
            painted,
            browser_window: windows.browser.is_some(),
        })
    }

    fn report(&mut self, display: DisplayReport) {
        let missing = match (display.browser_window, display.painted || self.painted_once) {
            (true, true) => Vec::new(),
            (true, false) => vec!["the browser's first page on the screen".to_owned()],
            (false, _) => vec!["the browser's window".to_owned()],
        };
        if display.painted && !self.painted_once {
            self.painted_once = true;
            self.agent.events.push(AgentEvent::Painted {
                width: display.width,
                height: display.height,
            });
        }
        self.agent.readiness.set(Condition::Painted, missing);
        self.agent.display.send_if_modified(|before| {
            let changed = before.as_ref() != Some(&display);
            *before = Some(display);
            changed
        });
    }
}

//! Before a save: the guest becomes one that any VM may begin as. Desktop and browser stay up, for that is what a restore
//! saves people from waiting for; what a copy must not have ends, before the save or first thing after the restore
//! ([`crate::renew`]), whichever can be proven. Here: the page cache is warmed by a page that leaves nothing in the profile, the
//! processes of pages end, other units stop, and free memory becomes zeros, which cost nothing on disk. Where the order
//! matters it is the order here.
use crate::{
    agent::Agent,
    browser::{self, BrowserError},
    desktop::act::{self, ActError},
    guest::Guest,
    systemd::{BusError, Systemd},
};
use std::{fs, sync::Arc, time::Duration};
use tokio::{task::JoinError, time::Instant};
use tracing::info;
use url::Url;

/// A page of ours on guest loopback: it takes the browser through its network service and a renderer of a site's.
const INNER_PAGE: &str = "http://127.0.0.1:8080/health";
/// The guest is quiet when its processors were idle for so much of so long; it is waited for so long at most.
const QUIET_SHARE: f64 = 0.9;
const QUIET_FOR: Duration = Duration::from_secs(2);
const QUIET_WAIT: Duration = Duration::from_secs(90);
/// Units that stop are looked at so often, for so long.
const STOP_LOOK: Duration = Duration::from_millis(200);
const STOP_WAIT: Duration = Duration::from_secs(90);
/// Something on the screen changes within this.
const SCREEN_WAIT: Duration = Duration::from_secs(120);
const SCREEN_LOOK: Duration = Duration::from_millis(500);
/// Free memory is cleared in pieces, and so much more of it is left than the kernel wants to have free: below its marks it
/// would drop the page cache, which is what a restored browser starts from.
const PIECE: usize = 8 << 20;
const LEAVE_KIB: u64 = 8 << 10;

/// Why the guest is not ready to be saved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrepareError {
    #[error("ask PID 1 to stop units")]
    Units(#[from] BusError),
    #[error("stop units: `{0}` did not end within {STOP_WAIT:?}")]
    Running(String),
    #[error("warm the browser")]
    Browser(#[from] BrowserError),
    #[error("warm the browser with `{INNER_PAGE}`")]
    Page(#[from] url::ParseError),
    #[error("look at the desktop")]
    Desktop(#[from] ActError),
    #[error("{0} within {SCREEN_WAIT:?}")]
    Screen(&'static str),
    #[error("take the browser's profile away")]
    Profile(#[source] std::io::Error),
    #[error("clear the guest")]
    Task(#[from] JoinError),
}

/// Does all of it. Takes seconds.
pub(crate) async fn prepare(agent: &Arc<Agent>) -> Result<(), PrepareError> {
    stop_units(agent).await?;
    if agent.guest.image.has("browser") {
        settle_browser(&agent.guest).await?;
    }
    tokio::task::spawn_blocking(clear_free_memory).await?;
    Ok(())
}

/// Leaves the browser with one window, an empty profile and no process of a page.
async fn settle_browser(guest: &Guest) -> Result<(), PrepareError> {
    let before = on_desktop(guest, act::browser_windows).await?;
    let inner: Url = INNER_PAGE.parse()?;
    browser::open_off_the_record(guest, &inner).await?;
    let window = until("the browser did not open a second window", || async {
        let mut windows = on_desktop(guest, act::browser_windows).await?.into_iter();
        Ok(windows.find(|window| !before.contains(window)))
    })
    .await?;
    quiet().await;
    on_desktop(guest, move |guest| act::close(guest, window)).await?;
    until("the browser did not close its second window", || async {
        let windows = on_desktop(guest, act::browser_windows).await?;
        Ok((!windows.contains(&window)).then_some(()))
    })
    .await?;
    until("the browser did not write its preferences", || async {
        Ok(browser::ids::are_known(&guest.browser_profile).then_some(()))
    })
    .await?;
    browser::copy::end_pages(guest);
    // A copy shows the start page again when it has loaded it again, and not before.
    until("the browser still shows its start page", || async {
        let shown = on_desktop(guest, act::shows_start_page).await?;
        Ok((!shown).then_some(()))
    })
    .await?;
    quiet().await;
    Ok(())
}

async fn on_desktop<T: Send + 'static>(
    guest: &Guest,
    act: impl FnOnce(&Guest) -> Result<T, ActError> + Send + 'static,
) -> Result<T, PrepareError> {
    let guest = guest.clone();
    Ok(tokio::task::spawn_blocking(move || act(&guest)).await??)
}

/// Looks until there is something; `or` says what is wrong when there never is.
async fn until<T, F>(or: &'static str, look: impl Fn() -> F) -> Result<T, PrepareError>
where
    F: Future<Output = Result<Option<T>, PrepareError>>,
{
    let deadline = Instant::now() + SCREEN_WAIT;
    loop {
        if let Some(found) = look().await? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(PrepareError::Screen(or));
        }
        tokio::time::sleep(SCREEN_LOOK).await;
    }
}

/// Waits until the processors have little to do.
async fn quiet() {
    let deadline = Instant::now() + QUIET_WAIT;
    let mut before = cpu_times();
    while Instant::now() < deadline {
        tokio::time::sleep(QUIET_FOR).await;
        let now = cpu_times();
        if let (Some((idle, all)), Some((idle_before, all_before))) = (now, before) {
            #[expect(clippy::cast_precision_loss, reason = "a share, of some hundred ticks")]
            let share = (idle - idle_before) as f64 / (all - all_before).max(1) as f64;
            if share >= QUIET_SHARE {
                return;
            }
        }
        before = now;
    }
    info!("the guest did not become quiet");
}

/// Idle and all ticks of all processors (proc(5), `/proc/stat`).
fn cpu_times() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    Some((ticks.get(3)? + ticks.get(4)?, ticks.iter().sum()))
}

async fn stop_units(agent: &Agent) -> Result<(), PrepareError> {
    let names: Vec<String> = agent.other_units().map(str::to_owned).collect();
    if names.is_empty() {
        return Ok(());
    }
    let mut systemd = Systemd::connect().await?;
    // What was started last goes first.
    for unit in names.iter().rev() {
        systemd.stop(unit).await?;
    }
    stopped(&mut systemd, &names).await
}

/// Waits until none of the units runs.
pub(crate) async fn stopped(systemd: &mut Systemd, names: &[String]) -> Result<(), PrepareError> {
    let deadline = Instant::now() + STOP_WAIT;
    loop {
        let units = systemd.named(names).await?;
        let running = units
            .iter()
            .find(|unit| !matches!(unit.active.as_str(), "inactive" | "failed"));
        match running {
            None => return Ok(()),
            Some(unit) if Instant::now() >= deadline => {
                return Err(PrepareError::Running(unit.name.clone()));
            }
            Some(_) => tokio::time::sleep(STOP_LOOK).await,
        }
    }
}

/// Takes free memory and gives it back. The kernel hands out pages as zeros, and they are written to as zeros.
fn clear_free_memory() {
    // What names and inodes were known is looked up again in no time, and is scattered over many pages.
    let _ = fs::write("/proc/sys/vm/drop_caches", "2");
    let _ = fs::write("/proc/sys/vm/compact_memory", "1");
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    let (Some(free), Some(wanted)) = (free_kib(), wanted_kib()) else {
        return;
    };
    // No more than is free now, whatever the kernel frees meanwhile.
    let most = free.saturating_sub(wanted + LEAVE_KIB) / (PIECE as u64 >> 10);
    for _ in 0..most {
        if free_kib().is_none_or(|free| free < wanted + LEAVE_KIB) {
            break;
        }
        let mut piece = vec![0u8; PIECE];
        for page in piece.chunks_mut(4096) {
            page[0] = 0;
            std::hint::black_box(page);
        }
        pieces.push(piece);
    }
    info!(mib = pieces.len() * (PIECE >> 20), "cleared free memory");
}

fn free_kib() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemFree:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What the kernel wants to have free, over all zones (proc(5), `/proc/zoneinfo`): above it nothing is dropped.
fn wanted_kib() -> Option<u64> {
    let text = fs::read_to_string("/proc/zoneinfo").ok()?;
    let pages: u64 = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("high "))
        .filter_map(|rest| rest.trim().parse::<u64>().ok())
        .sum();
    Some(pages * 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_understood() {
        let (idle, all) = cpu_times().unwrap();
        assert!(idle <= all && free_kib().unwrap() > 0 && wanted_kib().unwrap() > 0);
    }
}

//! What a browser in a VM has of an earlier life: connections, names that were looked up, cookies, pages. Looked for in the
//! guest by `inherited.js`, which is shown to find each of it in a browser that was used.
use crate::{guest::run_in, support::Running};
use std::time::{Duration, Instant};
use vestibule_api::{agent::ExecUser, time::Timestamp};

/// Chromium writes cookies down after half a minute; three browsers on two cores need longer.
const WRITTEN: Duration = Duration::from_secs(180);

/// What the guest's browser has that is older than `since`, by the guest's clock; a line each, the kind first.
pub(crate) async fn found(runner: &Running, since: Timestamp) -> Vec<String> {
    look(runner, since, "").await
}

async fn look(runner: &Running, since: Timestamp, before: &str) -> Vec<String> {
    let script = include_str!("inherited.js");
    let since = since.as_micros() / 1_000_000;
    let script = format!(
        "{before}\ncat > /tmp/inherited.js <<'END'\n{script}END\n/usr/local/bin/node --no-warnings /tmp/inherited.js {since}"
    );
    let reply = run_in(runner, ExecUser::Root, &script, 120).await;
    let mut lines: Vec<_> = reply.stdout.lines().map(str::to_owned).collect();
    // The last line is the script's own: it came to its end.
    assert_eq!(lines.pop().as_deref(), Some("looked"), "{reply:?}");
    lines
}

/// A browser that was used for a page of `host`, which keeps its connection, set a cookie, wrote into storage and may be
/// cached: each is found, and a datagram to a resolver is.
pub(crate) async fn finds_what_was_planted(runner: &Running, host: &str) {
    let begun = Instant::now();
    let wanted = [
        ("connection", "network.mojom.NetworkService"),
        ("datagrams", "0100007F:0035"),
        ("cookie", host),
        ("history", host),
        ("local-storage", host),
        ("session-storage", host),
        ("cache", host),
    ];
    loop {
        // Now: everything that is there is older.
        let since = Timestamp::now();
        let lines = look(runner, since, "exec 3<>/dev/udp/127.0.0.1/53").await;
        let has = |(kind, what): &(&str, &str)| {
            lines
                .iter()
                .any(|line| line.split(' ').next() == Some(kind) && line.contains(what))
        };
        let missing: Vec<_> = wanted.iter().filter(|wanted| !has(wanted)).collect();
        if missing.is_empty() {
            println!(
                "all that was planted is found after {:.1} s",
                begun.elapsed().as_secs_f64()
            );
            return;
        }
        assert!(begun.elapsed() < WRITTEN, "{missing:?} not in {lines:#?}");
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

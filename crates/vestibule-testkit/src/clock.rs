//! What a guest's clock says, beside the host's.
use anyhow::{Context, Result, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use std::time::Duration;
use tokio_tungstenite::tungstenite::Message;
use vestibule_api::{client::Runner, time::Timestamp};

/// What a shell is told to say the time: bash's own variable, so that no program is started.
const ASK: &str = "echo \"now=$EPOCHREALTIME\"\n";
/// The exchange that tells most counts: on a busy machine most take long, and tell little.
const EXCHANGES: usize = 60;
/// It is off by no more than this: that is near enough.
const NEAR_MICROS: i64 = 30_000;
const PATIENCE: Duration = Duration::from_secs(120);

/// How far the guest's clock may be off, in ms: by how much it is off the middle of an exchange, and how long half of that took.
///
/// # Errors
/// When the VM has no shell (one that belongs to a session has none), or says no time.
pub async fn error_ms(runner: &Runner) -> Result<f64> {
    tokio::time::timeout(PATIENCE, ask(runner))
        .await
        .context("ask a guest for its time")?
}

async fn ask(runner: &Runner) -> Result<f64> {
    let url = "ws://vestibule/agent/shell?cols=80&rows=24";
    let (mut shell, _) = tokio_tungstenite::client_async(url, runner.dial().await?)
        .await
        .context("open a shell in the VM")?;
    let mut said = String::new();
    let mut best = i64::MAX;
    for _ in 0..EXCHANGES {
        let asked = Timestamp::now().as_micros();
        shell.send(Message::binary(ASK)).await?;
        let guest = loop {
            match shell.next().await.context("the shell ended")?? {
                Message::Binary(bytes) => said.push_str(&String::from_utf8_lossy(&bytes)),
                Message::Close(_) => bail!("the shell was closed; it said {said:?}"),
                Message::Text(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
            if let Some(time) = time(&said) {
                break time;
            }
        };
        let answered = Timestamp::now().as_micros();
        said.clear();
        let off = (i64::midpoint(asked, answered) - guest).abs();
        best = best.min(off + (answered - asked) / 2);
        if best <= NEAR_MICROS {
            break;
        }
    }
    Ok(best as f64 / 1000.0)
}

/// The last time that was said, whole, in µs; what the terminal echoes of the question is none.
fn time(said: &str) -> Option<i64> {
    let (time, _) = said.rsplit_once("now=")?.1.split_once('\r')?;
    time.replace(['.', ','], "").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echoed_question_is_no_answer() {
        assert_eq!(time("root@vm:~# echo \"now=$EPOCHREALTIME\"\r\n"), None);
        assert_eq!(time("\"now=$EPOCHREALTIME\"\r\nnow=17"), None);
        assert_eq!(time("x\r\nnow=12.000345\r\n$ "), Some(12_000_345));
    }
}

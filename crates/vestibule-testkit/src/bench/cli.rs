//! `vestibule-testkit bench` and `vestibule-testkit pour`.
use super::{
    NAMES,
    relay::{pour, stream::Pattern},
    run,
};
use anyhow::{Context, Result, bail};
use camino::Utf8PathBuf;
use std::io::Write as _;

/// How the two commands are called.
pub const USAGE: &str =
    "vestibule-testkit bench NAME… [--json]         images, boot, connect, warm, overhead, diagnose, latency, relay, memory, load
vestibule-testkit pour --pattern bulk|updates|paced [--plain SOCKET | --websocket FILE]";

/// Runs `bench` or `pour` with these words.
///
/// # Errors
/// When the words are not understood, or a bench fails.
pub async fn main(command: &str, words: impl Iterator<Item = String>) -> Result<()> {
    let words: Vec<String> = words.collect();
    match command {
        "bench" => bench(&words).await,
        "pour" => pour(&words).await,
        _ => bail!("usage:\n{USAGE}"),
    }
}

/// One report for each name; with `--json` one line of JSON.
async fn bench(words: &[String]) -> Result<()> {
    let json = words.iter().any(|word| word == "--json");
    let names: Vec<&str> = words
        .iter()
        .map(String::as_str)
        .filter(|word| *word != "--json")
        .collect();
    if names.is_empty() {
        bail!("which bench? There are {}", NAMES.join(", "));
    }
    for name in names {
        let report = run(name).await.with_context(|| format!("bench `{name}`"))?;
        let text = if json {
            serde_json::to_string(&report)?
        } else {
            report.to_string()
        };
        writeln!(std::io::stdout().lock(), "{text}").context("print the report")?;
    }
    Ok(())
}

/// The far end of [`super::relay`]: a runner whose specification is on standard input, or a plain socket.
async fn pour(words: &[String]) -> Result<()> {
    let option = |name: &str| {
        let at = words.iter().position(|word| word == name)?;
        words.get(at + 1).cloned()
    };
    let pattern = option("--pattern").context("`--pattern` is missing")?;
    let pattern =
        Pattern::from_id(&pattern).with_context(|| format!("there is no pattern `{pattern}`"))?;
    match (option("--plain"), option("--websocket")) {
        (Some(path), _) => pour::plain(&Utf8PathBuf::from(path), pattern),
        (None, Some(path)) => pour::websocket(&Utf8PathBuf::from(path), pattern),
        (None, None) => {
            let spec =
                std::io::read_to_string(std::io::stdin()).context("read the VM's specification")?;
            pour::runner(
                serde_json::from_str(&spec).context("understand the VM's specification")?,
                pattern,
            )
            .await
        }
    }
}

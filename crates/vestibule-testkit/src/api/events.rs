//! Server-sent events (WHATWG HTML, section 9.2), as far as the controller uses them.
use anyhow::{Context, Result, ensure};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use vestibule_api::session::SessionEvent;

/// Reads events until the stream ends or one is `enough`. Each must have its `seq` as the SSE id.
pub(super) async fn read(
    mut body: Incoming,
    mut enough: impl FnMut(&SessionEvent) -> bool,
) -> Result<Vec<SessionEvent>> {
    let mut events = Vec::new();
    let mut text = String::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.context("read the event stream")?;
        let Some(data) = frame.data_ref() else {
            continue;
        };
        text.push_str(&String::from_utf8_lossy(data));
        while let Some(end) = text.find("\n\n") {
            let block: String = text.drain(..end + 2).collect();
            let Some(event) = parse(&block)? else {
                continue;
            };
            let last = enough(&event);
            events.push(event);
            if last {
                return Ok(events);
            }
        }
    }
    Ok(events)
}

fn field<'a>(block: &'a str, name: &str) -> Option<&'a str> {
    block
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim_start)
}

/// The event of a block; `None` for a comment.
fn parse(block: &str) -> Result<Option<SessionEvent>> {
    let Some(data) = field(block, "data") else {
        return Ok(None);
    };
    let event: SessionEvent = serde_json::from_str(data).context("understand an event")?;
    let id = field(block, "id").unwrap_or_default();
    ensure!(
        id == event.seq.to_string(),
        "the event {} has the SSE id `{id}`",
        event.seq
    );
    Ok(Some(event))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_needs_its_id_and_a_comment_is_none() {
        let data = r#"{"seq":3,"at":"2026-11-23T09:00:00Z","event":{"type":"browser-restarted"}}"#;
        let event = parse(&format!(
            "id: 3\nevent: browser-restarted\ndata: {data}\n\n"
        ))
        .unwrap();
        assert_eq!(event.unwrap().seq, 3);
        assert!(parse(&format!("id: 4\ndata: {data}\n\n")).is_err());
        assert!(parse(": heartbeat\n\n").unwrap().is_none());
    }
}

//! Whatever an agent answers: damaged replies and events, and bytes that are neither.
#![expect(clippy::unwrap_used, reason = "in a test an error is a failure")]
#[path = "property/replies.rs"]
mod replies;

use proptest::prelude::*;
use replies::{hear, understand};
use serde_json::{Value, json};

/// What agents say.
fn said() -> Vec<Value> {
    let at = "2026-11-23T09:00:00.000001Z";
    let health = json!({"status": "ready", "version": "0.1.0", "build": "0".repeat(64), "api": 1, "capabilities": ["browser"],
        "uptimeMs": 7, "waitingFor": []});
    let unit = json!({"name": "a.service", "load": "loaded", "active": "failed", "sub": "failed", "mainExit": 1});
    let quote = json!({"source": "terminal", "line": 3, "text": "error: denied"});
    let finding = json!({"cause": "consent-denied", "stage": "provider", "evidence": [quote], "why": "it says so", "fix": "again",
        "retryable": true, "refutes": "nothing"});
    let steps = [
        json!({"step": "started", "provider": "codex", "flow": "browser", "sessionId": "018f0000-0000-7000-8000-000000000001"}),
        json!({"step": "url-captured", "source": "shim", "host": "auth.openai.com", "path": "/oauth"}),
        json!({"step": "url-refused", "source": "osc8", "host": "evil.test", "why": "not named"}),
        json!({"step": "user-code", "code": "ABCD-1234"}),
        json!({"step": "prompted", "prompt": 4_294_967_295_u32}),
        json!({"step": "credential-partial", "rule": "auth", "why": "it is empty"}),
        json!({"step": "captured", "account": "alice@example.test", "expiresAt": "9999-12-30T22:00:00.999999999Z"}),
        json!({"step": "failed", "finding": finding}),
        json!({"step": "cancelled"}),
    ];
    let mut all = vec![
        json!({"type": "starting", "waitingFor": ["x.service"]}),
        json!({"type": "painted", "width": 1280, "height": 800}),
        json!({"type": "ready", "health": health}),
        json!({"type": "unit", "unit": unit}),
        json!({"type": "browser-restarted"}),
    ];
    all.extend(steps.map(|event| json!({"type": "login", "event": event})));
    let mut all: Vec<_> = (1_u64..)
        .zip(all)
        .map(|(seq, event)| json!({"seq": seq, "at": at, "event": event}))
        .collect();
    all.extend([
        health,
        json!({"at": at, "kernel": "6.1", "units": [unit], "memory": {"totalKib": 1, "pressureAvg10": 0.1}}),
        json!({"nowMicros": i64::MIN}),
        json!({"sealed": "AAAA"}),
        json!({"code": 0, "stdout": "", "stderr": "", "truncated": false, "timedOut": false}),
        json!({"message": "no", "cause": "tool-failed"}),
        json!({"files": [{"rule": "auth", "path": "a", "mode": 384, "content": "e30="}], "account": null, "expiresAt": null}),
    ]);
    all
}

/// Every place of a value where another could stand.
fn places(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    match value {
        Value::Object(map) => map
            .iter()
            .for_each(|(key, value)| places(value, &format!("{at}/{key}"), all)),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .for_each(|(i, value)| places(value, &format!("{at}/{i}"), all)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn anything() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<String>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        Just(Value::Null),
        Just(json!([])),
        Just(json!({"type": "login"})),
        "[0-9]{4,6}-12-31T23:59:60(\\.[0-9]{1,12})?[Z+-]".prop_map(Value::from),
        (100_usize..100_000).prop_map(|n| "\u{1}x".repeat(n).into()),
    ]
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
}

/// What agents say is understood as something, so that the damage below begins at what is read.
#[test]
fn what_agents_say_is_understood() {
    for value in said() {
        let text = value.to_string();
        understand(text.as_bytes());
        let line = serde_json::from_str::<vestibule_api::agent::AgentEventLine>(&text);
        assert_eq!(line.is_ok(), value.get("seq").is_some(), "{text}: {line:?}");
    }
}

proptest! {
    #[test]
    fn any_value_may_stand_in_a_reply(which in any::<prop::sample::Index>(), place in any::<prop::sample::Index>(), other in anything()) {
        let mut all = said();
        let count = all.len();
        let value = &mut all[which.index(count)];
        let mut at = Vec::new();
        places(value, "", &mut at);
        *value.pointer_mut(place.get::<String>(&at)).unwrap() = other;
        understand(value.to_string().as_bytes());
    }

    #[test]
    fn any_bytes_may_be_a_reply(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        understand(&bytes);
        runtime().block_on(hear(&bytes));
    }

    #[test]
    fn any_bytes_may_stand_in_a_reply(
        which in any::<prop::sample::Index>(), from in 0_usize..400, length in 0_usize..20, junk in prop::collection::vec(any::<u8>(), 0..20),
        head in prop_oneof![
            Just("HTTP/1.1 200 OK\r\n\r\n".to_owned()),
            Just("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_owned()),
            Just("HTTP/1.1 500 x\r\ncontent-length: 18446744073709551615\r\n\r\n".to_owned()),
            (0_u16..1000, 0_u64..1 << 40).prop_map(|(status, length)| format!("HTTP/1.1 {status} x\r\ncontent-length: {length}\r\n\r\n")),
        ],
    ) {
        let all = said();
        let text = which.get(&all).to_string().into_bytes();
        let from = from.min(text.len());
        let to = (from + length).min(text.len());
        let damaged = [&text[..from], &junk, &text[to..]].concat();
        understand(&damaged);
        let event = [b"id: 3\ndata: ".as_slice(), &damaged, b"\n\n"].concat();
        for body in [damaged, event] {
            runtime().block_on(hear(&[head.as_bytes(), &body].concat()));
        }
    }
}

/// A body that does not end is not read to its end.
#[test]
fn a_reply_is_bounded() {
    let endless = [
        b"HTTP/1.1 200 OK\r\n\r\n".as_slice(),
        &vec![b' '; vestibule_api::client::BODY_LIMIT + (1 << 20)],
    ];
    runtime().block_on(hear(&endless.concat()));
}

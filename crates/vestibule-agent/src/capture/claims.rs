//! Values inside a parsed credential: by JSON pointer (RFC 6901, with `*` for any one key), and inside a JWT's claims.
//!
//! A JWT (RFC 7519) is decoded and not verified: its claims name an account for people to read, and an expiry to refresh
//! by. Nothing is allowed because of them.
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::Value;
use vestibule_api::{
    pack::{ExpiresAt, ExpiryUnit},
    time::Timestamp,
};

/// Names longer than this are not shown.
const ACCOUNT_LIMIT: usize = 200;

/// Whether `pointer` leads to a value that is not empty.
pub(super) fn has(value: &Value, pointer: &str) -> bool {
    find(value, pointer).is_some()
}

/// The first value that is not empty at `pointer`.
fn find<'a>(value: &'a Value, pointer: &str) -> Option<&'a Value> {
    let Some(rest) = pointer.strip_prefix('/') else {
        return (pointer.is_empty() && !is_empty(value)).then_some(value);
    };
    let (key, rest) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    if key == "*" {
        let children: Vec<&Value> = match value {
            Value::Object(map) => map.values().collect(),
            Value::Array(items) => items.iter().collect(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Vec::new(),
        };
        return children.into_iter().find_map(|child| find(child, rest));
    }
    let key = key.replace("~1", "/").replace("~0", "~");
    let child = match value {
        Value::Object(map) => map.get(&key),
        Value::Array(items) => key.parse::<usize>().ok().and_then(|index| items.get(index)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    };
    find(child?, rest)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(_) | Value::Number(_) => false,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

/// A name of the account: at `pointer`, or for `jwt:/pointer#/claim` in the claims of the JWT at `/pointer`.
pub(super) fn account(value: &Value, pointer: &str) -> Option<String> {
    let name = match pointer.strip_prefix("jwt:") {
        Some(inside) => {
            let (token, claim) = inside.split_once('#')?;
            find(&claims(find(value, token)?.as_str()?)?, claim)?
                .as_str()?
                .to_owned()
        }
        None => find(value, pointer)?.as_str()?.to_owned(),
    };
    let shown = name.chars().count() <= ACCOUNT_LIMIT && !name.chars().any(char::is_control);
    shown.then_some(name)
}

/// The moment at which the credential expires.
pub(super) fn expiry(value: &Value, rule: &ExpiresAt) -> Option<Timestamp> {
    let found = find(value, &rule.pointer)?;
    match rule.unit {
        ExpiryUnit::S => seconds(found),
        ExpiryUnit::Ms => Some(Timestamp::from_micros(number(found)?.checked_mul(1000)?)),
        ExpiryUnit::Rfc3339 => {
            let moment: jiff::Timestamp = found.as_str()?.parse().ok()?;
            Some(Timestamp::from_micros(moment.as_microsecond()))
        }
        ExpiryUnit::Jwt => seconds(claims(found.as_str()?)?.get("exp")?),
    }
}

fn seconds(value: &Value) -> Option<Timestamp> {
    Some(Timestamp::from_micros(
        number(value)?.checked_mul(1_000_000)?,
    ))
}

/// A whole number, also where a tool wrote it as text or with a fraction.
fn number(value: &Value) -> Option<i64> {
    match value {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a saturating cast: a moment beyond every calendar"
        )]
        Value::Number(number) => number
            .as_i64()
            .or_else(|| number.as_f64().map(|float| float as i64)),
        Value::String(text) => text.trim().parse().ok(),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

/// The claims of a JWT, its signature not looked at.
pub(crate) fn claims(token: &str) -> Option<Value> {
    let mut parts = token.split('.');
    let (_, payload) = (parts.next()?, parts.next()?);
    parts.next()?;
    let bytes = URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Drops a parsed credential with its strings overwritten.
pub(super) fn forget(value: Value) {
    match value {
        Value::String(mut text) => zeroize::Zeroize::zeroize(&mut text),
        Value::Array(items) => items.into_iter().for_each(forget),
        Value::Object(map) => map.into_iter().for_each(|(_, value)| forget(value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pointers_lead_to_values_that_are_not_empty() {
        let value = json!({"hosts": {"a": {"token": ""}, "b": {"token": "t"}}, "list": [{"x": 1}], "a/b": {"~": true}, "no": null});
        for good in [
            "/hosts/b/token",
            "/hosts/*/token",
            "/*/*/token",
            "/list/0/x",
            "/list/*/x",
            "/a~1b/~0",
            "",
        ] {
            assert!(has(&value, good), "{good}");
        }
        for bad in [
            "/hosts/a/token",
            "/hosts/c",
            "/list/1",
            "/no",
            "/no/x",
            "hosts",
            "/hosts/b/token/x",
            "/list/-1",
        ] {
            assert!(!has(&value, bad), "{bad}");
        }
    }

    #[test]
    fn account_and_expiry_come_from_where_the_pack_says() {
        let payload = URL_SAFE_NO_PAD.encode(r#"{"email":"alice@example.test","exp":1800000000}"#);
        let value = json!({"id": format!("e30.{payload}.sig"), "bad": "e30.%.sig", "ms": 1_800_000_000_123_i64, "s": "1800000000",
            "at": "2027-01-15T08:00:00Z", "name": "al\u{1b}ice"});
        assert_eq!(
            account(&value, "jwt:/id#/email").as_deref(),
            Some("alice@example.test")
        );
        for none in ["jwt:/id#/sub", "jwt:/bad#/email", "jwt:/id", "/name", "/ms"] {
            assert_eq!(account(&value, none), None, "{none}");
        }
        let at = |pointer: &str, unit| {
            expiry(
                &value,
                &ExpiresAt {
                    pointer: pointer.into(),
                    unit,
                },
            )
            .map(Timestamp::as_micros)
        };
        assert_eq!(at("/id", ExpiryUnit::Jwt), Some(1_800_000_000_000_000));
        assert_eq!(at("/ms", ExpiryUnit::Ms), Some(1_800_000_000_123_000));
        assert_eq!(at("/s", ExpiryUnit::S), Some(1_800_000_000_000_000));
        assert_eq!(at("/at", ExpiryUnit::Rfc3339), Some(1_800_000_000_000_000));
        assert_eq!(at("/bad", ExpiryUnit::Jwt), None);
    }
}

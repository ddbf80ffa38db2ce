//! The formats that tools write, each parsed to one JSON value in which a rule's pointers are looked up.
use regex::Regex;
use serde_json::{Map, Value};
use vestibule_api::pack::{CredentialFormat, CredentialRule};
use yaml_rust2::{Event, Yaml, YamlLoader, parser::Parser};

/// Lists and tables in one another; the other formats' parsers have a limit of their own.
const NESTING_LIMIT: usize = 64;

/// Why bytes are not what the rule says. Never quotes them: they may be half a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FormatError {
    #[error("it is not UTF-8")]
    NotText,
    #[error("it is not yet complete {format} (line {line})")]
    Json { format: &'static str, line: usize },
    #[error("it is not yet complete {0}")]
    Other(&'static str),
    #[error("its text does not match the pattern of the pack")]
    Pattern,
}

/// Parses `bytes` as `rule.format`. Text is a string, a netrc file an object by machine, opaque bytes are null.
pub(super) fn parse(rule: &CredentialRule, bytes: &[u8]) -> Result<Value, FormatError> {
    let text = || std::str::from_utf8(bytes).map_err(|_| FormatError::NotText);
    match rule.format {
        CredentialFormat::Json => serde_json::from_slice(bytes).map_err(|err| FormatError::Json {
            format: "JSON",
            line: err.line(),
        }),
        CredentialFormat::Jsonc => jsonc(text()?),
        CredentialFormat::Toml => toml::from_str(text()?).map_err(|_| FormatError::Other("TOML")),
        CredentialFormat::Yaml => yaml(text()?),
        CredentialFormat::Netrc => netrc(text()?),
        CredentialFormat::Text => plain(text()?, rule.pattern.as_deref()),
        CredentialFormat::Opaque => Ok(Value::Null),
    }
}

fn jsonc(text: &str) -> Result<Value, FormatError> {
    let parsed: Value = jsonc_parser::parse_to_serde_value(text, &Default::default())
        .map_err(|_| FormatError::Other("JSON with comments"))?;
    // A file with comments alone parses to null.
    if parsed.is_null() {
        Err(FormatError::Other("JSON with comments"))
    } else {
        Ok(parsed)
    }
}

/// One document.
fn yaml(text: &str) -> Result<Value, FormatError> {
    if !is_plain(text) {
        return Err(FormatError::Other("YAML"));
    }
    let documents = YamlLoader::load_from_str(text).map_err(|_| FormatError::Other("YAML"))?;
    documents
        .first()
        .map(yaml_value)
        .ok_or(FormatError::Other("YAML"))
}

/// Whether the loader, which calls itself for what is nested and copies what an alias stands for, may read it. No tool writes
/// aliases into its credentials.
fn is_plain(text: &str) -> bool {
    let mut events = Parser::new_from_str(text);
    let mut depth = 0_usize;
    loop {
        match events.next_token() {
            Ok((Event::SequenceStart(..) | Event::MappingStart(..), _))
                if depth < NESTING_LIMIT =>
            {
                depth += 1;
            }
            Ok((Event::SequenceEnd | Event::MappingEnd, _)) => depth = depth.saturating_sub(1),
            Ok((Event::StreamEnd, _)) => return true,
            Ok((Event::SequenceStart(..) | Event::MappingStart(..) | Event::Alias(_), _))
            | Err(_) => {
                return false;
            }
            Ok((
                Event::Nothing
                | Event::StreamStart
                | Event::DocumentStart
                | Event::DocumentEnd
                | Event::Scalar(..),
                _,
            )) => {}
        }
    }
}

fn yaml_value(yaml: &Yaml) -> Value {
    match yaml {
        Yaml::Real(text) | Yaml::String(text) => Value::String(text.clone()),
        Yaml::Integer(number) => Value::from(*number),
        Yaml::Boolean(flag) => Value::Bool(*flag),
        Yaml::Array(items) => items.iter().map(yaml_value).collect(),
        Yaml::Hash(entries) => entries
            .iter()
            .filter_map(|(key, value)| Some((yaml_key(key)?, yaml_value(value))))
            .collect(),
        Yaml::Alias(_) | Yaml::Null | Yaml::BadValue => Value::Null,
    }
}

fn yaml_key(key: &Yaml) -> Option<String> {
    match yaml_value(key) {
        Value::String(text) => Some(text),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

/// netrc(5): `machine NAME login L password P`, tokens apart by white space; `default` has no name.
fn netrc(text: &str) -> Result<Value, FormatError> {
    let mut machines = Map::new();
    let mut entry: Option<(String, Map<String, Value>)> = None;
    let mut words = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .flat_map(str::split_whitespace);
    while let Some(word) = words.next() {
        let begins = match word {
            "machine" => Some(words.next().ok_or(FormatError::Other("netrc"))?.to_owned()),
            "default" => Some("default".to_owned()),
            _ => None,
        };
        if let Some(name) = begins {
            machines.extend(
                entry
                    .replace((name, Map::new()))
                    .map(|(name, fields)| (name, Value::Object(fields))),
            );
        } else {
            let (Some((_, fields)), Some(value)) = (entry.as_mut(), words.next()) else {
                return Err(FormatError::Other("netrc"));
            };
            fields.insert(word.to_owned(), value.into());
        }
    }
    machines.extend(entry.map(|(name, fields)| (name, Value::Object(fields))));
    if machines.is_empty() {
        Err(FormatError::Other("netrc"))
    } else {
        Ok(Value::Object(machines))
    }
}

fn plain(text: &str, pattern: Option<&str>) -> Result<Value, FormatError> {
    let text = text.trim();
    let matches = match pattern {
        // Packs are checked when they are loaded; a pattern that does not compile matches nothing.
        Some(pattern) => {
            Regex::new(&format!("^(?:{pattern})$")).is_ok_and(|pattern| pattern.is_match(text))
        }
        None => !text.is_empty(),
    };
    if matches {
        Ok(Value::String(text.to_owned()))
    } else {
        Err(FormatError::Pattern)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[expect(
        clippy::needless_pass_by_value,
        reason = "the cases below read better so"
    )]
    fn check(format: &str, text: &str, expected: Option<Value>) {
        let rule: CredentialRule =
            serde_json::from_value(json!({"id": "x", "path": "x", "format": format})).unwrap();
        assert_eq!(
            parse(&rule, text.as_bytes()).ok(),
            expected,
            "{format}: {text}"
        );
    }

    #[test]
    fn each_format_is_read() {
        check("json", r#"{"a":1}"#, Some(json!({"a": 1})));
        check("json", r#"{"a":1"#, None);
        check(
            "jsonc",
            "// by copilot\n{\"a\": 1, /* two */ \"b\": [2],}",
            Some(json!({"a": 1, "b": [2]})),
        );
        check("jsonc", "// by copilot\n{\"a\": ", None);
        check("jsonc", "// nothing yet\n", None);
        check(
            "toml",
            "oauth_token = \"t\"\nscopes = [\"a\"]\n",
            Some(json!({"oauth_token": "t", "scopes": ["a"]})),
        );
        check("toml", "oauth_token = \"t", None);
        check(
            "yaml",
            "github.localhost:\n  user: me\n  oauth_token: gho_x\n  n: 3\n",
            Some(json!({"github.localhost": {"user": "me", "oauth_token": "gho_x", "n": 3}})),
        );
        check("yaml", "a: [1", None);
        check(
            "netrc",
            "machine h login me password p\nmachine i\n  login you\n",
            Some(json!({"h": {"login": "me", "password": "p"}, "i": {"login": "you"}})),
        );
        check("netrc", "machine h login", None);
        check("netrc", "# nothing\n", None);
        check("text", " token\n", Some(json!("token")));
        check("text", " \n", None);
        check("opaque", "\u{1}", Some(Value::Null));
    }

    #[test]
    fn what_is_made_to_cost_is_refused() {
        let aliases: String = (1..40)
            .map(|i| format!("a{i}: &a{i} [*a{0},*a{0},*a{0},*a{0}]\n", i - 1))
            .collect();
        check("yaml", &format!("a0: &a0 x\n{aliases}"), None);
        check("yaml", &"- ".repeat(100_000), None);
        check("yaml", &"? ".repeat(100_000), None);
        check("yaml", &"{a: ".repeat(200), None);
        check("json", &"[".repeat(100_000), None);
        check("jsonc", &"[".repeat(100_000), None);
        check("toml", &format!("a = {}", "[".repeat(100_000)), None);
        check("toml", &format!("a{} = 1", ".a".repeat(100_000)), None);
    }

    #[test]
    fn a_text_matches_its_whole_pattern() {
        let rule: CredentialRule = serde_json::from_value(
            json!({"id": "x", "path": "x", "format": "text", "pattern": "sbp_[0-9a-f]{4}"}),
        )
        .unwrap();
        assert!(parse(&rule, b"sbp_00ff\n").is_ok());
        assert_eq!(parse(&rule, b"sbp_00ff0"), Err(FormatError::Pattern));
        assert_eq!(parse(&rule, b"sbp_00"), Err(FormatError::Pattern));
        assert_eq!(parse(&rule, b"\xff"), Err(FormatError::NotText));
    }
}

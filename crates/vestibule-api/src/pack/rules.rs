//! The small predicates that packs and overrides are checked with. Each is total: any text gives an answer.
use regex::Regex;
use url::{Host, Url};

/// A regular expression of more bytes than this is refused.
const REGEX_LIMIT: usize = 2048;
/// Compiled, it may take so many bytes.
const REGEX_COMPILED: usize = 1 << 20;

/// Variables that the agent itself sets for every tool, and those that make a loader run other code.
const RESERVED_ENV: [&str; 20] = [
    "ALL_PROXY",
    "BROWSER",
    "DISPLAY",
    "HOME",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "LD_AUDIT",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "LOGNAME",
    "NODE_OPTIONS",
    "NODE_USE_ENV_PROXY",
    "NO_PROXY",
    "PATH",
    "SHELL",
    "TERM",
    "USER",
    "XAUTHORITY",
    "XDG_RUNTIME_DIR",
    "BASH_ENV",
];

pub(super) fn is_slug(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
}

pub(super) fn is_param_name(text: &str) -> bool {
    is_slug(text) && !text.contains('-')
}

/// A name of the portable character set (POSIX.1-2017, XBD section 8.1), lower case included.
pub(super) fn is_env_name(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && !text.starts_with(|c: char| c.is_ascii_digit())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

pub(super) fn is_reserved_env(name: &str) -> bool {
    RESERVED_ENV.contains(&name.to_ascii_uppercase().as_str())
}

/// A normalised absolute path.
pub(super) fn is_program(path: &str) -> bool {
    path.strip_prefix('/').is_some_and(is_relative_path)
}

/// A path whose parts are all names: no `..`, `.`, empty part, NUL or control character.
pub(super) fn is_relative_path(path: &str) -> bool {
    (1..=512).contains(&path.len())
        && !path.contains(char::is_control)
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// One exact host name as RFC 952 and RFC 1123 have it, in lower case: no address, port or wildcard.
pub fn is_host(text: &str) -> bool {
    let labels = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    text.len() <= 253
        && text.split('.').all(labels)
        && matches!(Host::parse(text), Ok(Host::Domain(_)))
}

/// An exact host name or `*.` and one.
pub(super) fn is_host_pattern(text: &str) -> bool {
    is_host(text.strip_prefix("*.").unwrap_or(text))
}

/// A URL of more bytes than this is refused unread.
const URL_LIMIT: usize = 2048;

fn plain_url(text: &str) -> Option<Url> {
    if text.len() > URL_LIMIT {
        return None;
    }
    let url = Url::parse(text).ok()?;
    (url.username().is_empty() && url.password().is_none() && url.has_host()).then_some(url)
}

pub(super) fn is_https_url(text: &str) -> bool {
    plain_url(text).is_some_and(|url| url.scheme() == "https")
}

pub(super) fn is_https_origin(text: &str) -> bool {
    plain_url(text)
        .is_some_and(|url| url.scheme() == "https" && url.origin().ascii_serialization() == text)
}

/// An https page, or an http one on the guest's own loopback.
pub(super) fn is_page(text: &str) -> bool {
    plain_url(text).is_some_and(|url| match url.scheme() {
        "https" => true,
        "http" => matches!(url.host_str(), Some("127.0.0.1" | "localhost")),
        _ => false,
    })
}

/// An issuer identifier (OpenID Connect Discovery 1.0, section 3).
pub(super) fn is_issuer(text: &str, allow_http: bool) -> bool {
    plain_url(text).is_some_and(|url| {
        (url.scheme() == "https" || (allow_http && url.scheme() == "http"))
            && url.query().is_none()
            && url.fragment().is_none()
    })
}

/// A scope token of RFC 6749 section 3.3.
pub(super) fn is_scope(text: &str) -> bool {
    (1..=200).contains(&text.len())
        && text
            .bytes()
            .all(|b| matches!(b, 0x21 | 0x23..=0x5b | 0x5d..=0x7e))
}

/// One version of a package, as npm, Debian or pip write it: no range, no tag.
pub(super) fn is_exact_version(text: &str) -> bool {
    (1..=100).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_digit())
        && !text.ends_with(".x")
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".+-~:".contains(&b))
}

/// A JSON pointer (RFC 6901) that leads somewhere below the root.
pub(super) fn is_pointer(text: &str) -> bool {
    let escaped = |part: &str| {
        part.split('~')
            .skip(1)
            .all(|rest| rest.starts_with(['0', '1']))
    };
    (2..=512).contains(&text.len()) && text.starts_with('/') && text.split('/').all(escaped)
}

/// A pointer, or `jwt:/pointer#/claim`.
pub(super) fn is_account_pointer(text: &str) -> bool {
    match text.strip_prefix("jwt:") {
        Some(rest) => rest
            .split_once('#')
            .is_some_and(|(token, claim)| is_pointer(token) && is_pointer(claim)),
        None => is_pointer(text),
    }
}

fn compile(pattern: &str) -> Result<Regex, regex::Error> {
    regex::RegexBuilder::new(pattern)
        .size_limit(REGEX_COMPILED)
        .build()
}

/// What is wrong with a regular expression that must have so many groups, if anything.
pub(super) fn regex_problem(pattern: &str, groups: usize) -> Option<String> {
    if pattern.is_empty() || pattern.len() > REGEX_LIMIT {
        return Some(format!(
            "{} bytes; expected a regular expression of 1 to {REGEX_LIMIT}",
            pattern.len()
        ));
    }
    match compile(pattern) {
        Err(err) => Some(format!(
            "not a regular expression: {}",
            last_line(&err.to_string())
        )),
        Ok(regex) if regex.captures_len() <= groups => Some(format!(
            "has {} groups; expected at least {groups}, the first is what is taken",
            regex.captures_len() - 1
        )),
        Ok(regex) if regex.is_match("") && groups == 0 => {
            Some("matches the empty text, so it would always match".into())
        }
        Ok(_) => None,
    }
}

/// The regex crate draws the pattern first and says what is wrong in the last line.
fn last_line(message: &str) -> String {
    message
        .lines()
        .last()
        .unwrap_or_default()
        .replace("error: ", "")
}

/// Whether the whole of `text` matches; `None` where the pattern is no regular expression, or can't stand in a larger one (it
/// ends in a comment of its own).
pub(super) fn matches_whole(pattern: &str, text: &str) -> Option<bool> {
    compile(&format!(r"\A(?:{pattern})\z"))
        .ok()
        .map(|regex| regex.is_match(text))
}

/// Index and value of everything that stood in the list before.
pub(super) fn duplicates<'a>(
    values: impl Iterator<Item = &'a str>,
) -> impl Iterator<Item = (usize, &'a str)> {
    let mut seen = std::collections::BTreeSet::new();
    values
        .enumerate()
        .filter(move |(_, value)| !seen.insert(*value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_plain_names() {
        for good in [
            "auth.openai.com",
            "localhost",
            "xn--bcher-kva.example",
            "a1.b-c.d",
        ] {
            assert!(is_host(good), "{good}");
        }
        for bad in [
            "",
            "*.openai.com",
            "auth.openai.com:443",
            "https://a.b",
            "A.b",
            "a..b",
            "a.b.",
            "127.0.0.1",
            "[::1]",
            "1.2",
            "a_b.c",
            "-a.b",
            "user@a.b",
            "a/b",
            "a b",
        ] {
            assert!(!is_host(bad), "{bad}");
        }
    }

    #[test]
    fn paths_stay_below_home() {
        for good in [".codex/auth.json", ".netrc", "a/b c"] {
            assert!(is_relative_path(good), "{good}");
        }
        for bad in [
            "",
            "/etc/passwd",
            "../x",
            "a/../b",
            "a//b",
            "a/",
            "./a",
            "a\0b",
            "a\nb",
        ] {
            assert!(!is_relative_path(bad), "{bad}");
        }
        assert!(
            is_program("/usr/local/bin/codex") && !is_program("codex") && !is_program("/a/../b")
        );
    }

    #[test]
    fn pointers_versions_and_issuers() {
        assert!(
            is_pointer("/a/*/b~1c") && !is_pointer("a") && !is_pointer("/") && !is_pointer("/a~2")
        );
        assert!(is_account_pointer("jwt:/tokens/id_token#/email") && !is_account_pointer("jwt:/a"));
        assert!(is_exact_version("2.23.0+dfsg1-1") && is_exact_version("0.0.1790142911"));
        for range in ["latest", "^1.2.3", ">=1", "1.x", "*", ""] {
            assert!(!is_exact_version(range), "{range}");
        }
        assert!(
            is_issuer("https://id.example/realm", false) && !is_issuer("http://id.example", false)
        );
        assert!(
            is_issuer("http://id.example:80", true) && !is_issuer("https://id.example/?a", true)
        );
    }

    #[test]
    fn a_regex_says_what_is_wrong() {
        assert_eq!(regex_problem("a(b)", 1), None);
        assert!(regex_problem("ab", 1).unwrap().contains("0 groups"));
        assert!(regex_problem("a(", 0).unwrap().contains("unclosed group"));
        assert!(regex_problem("a*", 0).unwrap().contains("empty text"));
        assert!(regex_problem(r"(\w{1000}){1000}", 0).is_some());
        assert_eq!(matches_whole("a|bc", "abc"), Some(false));
    }
}

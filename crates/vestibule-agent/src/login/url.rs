//! Which URLs may be opened: the pack's rule, applied to the parsed URL. This is a security boundary (a tool, or
//! whatever speaks in its name, must not send the person to a page of its choosing), so hosts match exactly.
use regex::Regex;
use std::sync::LazyLock;
use url::{Host, Url};
use vestibule_api::pack::UrlRule;

/// Longer ones are not URLs of a sign-in.
const URL_LIMIT: usize = 16 * 1024;

/// Why a URL is not opened. Never quotes more than scheme, host and a parameter's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UrlError {
    #[error("it is not a URL")]
    Malformed,
    #[error("its scheme is `{0}`, and only https is allowed")]
    Scheme(String),
    #[error("it carries a user name or password")]
    UserInfo,
    #[error("its port is {0}, and only the scheme's own is allowed")]
    Port(u16),
    #[error("its host `{0}` is not one that the pack names")]
    Host(String),
    #[error("its path does not begin with `{0}`")]
    Path(String),
    #[error("it lacks the parameter `{0}`")]
    Lacks(String),
    #[error("it has the parameter `{0}`, which belongs to another way of signing in")]
    Has(String),
}

/// The URL in `text`, if `rule` allows it.
///
/// # Errors
/// The first reason against it.
pub(crate) fn check(rule: &UrlRule, text: &str) -> Result<Url, UrlError> {
    if text.len() > URL_LIMIT || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(UrlError::Malformed);
    }
    let url = Url::parse(text).map_err(|_| UrlError::Malformed)?;
    match url.scheme() {
        "https" => {}
        "http" if rule.allow_http => {}
        other => return Err(UrlError::Scheme(other.chars().take(32).collect())),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(UrlError::UserInfo);
    }
    let host = host_of(&url);
    if !rule
        .hosts
        .iter()
        .any(|allowed| allowed.eq_ignore_ascii_case(&host))
    {
        return Err(UrlError::Host(host));
    }
    // A test server has the port that it got; a vendor has the scheme's.
    if let (Some(port), false) = (url.port(), rule.allow_http) {
        return Err(UrlError::Port(port));
    }
    if let Some(prefix) = rule
        .path_prefix
        .as_deref()
        .filter(|prefix| !url.path().starts_with(prefix))
    {
        return Err(UrlError::Path(prefix.to_owned()));
    }
    let has = |name: &String| url.query_pairs().any(|(key, _)| key == name.as_str());
    if let Some(name) = rule.must_have.iter().find(|name| !has(name)) {
        return Err(UrlError::Lacks(name.clone()));
    }
    match rule.must_not_have.iter().find(|name| has(name)) {
        Some(name) => Err(UrlError::Has(name.clone())),
        None => Ok(url),
    }
}

/// The URL's host as an allow-list writes it; an IPv6 address without brackets.
pub(crate) fn host_of(url: &Url) -> String {
    match url.host() {
        Some(Host::Domain(name)) => name.trim_end_matches('.').to_owned(),
        Some(Host::Ipv4(address)) => address.to_string(),
        Some(Host::Ipv6(address)) => address.to_string(),
        None => String::new(),
    }
}

static IN_TEXT: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r#"https?://[^\s"'<>`\x00-\x1f│┃|]+"#).ok());

/// What looks like a URL in a text, without the punctuation that ends a sentence.
pub(crate) fn find(text: &str) -> impl Iterator<Item = &str> {
    let found = IN_TEXT
        .as_ref()
        .into_iter()
        .flat_map(|pattern| pattern.find_iter(text));
    found.map(|found| {
        found
            .as_str()
            .trim_end_matches(['.', ',', ';', ':', '!', ')', ']', '}'])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(extra: &serde_json::Value) -> UrlRule {
        let mut rule = serde_json::json!({"sources": ["shim"], "hosts": ["auth.openai.com"]});
        rule.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        serde_json::from_value(rule).unwrap()
    }

    #[test]
    fn only_the_packs_hosts_are_opened() {
        let rule = rule(&serde_json::json!({}));
        for good in [
            "https://auth.openai.com/x?y",
            "https://AUTH.openai.com",
            "https://auth.openai.com:443/",
        ] {
            assert!(check(&rule, good).is_ok(), "{good}");
        }
        let host = |name: &str| UrlError::Host(name.into());
        for (bad, why) in [
            ("http://auth.openai.com/", UrlError::Scheme("http".into())),
            ("file:///etc/passwd", UrlError::Scheme("file".into())),
            ("javascript:alert(1)", UrlError::Scheme("javascript".into())),
            ("https://evil.test/?auth.openai.com", host("evil.test")),
            (
                "https://auth.openai.com.evil.test/",
                host("auth.openai.com.evil.test"),
            ),
            ("https://xauth.openai.com/", host("xauth.openai.com")),
            ("https://auth.openai.com@evil.test/", UrlError::UserInfo),
            ("https://evil.test\\@auth.openai.com/", host("evil.test")),
            ("https://auth.openai.com:8443/", UrlError::Port(8443)),
            ("https://аuth.openai.com/", host("xn--uth-5cd.openai.com")),
            ("https://auth.openai.com/ --new-window", UrlError::Malformed),
            ("--gpu-launcher=x", UrlError::Malformed),
            ("https://", UrlError::Malformed),
        ] {
            assert_eq!(
                check(&rule, bad).map(|url| url.to_string()),
                Err(why),
                "{bad}"
            );
        }
    }

    #[test]
    fn parameters_tell_two_flows_apart() {
        let rule = rule(
            &serde_json::json!({"path_prefix": "/oauth/", "must_have": ["state"], "must_not_have": ["manual"]}),
        );
        assert!(check(&rule, "https://auth.openai.com/oauth/authorize?state=1").is_ok());
        assert_eq!(
            check(&rule, "https://auth.openai.com/x?state=1"),
            Err(UrlError::Path("/oauth/".into()))
        );
        assert_eq!(
            check(&rule, "https://auth.openai.com/oauth/a?x=state"),
            Err(UrlError::Lacks("state".into()))
        );
        assert_eq!(
            check(&rule, "https://auth.openai.com/oauth/a?state=1&manual"),
            Err(UrlError::Has("manual".into()))
        );
    }

    #[test]
    fn a_test_server_is_allowed_by_the_operator_only() {
        let rule = rule(&serde_json::json!({"hosts": ["127.0.0.1", "::1"], "allow_http": true}));
        assert!(check(&rule, "http://127.0.0.1:9500/auth").is_ok());
        assert!(check(&rule, "http://[::1]:9500/auth").is_ok());
        assert!(check(&rule, "http://127.0.0.2:9500/auth").is_err());
    }

    #[test]
    fn urls_are_found_in_sentences() {
        let text =
            "Open (https://a.test/x?y=1). Or │ https://b.test/z │, \"https://c.test\" ftp://d.test";
        assert_eq!(
            find(text).collect::<Vec<_>>(),
            ["https://a.test/x?y=1", "https://b.test/z", "https://c.test"]
        );
    }
}

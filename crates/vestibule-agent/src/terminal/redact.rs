//! Takes out of a text what may be a secret, before it goes into a finding or a transcript.
use regex::Regex;
use std::{borrow::Cow, sync::LazyLock};

/// What is taken out, each with what stands there instead. Rather too much than too little.
static RULES: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    [
        // The query and fragment of a URL carry state, challenges, codes and tokens.
        (r"(?i)(https?://[^\s?#\x22']+)[?#][^\s\x22']*", "$1?[…]"),
        (r"(?i)(https?://)[^\s/@]+@", "$1[…]@"),
        // JSON Web Tokens.
        (r"\beyJ[A-Za-z0-9_-]{4,}(\.[A-Za-z0-9_-]*)*", "[…]"),
        // Prefixes that vendors give their tokens.
        (r"\b(sk-|gh[opsur]_|github_pat_|glpat-|xox[a-z]-|sbp_|sgamp_|ya29\.|AKIA|HRKU-|1//0)[A-Za-z0-9._/+=-]{6,}", "[…]"),
        // "token: …" and its like.
        (
            r#"(?i)\b((?:access|refresh|id|api|auth)?[ _-]?(?:token|secret|password|passwd|key|bearer|verifier|authorization code))(["']?\s*[:=]\s*["']?|\s+is\s+)[^\s"',}]{6,}"#,
            "$1$2[…]",
        ),
    ]
    .into_iter()
    .filter_map(|(pattern, with)| Some((Regex::new(pattern).ok()?, with)))
    .collect()
});

/// A run of characters that may be a token; it is one when it is long and mixes letters and digits.
static RUN: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"[A-Za-z0-9_+=~%-]{24,}").ok());

/// `text` without what looks like a secret.
pub(crate) fn redact(text: &str) -> String {
    let mut text = Cow::Borrowed(text);
    for (rule, with) in RULES.iter() {
        if let Cow::Owned(changed) = rule.replace_all(&text, *with) {
            text = Cow::Owned(changed);
        }
    }
    let Some(run) = RUN.as_ref() else {
        return String::new();
    };
    run.replace_all(&text, |found: &regex::Captures<'_>| {
        let run = &found[0];
        let mixed =
            run.bytes().any(|b| b.is_ascii_digit()) && run.bytes().any(|b| b.is_ascii_alphabetic());
        if mixed {
            "[…]".to_owned()
        } else {
            run.to_owned()
        }
    })
    .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_compiles() {
        assert_eq!(RULES.len(), 5);
        assert!(RUN.is_some());
    }

    #[test]
    fn secrets_go_and_words_stay() {
        let cases = [
            (
                "open https://idp.test/authorize?state=abc&code=1 now",
                "open https://idp.test/authorize?[…] now",
            ),
            (
                "at https://alice:pw@idp.test/x",
                "at https://[…]@idp.test/x",
            ),
            ("Bearer: abcdefgh", "Bearer: […]"),
            ("got eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln", "got […]"),
            ("saved gho_FAKEfakeFAKE123", "saved […]"),
            (
                r#"{"access_token": "FAKE-access-1"}"#,
                r#"{"access_token": "[…]"}"#,
            ),
            ("id 0123456789abcdef0123456789abcdef", "id […]"),
            (
                "error: invalid_grant (exit code 1)",
                "error: invalid_grant (exit code 1)",
            ),
            (
                "cannot open /usr/local/lib/node_modules/wrangler",
                "cannot open /usr/local/lib/node_modules/wrangler",
            ),
            (
                "First copy your one-time code: ABCD-1234",
                "First copy your one-time code: ABCD-1234",
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(redact(text), expected);
        }
    }
}

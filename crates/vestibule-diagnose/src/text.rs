//! Small operations on text that several readers share: shortening, globs, quoting, durations, terminal codes.

/// `text` cut to `max` characters, with an ellipsis where something is missing.
pub(crate) fn shorten(text: &str, max: usize) -> String {
    let kept = first(text, max);
    if kept.len() == text.len() {
        text.to_owned()
    } else {
        format!("{kept}…")
    }
}

/// A shell pattern with `*`, `?` and `[…]` (as `fnmatch(3)` without flags) against `text`.
pub(crate) fn glob(pattern: &str, text: &str) -> bool {
    let mut pattern = first(pattern, 512);
    let mut text = first(text, 4096);
    // The last `*`: what follows it, and the first of the text that it has not taken. An earlier one need not take more.
    let mut star = None;
    loop {
        if let Some(rest) = pattern.strip_prefix('*') {
            star = Some((rest, text));
            pattern = rest;
            continue;
        }
        let mut chars = text.chars();
        let Some(c) = chars.next() else {
            return pattern.is_empty();
        };
        if let Some(rest) = after_one(pattern, c) {
            (pattern, text) = (rest, chars.as_str());
            continue;
        }
        let Some((rest, from)) = star else {
            return false;
        };
        let mut more = from.chars();
        more.next();
        text = more.as_str();
        pattern = rest;
        star = Some((rest, text));
    }
}

/// At most `max` characters of `text`.
fn first(text: &str, max: usize) -> &str {
    match text.char_indices().nth(max) {
        Some((cut, _)) => text.get(..cut).unwrap_or_default(),
        None => text,
    }
}

/// What follows the first element of a pattern, which is no `*`, where that element matches `c`.
fn after_one(pattern: &str, c: char) -> Option<&str> {
    let mut chars = pattern.chars();
    let head = chars.next()?;
    let tail = chars.as_str();
    match head {
        '?' => Some(tail),
        '\\' => match chars.next() {
            Some(quoted) => (quoted == c).then_some(chars.as_str()),
            None => (c == head).then_some(tail),
        },
        '[' => match in_set(tail, c) {
            Some((holds, rest)) => holds.then_some(rest),
            None => (c == head).then_some(tail),
        },
        _ => (c == head).then_some(tail),
    }
}

/// Whether a set, of which `tail` is what follows `[`, holds `c`, and what follows the set; none where it is not closed.
fn in_set(tail: &str, c: char) -> Option<(bool, &str)> {
    let (negated, set) = match tail.strip_prefix(['!', '^']) {
        Some(rest) => (true, rest),
        None => (false, tail),
    };
    let (mut holds, mut empty) = (false, true);
    let mut chars = set.chars();
    loop {
        let from = chars.next()?;
        if from == ']' && !empty {
            return Some((holds != negated, chars.as_str()));
        }
        empty = false;
        let mut ahead = chars.clone();
        match (ahead.next(), ahead.next()) {
            (Some('-'), Some(to)) if to != ']' => {
                holds |= (from..=to).contains(&c);
                chars = ahead;
            }
            _ => holds |= from == c,
        }
    }
}

/// A boolean word of a kernel command line, as `proc_cmdline_get_bool`: the last one counts, and a word without a value
/// switches on.
pub(crate) fn switch(cmdline: &str, key: &str) -> Option<bool> {
    let mut words = cmdline.split_whitespace().rev();
    let value = words.find_map(|w| {
        w.strip_prefix(key)?
            .strip_prefix('=')
            .or_else(|| (w == key).then_some("1"))
    })?;
    boolean(value)
}

/// Words of a value as systemd splits them (`extract_first_word` with unquoting and C escapes). `None` where a quote
/// is not closed.
pub(crate) fn words(value: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (_, '\\') => {
                let Some(next) = chars.next() else { break };
                let plain = match next {
                    'n' => '\n',
                    't' => '\t',
                    's' => ' ',
                    other => other,
                };
                word.get_or_insert_default().push(plain);
            }
            (Some(q), c) if c == q => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return None;
    }
    words.extend(word);
    Some(words)
}

/// A boolean as systemd reads it.
pub(crate) fn boolean(value: &str) -> Option<bool> {
    match value.trim().to_ascii_lowercase().as_str() {
        "1" | "yes" | "y" | "true" | "t" | "on" => Some(true),
        "0" | "no" | "n" | "false" | "f" | "off" => Some(false),
        _ => None,
    }
}

/// A time span (`systemd.time(7)`) in seconds; `infinity` is `f64::INFINITY`. Numbers without unit are seconds.
pub(crate) fn seconds(value: &str) -> Option<f64> {
    let value = value.trim();
    if value.eq_ignore_ascii_case("infinity") {
        return Some(f64::INFINITY);
    }
    let mut total = 0.0;
    let mut rest = value;
    let mut any = false;
    while !rest.trim_start().is_empty() {
        rest = rest.trim_start();
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let number: f64 = rest.get(..digits)?.parse().ok()?;
        rest = rest.get(digits..)?.trim_start();
        let letters = rest
            .find(|c: char| !c.is_alphabetic())
            .unwrap_or(rest.len());
        let scale = match rest.get(..letters)? {
            "" | "s" | "sec" | "second" | "seconds" => 1.0,
            "us" | "usec" | "µs" => 1e-6,
            "ms" | "msec" => 1e-3,
            "m" | "min" | "minute" | "minutes" => 60.0,
            "h" | "hr" | "hour" | "hours" => 3600.0,
            "d" | "day" | "days" => 86_400.0,
            "w" | "week" | "weeks" => 604_800.0,
            _ => return None,
        };
        rest = rest.get(letters..)?;
        total += number * scale;
        any = true;
    }
    any.then_some(total)
}

/// `line` without terminal escape sequences and control characters; what a carriage return or an erase would hide is
/// kept, because a log is evidence, not a screen.
pub(crate) fn strip_terminal(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.peek() {
                Some('[') => {
                    chars.next();
                    while let Some(c) = chars.next_if(|c| !matches!(c, '@'..='~')) {
                        let _ = c;
                    }
                    chars.next();
                }
                Some(']') => {
                    while let Some(c) = chars.next_if(|c| !matches!(c, '\u{7}' | '\u{1b}')) {
                        let _ = c;
                    }
                    chars.next();
                }
                Some(_) => {
                    chars.next();
                }
                None => {}
            },
            '\t' => out.push(' '),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

/// Whether `shown` is `full` with its middle cut out, as systemd prints long names on a console (`vm-br…nt.service`).
pub(crate) fn ellipsized(shown: &str, full: &str) -> bool {
    match shown.split_once('…') {
        None => shown == full,
        Some((head, tail)) => {
            full.len() >= head.len().saturating_add(tail.len())
                && full.starts_with(head)
                && full.ends_with(tail)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_as_fnmatch_does() {
        for (pattern, text, expect) in [
            ("eth*", "eth0", true),
            ("en?[0-9]", "ens3", true),
            ("en[!p]*", "enp0s3", false),
            ("*", "", true),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "aXbY", false),
            ("[", "[", true),
            ("a[b", "a[b", true),
            ("[]a-c]x", "]x", true),
            ("[]a-c]x", "dx", false),
            (r"\*", "*", true),
            (r"\*", "x", false),
            ("*[0-9]x", "a1b2x", true),
            ("*?b", "ab-b", true),
            ("**", "é", true),
        ] {
            assert_eq!(glob(pattern, text), expect, "{pattern} {text}");
        }
        assert!(!glob(&"*a".repeat(200), &"a".repeat(150)));
    }

    #[test]
    fn words_are_unquoted() {
        assert_eq!(
            words(r#"a "b c" 'd'e \s"#),
            Some(vec!["a".into(), "b c".into(), "de".into(), " ".into()])
        );
        assert_eq!(words("a 'b"), None);
        assert_eq!(words("  "), Some(vec![]));
    }

    #[test]
    fn spans_and_ellipses() {
        assert_eq!(seconds("1min 30s"), Some(90.0));
        assert_eq!(seconds("20"), Some(20.0));
        assert_eq!(seconds("infinity"), Some(f64::INFINITY));
        assert_eq!(seconds("5 parsecs"), None);
        assert!(ellipsized("vm-br…nt.service", "vm-browser-agent.service"));
        assert!(!ellipsized("vm-br…nt.service", "vm-browser.socket"));
        assert_eq!(
            strip_terminal("[\u{1b}[0;32m  OK  \u{1b}[0m] Started\r"),
            "[  OK  ] Started"
        );
    }
}

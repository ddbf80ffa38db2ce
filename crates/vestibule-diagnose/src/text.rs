//! Small operations on text that several readers share: shortening, globs, quoting, durations, terminal codes.

/// `text` cut to `max` characters, with an ellipsis where something is missing.
pub(crate) fn shorten(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        Some((cut, _)) => format!("{}…", text.get(..cut).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// A shell pattern with `*`, `?` and `[…]` (as `fnmatch(3)` without flags) against `text`.
pub(crate) fn glob(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().take(512).collect();
    let text: Vec<char> = text.chars().take(4096).collect();
    // One row of "does pattern[..p] match text[..t]" at a time: linear memory, no exponential case.
    let mut reach = vec![true];
    reach.resize(text.len().saturating_add(1), false);
    let mut rest = pattern.as_slice();
    while let Some((head, tail)) = rest.split_first() {
        let mut next = vec![false; reach.len()];
        let mut consumed = tail;
        match head {
            '*' => {
                let mut seen = false;
                for (n, r) in next.iter_mut().zip(&reach) {
                    seen |= *r;
                    *n = seen;
                }
            }
            _ => {
                let (matcher, after) = one(*head, tail);
                consumed = after;
                for ((n, r), c) in next.iter_mut().skip(1).zip(&reach).zip(&text) {
                    *n = *r && matcher.matches(*c);
                }
            }
        }
        reach = next;
        rest = consumed;
    }
    reach.last().copied().unwrap_or(false)
}

enum Matcher {
    Any,
    Is(char),
    Set(bool, Vec<(char, char)>),
}

impl Matcher {
    fn matches(&self, c: char) -> bool {
        match self {
            Self::Any => true,
            Self::Is(x) => *x == c,
            Self::Set(negated, ranges) => {
                ranges.iter().any(|(a, b)| (*a..=*b).contains(&c)) != *negated
            }
        }
    }
}

fn one(head: char, tail: &[char]) -> (Matcher, &[char]) {
    match (head, tail) {
        ('?', _) => (Matcher::Any, tail),
        ('\\', [c, rest @ ..]) => (Matcher::Is(*c), rest),
        ('[', _) => set(tail).unwrap_or((Matcher::Is('['), tail)),
        _ => (Matcher::Is(head), tail),
    }
}

fn set(tail: &[char]) -> Option<(Matcher, &[char])> {
    let (negated, mut rest) = match tail {
        ['!' | '^', rest @ ..] => (true, rest),
        _ => (false, tail),
    };
    let mut ranges = Vec::new();
    loop {
        match rest {
            [']', after @ ..] if !ranges.is_empty() => {
                return Some((Matcher::Set(negated, ranges), after));
            }
            [a, '-', b, after @ ..] if *b != ']' => {
                ranges.push((*a, *b));
                rest = after;
            }
            [a, after @ ..] => {
                ranges.push((*a, *a));
                rest = after;
            }
            [] => return None,
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

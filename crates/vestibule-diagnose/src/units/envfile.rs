//! `EnvironmentFile=` as systemd reads it (`systemd.exec(5)`): comments with `#` and `;`, quotes, continuation lines, CRLF;
//! a line whose name is not a variable name (`export PORT=1`) is ignored with a warning.

/// What a file sets, and the lines that systemd ignores.
#[derive(Clone, Debug, Default)]
pub(crate) struct EnvFile {
    /// Line, name, value.
    pub set: Vec<(u64, String, String)>,
    /// Line and text.
    pub ignored: Vec<(u64, String)>,
}

/// Parses a file.
pub(crate) fn parse(text: &str) -> EnvFile {
    let mut out = EnvFile::default();
    let mut lines = (1_u64..).zip(text.split('\n'));
    while let Some((number, line)) = lines.next() {
        let mut line = line.trim_end_matches('\r').trim_start().to_owned();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        while line.ends_with('\\') {
            line.pop();
            let Some((_, more)) = lines.next() else { break };
            line.push_str(more.trim_end_matches('\r'));
        }
        match line.split_once('=') {
            Some((name, value)) if is_name(name.trim_end()) => {
                out.set
                    .push((number, name.trim_end().to_owned(), unquote(value)));
            }
            _ => out.ignored.push((number, line)),
        }
    }
    out
}

/// Whether systemd accepts `name` as a variable's.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn unquote(value: &str) -> String {
    let mut out = String::new();
    let mut quote = None;
    let mut chars = value.trim().chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(q), c) if q == c => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (Some('\''), c) => out.push(c),
            (_, '\\') => out.extend(chars.next()),
            (_, c) => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_as_systemd_does() {
        let file = parse("# c\n; c\n\nPORT=\"8080\"\r\nNOTE='a b'\nexport HOST=1\nX=a\\\nb\n");
        let set: Vec<_> = file
            .set
            .iter()
            .map(|(l, n, v)| (*l, n.as_str(), v.as_str()))
            .collect();
        assert_eq!(
            set,
            [(4, "PORT", "8080"), (5, "NOTE", "a b"), (7, "X", "ab")]
        );
        assert_eq!(file.ignored, [(6, "export HOST=1".to_owned())]);
    }
}

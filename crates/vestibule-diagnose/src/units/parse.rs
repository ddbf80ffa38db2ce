//! The syntax of unit files (`systemd.syntax(7)`), with the leniency that systemd 252 was measured to have: CRLF, a
//! byte order mark and unknown keys are fine; a line that is not UTF-8 or a broken section header refuses the file.
use crate::text;

/// Longer lines end the parse, as in systemd (`LONG_LINE_MAX`).
const LINE_LIMIT: usize = 1 << 20;
/// Assignments kept of one file.
const ASSIGNMENT_LIMIT: usize = 20_000;

/// One `Key=value`, where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    pub section: String,
    pub key: String,
    /// Continuation lines joined, surrounding blanks removed.
    pub value: String,
    /// The file, as the guest names it.
    pub file: String,
    /// From 1; the first line of a continued assignment.
    pub line: u64,
}

/// What a file says, and why systemd refuses to load it, where it does.
#[derive(Clone, Debug, Default)]
pub struct Parsed {
    pub assignments: Vec<Assignment>,
    /// Line and reason.
    pub refused: Option<(u64, String)>,
}

/// Parses `bytes` of `file`.
pub fn parse(bytes: &[u8], file: &str) -> Parsed {
    let mut out = Parsed::default();
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut section = String::new();
    let mut pending: Option<(u64, String)> = None;
    for (index, raw) in bytes.split(|b| matches!(b, b'\n' | 0)).enumerate() {
        let line = (index as u64).saturating_add(1);
        let trimmed = raw.trim_ascii_start();
        if matches!(trimmed.first(), Some(b'#' | b';')) {
            continue;
        }
        if raw.len() > LINE_LIMIT || out.assignments.len() >= ASSIGNMENT_LIMIT {
            out.refused = Some((line, "the file is too long".into()));
            return out;
        }
        let Ok(text) = std::str::from_utf8(trimmed.trim_ascii_end()) else {
            out.refused = Some((line, "the line is not UTF-8".into()));
            return out;
        };
        let (start, mut joined) = pending.take().unwrap_or((line, String::new()));
        joined.push_str(text);
        if let Some(more) = joined.strip_suffix('\\') {
            pending = Some((start, format!("{more} ")));
            continue;
        }
        if let Err(reason) = take_line(&mut out, &mut section, file, start, &joined) {
            out.refused = Some((start, reason));
            return out;
        }
    }
    if let Some((start, joined)) = pending
        && let Err(reason) = take_line(&mut out, &mut section, file, start, &joined)
    {
        out.refused = Some((start, reason));
    }
    out
}

fn take_line(
    out: &mut Parsed,
    section: &mut String,
    file: &str,
    line: u64,
    text: &str,
) -> Result<(), String> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(());
    }
    if let Some(rest) = text.strip_prefix('[') {
        let Some(name) = rest.strip_suffix(']') else {
            return Err(format!(
                "invalid section header `{}`",
                text::shorten(text, 60)
            ));
        };
        name.clone_into(section);
        return Ok(());
    }
    // Without a section or without `=`, systemd warns and goes on.
    if let Some((key, value)) = text.split_once('=').filter(|_| !section.is_empty()) {
        out.assignments.push(Assignment {
            section: section.clone(),
            key: key.trim().to_owned(),
            value: value.trim().to_owned(),
            file: file.to_owned(),
            line,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &[u8]) -> Vec<(String, String, u64)> {
        parse(text, "f")
            .assignments
            .into_iter()
            .map(|a| (a.key, a.value, a.line))
            .collect()
    }

    #[test]
    fn lenient_where_systemd_is() {
        let text =
            b"\xef\xbb\xbf[Unit]\r\n# c\r\nA = 1 \r\nB=x \\\r\n; not part\r\n  y\r\nnonsense\r\n";
        assert_eq!(
            pairs(text),
            [("A".into(), "1".into(), 3), ("B".into(), "x  y".into(), 4)]
        );
    }

    #[test]
    fn refuses_what_systemd_refuses() {
        assert_eq!(parse(b"\xff\xfe[\0U\0", "f").refused.unwrap().0, 1);
        assert!(
            parse(b"[Unit\nA=1\n", "f")
                .refused
                .unwrap()
                .1
                .contains("section header")
        );
        assert!(parse(b"# \xff\n[Unit]\nA=1\n", "f").refused.is_none());
    }
}

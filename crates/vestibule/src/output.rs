//! How roles print: text for people, one JSON value for programs; errors on standard error with their next step.
use serde::Serialize;

/// What the person asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) json: bool,
}

impl Output {
    /// Prints `value` as JSON, or `text` of it.
    pub(crate) fn print<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        let rendered = if self.json {
            serde_json::to_string_pretty(value)?
        } else {
            text(value)
        };
        line(rendered.trim_end());
        Ok(())
    }
}

/// Prints a line; a closed pipe (`vestibule … | head`) is not an error worth a panic.
pub(crate) fn line(text: &str) {
    raw(format!("{text}\n").as_bytes());
}

/// Prints bytes as they are; a closed pipe is no error here either.
pub(crate) fn raw(bytes: &[u8]) {
    use std::io::Write as _;
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).ok();
}

/// Prints a note for people on standard error.
pub(crate) fn note(text: &str) {
    use std::io::Write as _;
    std::io::stderr()
        .lock()
        .write_all(format!("{text}\n").as_bytes())
        .ok();
}

/// Prints an error's chain, and as JSON where JSON was asked for.
pub(crate) fn print_error(out: Output, error: &anyhow::Error) {
    if out.json {
        line(&serde_json::json!({ "error": { "message": format!("{error:#}") } }).to_string());
    }
    note(&format!("vestibule: {error:#}"));
}

/// A table of left-aligned columns, two spaces apart.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = head
        .iter()
        .enumerate()
        .map(|(i, title)| {
            let cells = rows
                .iter()
                .filter_map(|row| row.get(i))
                .map(|cell| cell.chars().count());
            cells.chain([title.len()]).max().unwrap_or(0)
        })
        .collect();
    let render = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![render(&mut head.iter().copied())];
    lines.extend(
        rows.iter()
            .map(|row| render(&mut row.iter().map(String::as_str))),
    );
    lines.join("\n")
}

/// Bytes as people write them: `1.2 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut scaled = count;
    let mut rest = 0;
    while scaled >= 1024 && unit + 1 < UNITS.len() {
        rest = (scaled % 1024) * 10 / 1024;
        scaled /= 1024;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{scaled}.{rest} {}", UNITS[unit])
    }
}

/// A verdict's finding for people: cause, why, evidence, fix, what would refute it.
pub(crate) fn finding(finding: &vestibule_api::finding::Finding) -> String {
    let mut text = format!("{} ({})", finding.cause, finding.stage);
    if let Some(unit) = &finding.unit {
        text.push_str(&format!(" in {unit}"));
    }
    text.push_str(&format!("\n  why     {}", finding.why));
    for quote in &finding.evidence {
        let at = quote
            .line
            .map(|line| format!(":{line}"))
            .unwrap_or_default();
        text.push_str(&format!("\n  proof   {}{at}: {}", quote.source, quote.text));
    }
    text.push_str(&format!("\n  fix     {}", finding.fix));
    if !finding.refutes.is_empty() {
        text.push_str(&format!("\n  wrong if {}", finding.refutes));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_readable() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 30), "3.0 GiB");
    }

    #[test]
    fn tables_align() {
        let text = table(&["ID", "STATE"], &[vec!["abc".into(), "up".into()]]);
        assert_eq!(text, "ID   STATE\nabc  up");
    }
}

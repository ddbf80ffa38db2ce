//! OSC 8 hyperlinks, as the tool sends them. The emulator keeps a link only while its cells stand on the screen; a link
//! that scrolled away within one read is still what the tool wanted opened, so a parser of its own collects them.
use alacritty_terminal::vte::{Params, Parser, Perform};

/// So many links are kept; later ones are ignored.
const KEPT: usize = 64;
/// Longer URLs are not collected.
const URL_LIMIT: usize = 8 * 1024;
/// A sequence that has not ended after so many bytes never will: vte buffers an OSC without bound.
const SEQUENCE_LIMIT: usize = 256 * 1024;

/// Collects the targets of hyperlinks.
#[derive(Default)]
pub(super) struct Links {
    parser: Parser,
    seen: Seen,
    /// Bytes since a sequence or a character last ended.
    pending: usize,
}

#[derive(Default)]
struct Seen {
    urls: Vec<String>,
    progress: bool,
}

impl std::fmt::Debug for Links {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Links({})", self.seen.urls.len())
    }
}

impl Links {
    /// Reads on. Says whether the input is inside a sequence that is longer than any real one.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> bool {
        self.seen.progress = false;
        self.parser.advance(&mut self.seen, bytes);
        self.pending = if self.seen.progress {
            0
        } else {
            self.pending.saturating_add(bytes.len())
        };
        let runaway = self.pending > SEQUENCE_LIMIT;
        if runaway {
            self.parser = Parser::new();
            self.pending = 0;
        }
        runaway
    }

    /// The targets so far, each once, in order.
    pub(super) fn urls(&self) -> &[String] {
        &self.seen.urls
    }
}

impl Perform for Seen {
    fn print(&mut self, _: char) {
        self.progress = true;
    }

    fn execute(&mut self, _: u8) {
        self.progress = true;
    }

    fn csi_dispatch(&mut self, _: &Params, _: &[u8], _: bool, _: char) {
        self.progress = true;
    }

    fn esc_dispatch(&mut self, _: &[u8], _: bool, _: u8) {
        self.progress = true;
    }

    /// `OSC 8 ; params ; URI`. A `;` in the URI splits it into further parameters.
    fn osc_dispatch(&mut self, params: &[&[u8]], _: bool) {
        self.progress = true;
        let [b"8", _, uri @ ..] = params else { return };
        let uri = uri.join(&b';');
        let Ok(uri) = String::from_utf8(uri) else {
            return;
        };
        let fits = !uri.is_empty() && uri.len() <= URL_LIMIT && self.urls.len() < KEPT;
        if fits && !self.urls.contains(&uri) {
            self.urls.push(uri);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_survive_any_split() {
        let text = b"go \x1b]8;id=1;https://a.test/x?y=1;z=2\x1b\\here\x1b]8;;\x1b\\ \x1b]8;;https://b.test\x07b\x1b]8;;\x07";
        for split in 0..text.len() {
            let mut links = Links::default();
            links.feed(&text[..split]);
            links.feed(&text[split..]);
            assert_eq!(
                links.urls(),
                ["https://a.test/x?y=1;z=2", "https://b.test"],
                "split at {split}"
            );
        }
    }

    #[test]
    fn a_sequence_without_end_is_given_up() {
        let mut links = Links::default();
        links.feed(b"\x1b]8;;https://");
        let runaways = (0..100).filter(|_| links.feed(&[b'a'; 4096])).count();
        assert_eq!(runaways, 1);
        links.feed(b"\x1b]8;;https://ok.test\x1b\\");
        assert_eq!(links.urls(), ["https://ok.test"]);
    }
}

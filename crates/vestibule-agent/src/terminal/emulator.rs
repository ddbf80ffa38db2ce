//! The emulator behind the PTY: what the screen shows, as text, and the answers that tools wait for.
use super::{links::Links, snapshot};
use alacritty_terminal::{
    Term,
    event::{Event, EventListener, WindowSize},
    grid::Dimensions,
    index::{Column, Line},
    term::{Config, cell::Flags},
    vte::ansi::{NamedColor, Processor, Rgb, Timeout as _},
};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

/// Cells of history at most; a wide terminal keeps fewer lines.
const HISTORY_CELLS: usize = 200_000;
/// A transcript of more bytes than this loses its beginning.
const TRANSCRIPT_LIMIT: usize = 256 * 1024;
/// Unsent answers beyond this are dropped: a tool that asks and never reads.
const ANSWER_LIMIT: usize = 64 * 1024;
/// What a cell is said to measure, in pixels.
const CELL: (u16, u16) = (8, 16);

/// Columns and rows, each within 2..=2000 and 2..=500.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    cols: u16,
    rows: u16,
}

impl Size {
    /// The nearest size that a terminal may have.
    pub(crate) fn clamped(cols: u16, rows: u16) -> Self {
        Self {
            cols: cols.clamp(2, 2000),
            rows: rows.clamp(2, 500),
        }
    }

    pub(crate) fn cols(self) -> u16 {
        self.cols
    }

    pub(crate) fn rows(self) -> u16 {
        self.rows
    }
}

impl Dimensions for Size {
    fn total_lines(&self) -> usize {
        self.screen_lines()
    }

    fn screen_lines(&self) -> usize {
        self.rows.into()
    }

    fn columns(&self) -> usize {
        self.cols.into()
    }
}

/// Turns the emulator's events into bytes for the tool.
#[derive(Clone, Debug)]
pub(super) struct Answers {
    bytes: Arc<Mutex<Vec<u8>>>,
    size: Arc<Mutex<Size>>,
}

impl Answers {
    fn push(&self, text: &str) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes.len() + text.len() <= ANSWER_LIMIT {
            bytes.extend_from_slice(text.as_bytes());
        }
    }

    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.bytes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl EventListener for Answers {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "titles, bells and clipboards are not for the tool"
    )]
    fn send_event(&self, event: Event) {
        match event {
            Event::PtyWrite(text) => self.push(&text),
            Event::ColorRequest(index, format) => self.push(&format(color(index))),
            Event::TextAreaSizeRequest(format) => {
                let size = *self.size.lock().unwrap_or_else(PoisonError::into_inner);
                let (cell_width, cell_height) = CELL;
                self.push(&format(WindowSize {
                    num_lines: size.rows,
                    num_cols: size.cols,
                    cell_width,
                    cell_height,
                }));
            }
            _ => {}
        }
    }
}

/// Light on dark, as the xterm on the desktop is drawn.
fn color(index: usize) -> Rgb {
    let level = if index == NamedColor::Background as usize {
        0x10
    } else {
        0xd0
    };
    Rgb {
        r: level,
        g: level,
        b: level,
    }
}

/// A terminal emulator fed by a PTY.
pub(crate) struct Emulator {
    term: Term<Answers>,
    processor: Processor,
    links: Links,
    answers: Answers,
}

impl std::fmt::Debug for Emulator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Emulator")
            .field("links", &self.links)
            .finish_non_exhaustive()
    }
}

impl Emulator {
    pub(crate) fn new(size: Size) -> Self {
        let answers = Answers {
            bytes: Arc::default(),
            size: Arc::new(Mutex::new(size)),
        };
        let config = Config {
            scrolling_history: HISTORY_CELLS / size.columns(),
            ..Config::default()
        };
        let term = Term::new(config, &size, answers.clone());
        Self {
            term,
            processor: Processor::new(),
            links: Links::default(),
            answers,
        }
    }

    /// Takes what the tool wrote; returns what the tool is to read.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.processor.advance(&mut self.term, bytes);
        if self.links.feed(bytes) {
            self.processor = Processor::new();
        }
        self.answers.take()
    }

    /// When a synchronised update (`ESC[?2026h`) that the tool began must be shown although it has not ended.
    pub(crate) fn overdue_at(&self) -> Option<Instant> {
        self.processor.sync_timeout().sync_timeout()
    }

    /// Ends a synchronised update; returns what the tool is to read.
    pub(crate) fn flush(&mut self) -> Vec<u8> {
        if self.processor.sync_timeout().pending_timeout() {
            self.processor.stop_sync(&mut self.term);
        }
        self.answers.take()
    }

    pub(crate) fn resize(&mut self, size: Size) {
        *self
            .answers
            .size
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = size;
        self.term.resize(size);
    }

    /// Targets of hyperlinks so far.
    pub(crate) fn links(&self) -> Vec<String> {
        self.links.urls().to_vec()
    }

    /// The lines on the screen, each ended by a newline; lines that the terminal wrapped are one.
    pub(crate) fn screen(&self) -> String {
        self.text(Line(0), Join::Wrapped)
    }

    /// History and screen, as [`Self::screen`].
    pub(crate) fn transcript(&self) -> String {
        let mut text = self.text(self.term.grid().topmost_line(), Join::Wrapped);
        if text.len() > TRANSCRIPT_LIMIT {
            let from = (text.len() - TRANSCRIPT_LIMIT..)
                .find(|at| text.is_char_boundary(*at))
                .unwrap_or(0);
            text.drain(..from);
        }
        text
    }

    /// History and screen, where a line filled to the last column is also joined with the next: some tools wrap a long
    /// URL themselves. For finding URLs only.
    pub(crate) fn unwrapped(&self) -> String {
        self.text(self.term.grid().topmost_line(), Join::Full)
    }

    /// Bytes that show a terminal, just cleared, what this one shows.
    pub(crate) fn snapshot(&self) -> Vec<u8> {
        snapshot::render(&self.term)
    }

    fn text(&self, from: Line, join: Join) -> String {
        let grid = self.term.grid();
        let mut text = String::new();
        for line in (from.0..=grid.bottommost_line().0).map(Line) {
            let row = &grid[line];
            let last = &row[Column(grid.columns() - 1)];
            let begun = text.len();
            for cell in &row[..] {
                if !cell
                    .flags
                    .intersects(Flags::WIDE_CHAR_SPACER | Flags::LEADING_WIDE_CHAR_SPACER)
                {
                    text.push(if cell.c == '\t' { ' ' } else { cell.c });
                    text.extend(cell.zerowidth().into_iter().flatten());
                }
            }
            let joined =
                last.flags.contains(Flags::WRAPLINE) || (join == Join::Full && last.c != ' ');
            if !joined {
                text.truncate(begun + text[begun..].trim_end().len());
                text.push('\n');
            }
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        text
    }
}

/// Which lines are one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Join {
    /// Those that the terminal wrapped.
    Wrapped,
    /// Those, and every line that is full.
    Full,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn emulator(cols: u16, rows: u16) -> Emulator {
        Emulator::new(Size::clamped(cols, rows))
    }

    #[test]
    fn what_tools_ask_is_answered() {
        let cases: [(&[u8], &str); 6] = [
            (b"ab\x1b[6n", "\x1b[1;3R"),
            (b"\x1b[c", "\x1b[?6c"),
            (b"\x1b[5n", "\x1b[0n"),
            (b"\x1b]11;?\x07", "\x1b]11;rgb:1010/1010/1010\x07"),
            (b"\x1b]10;?\x1b\\", "\x1b]10;rgb:d0d0/d0d0/d0d0\x1b\\"),
            (b"\x1b[18t", "\x1b[8;24;80t"),
        ];
        for (asked, answer) in cases {
            for split in 0..asked.len() {
                let mut terminal = emulator(80, 24);
                let mut got = terminal.feed(&asked[..split]);
                got.extend(terminal.feed(&asked[split..]));
                assert_eq!(String::from_utf8(got).unwrap(), answer, "split at {split}");
            }
        }
        assert_eq!(emulator(100, 30).feed(b"\x1b[14t"), b"\x1b[4;480;800t");
    }

    #[test]
    fn a_line_the_terminal_wrapped_is_one_line() {
        let mut terminal = emulator(20, 5);
        terminal.feed(b"open https://idp.test/authorize?state=0123456789\r\nnext");
        assert_eq!(
            terminal.screen(),
            "open https://idp.test/authorize?state=0123456789\nnext\n"
        );
    }

    #[test]
    fn a_line_the_tool_wrapped_is_joined_for_urls_only() {
        let mut terminal = emulator(20, 5);
        terminal.feed(b"https://idp.test/a?x\r\n=1&y=2\r\nend");
        assert_eq!(terminal.screen(), "https://idp.test/a?x\n=1&y=2\nend\n");
        assert_eq!(terminal.unwrapped(), "https://idp.test/a?x=1&y=2\nend\n");
    }

    #[test]
    fn words_placed_by_cursor_moves_read_as_text() {
        let mut terminal = emulator(40, 4);
        terminal.feed(
            b"\x1b[1GPress\x1b[7GEnter\x1b[13Gto\x1b[16Gsign\x1b[2;3Hin \xe6\x97\xa5\xe6\x9c\xac",
        );
        assert_eq!(terminal.screen(), "Press Enter to sign\n  in 日本\n");
    }

    #[test]
    fn the_transcript_has_what_scrolled_away_and_a_bound() {
        let mut terminal = emulator(1000, 24);
        for n in 0..5000 {
            terminal.feed(format!("line {n}\r\n").as_bytes());
        }
        let text = terminal.transcript();
        assert!(text.ends_with("line 4998\nline 4999\n"));
        assert_eq!(text.lines().count(), 200 + 23);
        assert_eq!(terminal.screen().lines().next(), Some("line 4977"));
    }

    #[test]
    fn a_synchronised_update_that_never_ends_is_shown_in_the_end() {
        let mut terminal = emulator(40, 4);
        terminal.feed(b"\x1b[?2026hhidden\x1b[6n");
        assert_eq!(terminal.screen(), "\n");
        assert!(terminal.overdue_at().is_some());
        assert_eq!(terminal.flush(), b"\x1b[1;7R");
        assert_eq!(terminal.screen(), "hidden\n");
        assert_eq!(terminal.overdue_at(), None);
    }
}

//! What other terminals are shown of a tool's output: everything but the questions.
//!
//! The emulator behind the PTY answers what a tool asks of its terminal. The xterm on the desktop and the dashboards'
//! terminals are terminals too: given the same bytes each of them answers as well, through its keyboard, and the tool reads
//! the second answer as something typed (gh 2.23 took `158R56R` for a reply to *Authenticate Git?*).
//!
//! Sequences are those of ECMA-48 and of xterm's ctlseqs.

/// A control sequence of more bytes is none.
const CSI_LIMIT: usize = 1024;
/// A question in an operating system command is shorter; longer ones (links, titles) pass without being kept.
const OSC_LIMIT: usize = 256;

const BEL: u8 = 0x07;
const ESC: u8 = 0x1b;
/// "Who are you?" of a teletype; xterm answers with a string of its configuration.
const ENQ: u8 = 0x05;
/// CAN and SUB end any sequence.
const CANCEL: [u8; 2] = [0x18, 0x1a];

/// Where in a sequence the input is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Text,
    Escape,
    Csi,
    /// An OSC whose bytes are kept until it ends.
    Osc,
    /// An OSC too long for a question: its bytes pass.
    LongOsc,
    /// DCS, APC, PM, SOS: settings' and graphics' questions, and nothing that a sign-in shows.
    Dropped,
}

/// Takes questions out of a stream of bytes, however it is cut.
#[derive(Debug, Default)]
pub(super) struct Shown {
    state: State,
    /// The sequence so far.
    held: Vec<u8>,
    /// Whether the byte before was an ESC inside a string.
    escaped: bool,
}

impl Shown {
    /// The next part of the stream, without questions. What a sequence is shows at its end: until then it is kept.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len() + self.held.len());
        for byte in bytes {
            self.step(*byte, &mut out);
        }
        out
    }

    fn step(&mut self, byte: u8, out: &mut Vec<u8>) {
        match self.state {
            State::Text if byte == ESC => self.begin(),
            State::Text if byte == ENQ => {}
            State::Text => out.push(byte),
            State::Escape => self.escape(byte, out),
            State::Csi => self.csi(byte, out),
            State::Osc | State::LongOsc | State::Dropped => self.string(byte, out),
        }
    }

    fn begin(&mut self) {
        self.held.clear();
        self.held.push(ESC);
        self.escaped = false;
        self.state = State::Escape;
    }

    /// The sequence is whole: shown, unless it is a question.
    fn end(&mut self, question: bool, out: &mut Vec<u8>) {
        if !question {
            out.append(&mut self.held);
        }
        self.held.clear();
        self.state = State::Text;
    }

    fn escape(&mut self, byte: u8, out: &mut Vec<u8>) {
        if byte == ESC {
            return self.begin();
        }
        self.held.push(byte);
        match (byte, self.held.len()) {
            (b'[', 2) => self.state = State::Csi,
            (b']', 2) => self.state = State::Osc,
            (b'P' | b'X' | b'^' | b'_', 2) => self.state = State::Dropped,
            // An intermediate byte, as in the choice of a character set.
            (0x20..=0x2f, length) if length < CSI_LIMIT => {}
            // DECID asks what CSI c asks.
            (last, length) => self.end((last, length) == (b'Z', 2), out),
        }
    }

    fn csi(&mut self, byte: u8, out: &mut Vec<u8>) {
        if byte == ESC {
            return self.begin();
        }
        self.held.push(byte);
        if matches!(byte, 0x40..=0x7e) {
            let question = self.held.get(2..).is_some_and(is_question);
            self.end(question, out);
        } else if CANCEL.contains(&byte) || self.held.len() >= CSI_LIMIT {
            self.end(false, out);
        }
    }

    fn string(&mut self, byte: u8, out: &mut Vec<u8>) {
        let terminated = std::mem::take(&mut self.escaped);
        if terminated && byte != b'\\' {
            // The ESC was the beginning of the next sequence, which ends this one.
            self.begin();
            return self.step(byte, out);
        }
        self.escaped = byte == ESC;
        match self.state {
            State::Osc => self.held.push(byte),
            // Its ESC is kept until it is known to be of the terminator.
            State::LongOsc if terminated => out.extend([ESC, byte]),
            State::LongOsc if !self.escaped => out.push(byte),
            State::LongOsc | State::Dropped | State::Text | State::Escape | State::Csi => {}
        }
        let bell = byte == BEL && self.state != State::Dropped;
        if terminated || bell || CANCEL.contains(&byte) {
            let question = self.state == State::Dropped || asks(&self.held);
            self.end(question, out);
        } else if self.state == State::Osc && self.held.len() >= OSC_LIMIT && !self.escaped {
            out.append(&mut self.held);
            self.state = State::LongOsc;
        }
    }
}

/// Whether a control sequence, without its introducer, is one that terminals answer.
fn is_question(sequence: &[u8]) -> bool {
    let Some((last, parameters)) = sequence.split_last() else {
        return false;
    };
    let has = |byte| parameters.contains(&byte);
    let private = parameters.first().copied();
    match last {
        // Device attributes, whichever; window reports (and what else moves a window, which is the image's business).
        b'c' | b't' => true,
        // Status and cursor position; with `>` it sets something.
        b'n' => private != Some(b'>'),
        // DECRQM; DECRQPSR; DECRQCRA; DECRQLP.
        b'p' | b'w' => has(b'$'),
        b'y' => has(b'*'),
        b'|' => has(b'\''),
        // XTVERSION; the keyboard protocol's flags; XTSMGRAPHICS; XTQMODKEYS.
        b'q' => private == Some(b'>'),
        b'u' | b'S' | b'm' => private == Some(b'?'),
        // DECREQTPARM; with an intermediate byte it fills a rectangle.
        b'x' => !has(b'$') && !has(b'*'),
        _ => false,
    }
}

/// Whether an operating system command has a question mark for a value: a colour, the clipboard.
fn asks(command: &[u8]) -> bool {
    let text = command.strip_prefix(b"\x1b]").unwrap_or(command);
    let text = text
        .strip_suffix(b"\x1b\\")
        .or_else(|| text.strip_suffix(b"\x07"))
        .unwrap_or(text);
    text.split(|byte| *byte == b';')
        .skip(1)
        .any(|value| value == b"?")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same whatever the cut.
    fn shown(bytes: &[u8]) -> Vec<u8> {
        let whole = Shown::default().take(bytes);
        for cut in 0..bytes.len() {
            let mut shown = Shown::default();
            let mut parts = shown.take(&bytes[..cut]);
            parts.extend(shown.take(&bytes[cut..]));
            assert_eq!(parts, whole, "cut at {cut} of {bytes:?}");
        }
        whole
    }

    #[test]
    fn questions_are_not_shown() {
        let questions: [&[u8]; 20] = [
            b"\x1b[6n",
            b"\x1b[?6n",
            b"\x1b[5n",
            b"\x1b[c",
            b"\x1b[>0c",
            b"\x1b[=c",
            b"\x1bZ",
            b"\x05",
            b"\x1b[18t",
            b"\x1b[14t",
            b"\x1b[?2026$p",
            b"\x1b[>q",
            b"\x1b[?u",
            b"\x1b[?1;1S",
            b"\x1b[x",
            b"\x1b]11;?\x07",
            b"\x1b]4;1;?\x1b\\",
            b"\x1b]52;c;?\x07",
            b"\x1bP+q544e\x1b\\",
            b"\x1bP$qm\x1b\\",
        ];
        for question in questions {
            let around = [b"before ", question, b" after"].concat();
            assert_eq!(shown(&around), b"before  after", "{question:?}");
        }
    }

    #[test]
    fn everything_else_is() {
        let long = format!(
            "\x1b]8;;https://a.test/?q={}\x1b\\here\x1b]8;;\x07",
            "x".repeat(2000)
        );
        let plain: [&[u8]; 12] = [
            "日本 text\r\n".as_bytes(),
            b"\x1b[1;31mred\x1b[0m",
            b"\x1b[2J\x1b[H\x1b[3;4H",
            b"\x1b[?25l\x1b[?1049h\x1b[?2004h",
            b"\x1b(B\x1b7\x1b8\x1bM\x1b=",
            b"\x1b]0;title?\x07",
            b"\x1b]8;id=1;https://a.test/x?y=1\x1b\\link\x1b]8;;\x1b\\",
            b"\x1b]11;#101010\x07",
            b"\x1b[>4;2m\x1b[>4n",
            b"\x1b[2 q",
            b"\x1b[1;5S",
            long.as_bytes(),
        ];
        for bytes in plain {
            assert_eq!(shown(bytes), bytes, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn broken_sequences_keep_nothing_for_ever() {
        // A sequence that is cut off by the next one is not shown; what follows is.
        assert_eq!(shown(b"\x1b[12\x1b[1mx"), b"\x1b[1mx");
        assert_eq!(shown(b"\x1b]0;ti\x1b[1mx"), b"\x1b[1mx");
        assert_eq!(shown(b"\x1bPq\x1b[1mx"), b"\x1b[1mx");
        assert_eq!(shown(b"\x1b[12\x18x"), b"\x1b[12\x18x");
        let mut endless = Shown::default();
        endless.take(b"\x1b[");
        for _ in 0..100 {
            endless.take(&[b'1'; 1000]);
            assert!(endless.held.len() <= CSI_LIMIT);
        }
        let mut endless = Shown::default();
        endless.take(b"\x1b]8;;");
        for _ in 0..100 {
            endless.take(&[b'x'; 1000]);
            assert!(endless.held.len() <= OSC_LIMIT);
        }
    }
}

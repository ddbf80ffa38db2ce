//! The screen as bytes, for somebody who begins to look when much has already been drawn.
use alacritty_terminal::{
    Term,
    event::EventListener,
    grid::Dimensions,
    index::{Column, Line},
    term::{
        TermMode,
        cell::{Cell, Flags},
    },
    vte::ansi::{Color, NamedColor},
};
use std::io::Write as _;

/// A terminal wider than this is for tools that write lines; its viewers are narrower and wrap by themselves, so rows
/// are not places to them.
const LINES_ONLY: usize = 500;

/// Modes that change what a viewer's keys mean or where it draws, with their private numbers.
const MODES: [(TermMode, u16); 7] = [
    (TermMode::APP_CURSOR, 1),
    (TermMode::MOUSE_REPORT_CLICK, 1000),
    (TermMode::MOUSE_DRAG, 1002),
    (TermMode::MOUSE_MOTION, 1003),
    (TermMode::FOCUS_IN_OUT, 1004),
    (TermMode::SGR_MOUSE, 1006),
    (TermMode::BRACKETED_PASTE, 2004),
];

/// Reset, history (where there is one), the rows, modes and the cursor.
pub(super) fn render<T: EventListener>(term: &Term<T>) -> Vec<u8> {
    let (grid, mode) = (term.grid(), *term.mode());
    let mut out = b"\x1b[!p\x1b[0m\x1b[?1049l\x1b[H\x1b[2J\x1b[3J".to_vec();
    let full_screen = mode.contains(TermMode::ALT_SCREEN);
    if full_screen {
        out.extend_from_slice(b"\x1b[?1049h\x1b[H");
    }
    let cursor = grid.cursor.point;
    let top = if full_screen {
        Line(0)
    } else {
        grid.topmost_line()
    };
    let bottom = last_used(term).max(cursor.line);
    for line in (top.0..=bottom.0).map(Line) {
        if line > top && !wrapped(term, line - 1) {
            out.extend_from_slice(b"\r\n");
        }
        let cells = &grid[line][..];
        let drawn = cells
            .iter()
            .rposition(|cell| !blank(cell))
            .map_or(0, |last| last + 1);
        let used = if wrapped(term, line) {
            cells.len()
        } else {
            drawn
        };
        let wanted = if line == cursor.line {
            used.max(cursor.column.0.min(cells.len()))
        } else {
            used
        };
        row(&mut out, &cells[..wanted]);
    }
    out.extend_from_slice(b"\x1b[0m");
    for (flag, number) in MODES {
        if mode.contains(flag) {
            let _ = write!(out, "\x1b[?{number}h");
        }
    }
    if !mode.contains(TermMode::SHOW_CURSOR) {
        out.extend_from_slice(b"\x1b[?25l");
    }
    if grid.columns() <= LINES_ONLY {
        let _ = write!(out, "\x1b[{};{}H", cursor.line.0 + 1, cursor.column.0 + 1);
    }
    out
}

fn last_used<T: EventListener>(term: &Term<T>) -> Line {
    let grid = term.grid();
    let used = (0..=grid.bottommost_line().0)
        .rev()
        .map(Line)
        .find(|line| !grid[*line][..].iter().all(blank));
    used.unwrap_or(Line(0))
}

/// Whether the terminal itself went on from `line` to the next.
fn wrapped<T: EventListener>(term: &Term<T>, line: Line) -> bool {
    let grid = term.grid();
    grid[line][Column(grid.columns() - 1)]
        .flags
        .contains(Flags::WRAPLINE)
}

fn blank(cell: &Cell) -> bool {
    cell.c == ' '
        && cell.bg == Color::Named(NamedColor::Background)
        && !cell
            .flags
            .intersects(Flags::INVERSE | Flags::ALL_UNDERLINES)
}

fn row(out: &mut Vec<u8>, cells: &[Cell]) {
    let mut drawn = (
        Color::Named(NamedColor::Foreground),
        Color::Named(NamedColor::Background),
        Flags::empty(),
    );
    for cell in cells {
        if cell
            .flags
            .intersects(Flags::WIDE_CHAR_SPACER | Flags::LEADING_WIDE_CHAR_SPACER)
        {
            continue;
        }
        let look = (cell.fg, cell.bg, cell.flags & STYLES);
        if look != drawn {
            style(out, look);
            drawn = look;
        }
        let mut utf8 = [0; 4];
        out.extend_from_slice(cell.c.encode_utf8(&mut utf8).as_bytes());
        for mark in cell.zerowidth().into_iter().flatten() {
            out.extend_from_slice(mark.encode_utf8(&mut utf8).as_bytes());
        }
    }
    out.extend_from_slice(b"\x1b[0m");
}

const STYLES: Flags = Flags::BOLD
    .union(Flags::DIM)
    .union(Flags::ITALIC)
    .union(Flags::INVERSE)
    .union(Flags::HIDDEN)
    .union(Flags::STRIKEOUT)
    .union(Flags::ALL_UNDERLINES);

/// ECMA-48 SGR, with the usual extensions for 256 and true colours.
fn style(out: &mut Vec<u8>, (fg, bg, flags): (Color, Color, Flags)) {
    out.extend_from_slice(b"\x1b[0");
    let attributes = [
        (Flags::BOLD, 1),
        (Flags::DIM, 2),
        (Flags::ITALIC, 3),
        (Flags::ALL_UNDERLINES, 4),
        (Flags::INVERSE, 7),
        (Flags::HIDDEN, 8),
        (Flags::STRIKEOUT, 9),
    ];
    for (flag, number) in attributes {
        if flags.intersects(flag) {
            let _ = write!(out, ";{number}");
        }
    }
    colour(out, fg, 30);
    colour(out, bg, 40);
    out.push(b'm');
}

fn colour(out: &mut Vec<u8>, colour: Color, base: u16) {
    let _ = match colour {
        Color::Spec(rgb) => write!(out, ";{};2;{};{};{}", base + 8, rgb.r, rgb.g, rgb.b),
        Color::Indexed(index) => write!(out, ";{};5;{index}", base + 8),
        Color::Named(name) => match u16::try_from(name as usize) {
            Ok(index @ 0..8) => write!(out, ";{}", base + index),
            Ok(index @ 8..16) => write!(out, ";{}", base + 60 + index - 8),
            // Foreground, background, and dim shades, which the attribute draws.
            _ => Ok(()),
        },
    };
}

#[cfg(test)]
mod tests {
    use crate::terminal::{Emulator, Size};

    fn check(cols: u16, rows: u16, drawn: &[u8]) {
        let mut first = Emulator::new(Size::clamped(cols, rows));
        first.feed(drawn);
        let mut late = Emulator::new(Size::clamped(cols, rows));
        late.feed(b"something else\r\n\x1b[7m on the screen");
        late.feed(&first.snapshot());
        assert_eq!(late.screen(), first.screen());
        // The cursor, asked the way a tool would.
        assert_eq!(late.feed(b"\x1b[6n"), first.feed(b"\x1b[6n"));
        // And the same again: colours and modes are in the bytes of a snapshot.
        assert_eq!(
            String::from_utf8(late.snapshot()),
            String::from_utf8(first.snapshot())
        );
    }

    #[test]
    fn who_comes_late_sees_the_same() {
        check(40, 6, b"");
        check(40, 6, b"hello\r\n$ ");
        check(
            40,
            6,
            b"\x1b[1;31mred\x1b[0m plain \x1b[48;5;17mblue\x1b[0m\r\n\x1b[38;2;1;2;3mtrue\x1b[0m",
        );
        check(40, 6, "wide 日本 e\u{301}\r\n".as_bytes());
        check(
            20,
            6,
            b"a line that is longer than the terminal is wide\r\nend",
        );
        check(40, 6, b"one\r\n\r\n\r\nfour\x1b[2;5H");
    }

    #[test]
    fn full_screen_programs_keep_their_modes() {
        check(
            40,
            6,
            b"shell\r\n\x1b[?1049h\x1b[?25l\x1b[?1h\x1b[?2004h\x1b[Hmenu\x1b[6;38Hend",
        );
    }

    #[test]
    fn a_wide_terminal_is_replayed_as_lines() {
        let mut wide = Emulator::new(Size::clamped(1000, 10));
        wide.feed(b"Open this:\r\n");
        wide.feed("u".repeat(150).as_bytes());
        wide.feed(b"\r\n> ");
        let mut narrow = Emulator::new(Size::clamped(80, 24));
        narrow.feed(&wide.snapshot());
        assert_eq!(
            narrow.screen(),
            format!("Open this:\n{}\n>\n", "u".repeat(150))
        );
        assert_eq!(narrow.feed(b"\x1b[6n"), b"\x1b[4;3R");
    }
}

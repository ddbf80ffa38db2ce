//! X11 keysyms, which RFB's key events carry (RFC 6143 section 7.5.4).

/// One key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keysym(pub u32);

/// Return.
pub const ENTER: Keysym = Keysym(0xff0d);
/// Tab.
pub const TAB: Keysym = Keysym(0xff09);
/// Escape.
pub const ESCAPE: Keysym = Keysym(0xff1b);

/// The keysym of a character: Latin-1 stands for itself, the rest of Unicode from `0x01000000` on.
pub(super) fn keysym(c: char) -> Keysym {
    match c {
        '\n' | '\r' => ENTER,
        '\t' => TAB,
        c if u32::from(c) < 0x100 => Keysym(c.into()),
        c => Keysym(0x0100_0000 + u32::from(c)),
    }
}

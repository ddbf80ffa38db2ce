//! What a filter let through, read once more by a parser that shares nothing with it: RFC 6143, sections 7.1 to 7.3 and 7.5, and
//! the two extensions without input. For the filter's tests and for its fuzz target.

/// Messages by which a viewer only looks.
const LOOKING: [u8; 5] = [
    SET_PIXEL_FORMAT,
    SET_ENCODINGS,
    FRAMEBUFFER_UPDATE_REQUEST,
    ENABLE_CONTINUOUS_UPDATES,
    CLIENT_FENCE,
];
const SET_PIXEL_FORMAT: u8 = 0;
const SET_ENCODINGS: u8 = 2;
const FRAMEBUFFER_UPDATE_REQUEST: u8 = 3;
const ENABLE_CONTINUOUS_UPDATES: u8 = 150;
const CLIENT_FENCE: u8 = 248;

/// The first thing in a client's half of RFB that is more than looking, in words. The bytes may end anywhere.
pub(crate) fn more_than_looking(said: &[u8]) -> Option<String> {
    let (version, rest) = said.split_at(said.len().min(12));
    let chooses = [&b"RFB 003.007\n"[..], b"RFB 003.008\n"].contains(&version);
    if !chooses && version.len() == 12 && version != b"RFB 003.003\n" {
        return Some(format!("the version {version:?}"));
    }
    let mut rest = rest;
    if chooses && let Some((security, after)) = rest.split_first() {
        if *security != 1 {
            return Some(format!("the security type {security}"));
        }
        rest = after;
    }
    if let Some((shared, after)) = rest.split_first() {
        if *shared != 1 {
            return Some("a viewer that asks to be alone".to_owned());
        }
        rest = after;
    }
    while let Some(kind) = rest.first() {
        if !LOOKING.contains(kind) {
            let at = said.len() - rest.len();
            return Some(format!("a message of type {kind} at byte {at}"));
        }
        rest = rest.get(length(rest)?..)?;
    }
    None
}

/// Bytes of the message that begins here; none: it ends before it says.
fn length(message: &[u8]) -> Option<usize> {
    match *message.first()? {
        SET_PIXEL_FORMAT => Some(20),
        SET_ENCODINGS => {
            let count = [*message.get(2)?, *message.get(3)?];
            Some(4 + 4 * usize::from(u16::from_be_bytes(count)))
        }
        CLIENT_FENCE => Some(9 + usize::from(*message.get(8)?)),
        // The other two.
        _ => Some(10),
    }
}

//! Where browser and terminal stand on a screen of any size. Pure.

/// Part of the screen, in pixels, decoration included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) x: u16,
    pub(super) y: u16,
    pub(super) width: u16,
    pub(super) height: u16,
}

/// Below this height the page needs the whole screen; the terminal is still in the dashboard.
const ROOM_FOR_BOTH: u16 = 480;
/// A terminal of fewer pixels shows less than five lines.
const TERMINAL_LEAST: u16 = 110;
/// And of more is wasted.
const TERMINAL_MOST: u16 = 320;

/// Height of the terminal's strip; none where there is no room for it.
fn strip((_, height): (u16, u16)) -> u16 {
    if height < ROOM_FOR_BOTH {
        0
    } else {
        (height / 10 * 3).clamp(TERMINAL_LEAST, TERMINAL_MOST)
    }
}

/// The upper part, about 70 %.
pub(super) fn browser(size: (u16, u16)) -> Area {
    Area {
        x: 0,
        y: 0,
        width: size.0,
        height: size.1 - strip(size),
    }
}

/// The lower part; on a small screen just below its edge.
pub(super) fn terminal(size: (u16, u16)) -> Area {
    let strip = strip(size);
    Area {
        x: 0,
        y: size.1 - strip,
        width: size.0,
        height: strip.max(TERMINAL_LEAST),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_fill_the_screen_where_both_fit() {
        for (size, height) in [
            ((1280, 800), 240),
            ((1920, 1080), 320),
            ((1024, 600), 180),
            ((500, 480), 144),
        ] {
            let (page, strip) = (browser(size), terminal(size));
            assert_eq!(
                (strip.height, page.height + strip.height, strip.y),
                (height, size.1, page.height),
                "{size:?}"
            );
            assert_eq!((page.width, strip.width), (size.0, size.0));
        }
    }

    #[test]
    fn on_a_phone_the_page_has_it_all() {
        assert_eq!(browser((360, 400)).height, 400);
        assert_eq!(terminal((360, 400)).y, 400);
    }
}

//! Whether samples of the screen show a page. Pure.

/// The start page's background (`/usr/share/vestibule/welcome.html`).
const WELCOME: [u8; 3] = [0x1b, 0x2a, 0x4a];
/// A sample is that colour when no channel is further off: a screen of 16 bits rounds.
const TOLERANCE: u8 = 8;

/// A pixel: red, green, blue.
pub(super) type Rgb = [u8; 3];

/// Whether `samples` of the browser's area show something. At the first start that is the start page itself (an empty
/// window with a toolbar is not uniform either); later, when the person may be anywhere, more than one colour.
pub(super) fn is_painted(samples: &[Rgb], first: bool) -> bool {
    let uniform = samples.windows(2).all(|pair| pair[0] == pair[1]);
    let welcome = samples.iter().filter(|sample| is_welcome(sample)).count();
    !uniform && (!first || welcome * 4 >= samples.len())
}

fn is_welcome(sample: &Rgb) -> bool {
    sample
        .iter()
        .zip(WELCOME)
        .all(|(a, b)| a.abs_diff(b) <= TOLERANCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_window_is_not_a_page() {
        let (black, white, toolbar, page) = ([0; 3], [255; 3], [230, 230, 235], [0x1b, 0x2a, 0x4a]);
        assert!(!is_painted(&[], true));
        assert!(!is_painted(&[black; 50], true));
        assert!(!is_painted(&[page; 50], true));
        let mut window = vec![toolbar; 10];
        window.extend([white; 40]);
        assert!(!is_painted(&window, true));
        assert!(is_painted(&window, false));
        window.extend([page; 40]);
        assert!(is_painted(&window, true));
    }
}

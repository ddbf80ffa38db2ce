//! What the agent itself does on the desktop, before a save and after a restore. Each call is a connection of its own and
//! blocks.
use super::{
    layout, paint,
    screen::{Screen, ScreenError},
};
use crate::guest::Guest;
use std::path::Path;

/// X11/keysymdef.h: XK_F5, which reloads a page.
const F5: u32 = 0xffc2;

/// Why the desktop was not acted on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ActError {
    #[error(transparent)]
    Screen(#[from] ScreenError),
    #[error("reload the page: the browser has no window")]
    NoWindow,
    #[error("reload the page: the X server's keyboard has no F5")]
    NoKey,
}

fn connect(guest: &Guest) -> Result<Screen, ScreenError> {
    let number = guest.display.trim_start_matches(':');
    let socket = Path::new("/tmp/.X11-unix").join(format!("X{number}"));
    Screen::connect(&socket, &guest.xauthority)
}

/// The browser's windows, by the X server's numbers.
pub(crate) fn browser_windows(guest: &Guest) -> Result<Vec<u32>, ActError> {
    Ok(connect(guest)?.browsers()?)
}

/// Asks the browser to close its window `window`.
pub(crate) fn close(guest: &Guest, window: u32) -> Result<(), ActError> {
    Ok(connect(guest)?.close(window)?)
}

/// Reloads the page that the browser shows.
pub(crate) fn reload(guest: &Guest) -> Result<(), ActError> {
    let screen = connect(guest)?;
    let window = screen.windows()?.browser.ok_or(ActError::NoWindow)?;
    if screen.press(window, F5)? {
        Ok(())
    } else {
        Err(ActError::NoKey)
    }
}

/// Whether the screen shows the start page.
pub(crate) fn shows_start_page(guest: &Guest) -> Result<bool, ActError> {
    let screen = connect(guest)?;
    let area = layout::browser(screen.size()?);
    Ok(paint::is_painted(&screen.samples(area)?, true))
}

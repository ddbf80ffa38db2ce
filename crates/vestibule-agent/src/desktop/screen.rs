//! The X server: windows, sizes, pixels.
use super::{
    authority,
    layout::{self, Area},
    paint::Rgb,
};
use std::{
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};
use x11rb::{
    connection::Connection as _,
    errors::{ConnectError, ConnectionError, ReplyError, ReplyOrIdError},
    protocol::{
        damage::{ConnectionExt as _, Damage, ReportLevel},
        xproto::{
            AtomEnum, ChangeWindowAttributesAux, ClientMessageEvent, ConfigureWindowAux,
            ConnectionExt as _, EventMask, ImageFormat, ImageOrder, InputFocus, KEY_PRESS_EVENT,
            KEY_RELEASE_EVENT, MapState, StackMode, Window,
        },
        xtest::ConnectionExt as _,
    },
    rust_connection::{DefaultStream, RustConnection},
};

/// Names in `WM_CLASS` that the image's units give their windows.
const BROWSER: &str = "vestibule-browser";
const TERMINAL: &str = "vestibule-terminal";
/// Window managers put at most so many windows around another.
const DEPTH: u32 = 4;
/// Windows that are looked at, at most.
const WINDOWS: usize = 400;
/// Rows of the browser's area that are sampled, and samples in a row.
const ROWS: u16 = 9;
const COLUMNS: usize = 24;

/// Why the X server could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScreenError {
    #[error("connect to `{}`", path.display())]
    Socket {
        path: PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("greet the X server")]
    Greet(#[source] ConnectError),
    #[error("the X server has no screen")]
    NoScreen,
    #[error("talk to the X server")]
    Talk(#[source] ConnectionError),
    #[error("ask the X server")]
    Ask(#[source] ReplyError),
    #[error("make an object on the X server")]
    Make(#[source] ReplyOrIdError),
}

impl From<ConnectionError> for ScreenError {
    fn from(err: ConnectionError) -> Self {
        Self::Talk(err)
    }
}

impl From<ReplyError> for ScreenError {
    fn from(err: ReplyError) -> Self {
        Self::Ask(err)
    }
}

/// The two windows of the desktop, where they are mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Windows {
    pub(super) browser: Option<Window>,
    pub(super) terminal: Option<Window>,
}

/// A connection to the X server.
pub(super) struct Screen {
    server: RustConnection,
    root: Window,
}

impl Screen {
    /// Connects, with the cookie of the file `authority` where it has one.
    pub(super) fn connect(socket: &Path, authority: &Path) -> Result<Self, ScreenError> {
        let failed = |err| ScreenError::Socket {
            path: socket.to_owned(),
            err,
        };
        let stream = UnixStream::connect(socket).map_err(failed)?;
        let (stream, _) = DefaultStream::from_unix_stream(stream).map_err(failed)?;
        let (name, data) = fs::read(authority)
            .ok()
            .and_then(|bytes| authority::cookie(&bytes))
            .unwrap_or_default();
        let server = RustConnection::connect_to_stream_with_auth_info(stream, 0, name, data)
            .map_err(ScreenError::Greet)?;
        let root = server
            .setup()
            .roots
            .first()
            .ok_or(ScreenError::NoScreen)?
            .root;
        // Windows coming, going and being reparented, and the root's own size.
        let mask = EventMask::SUBSTRUCTURE_NOTIFY | EventMask::STRUCTURE_NOTIFY;
        server
            .change_window_attributes(root, &ChangeWindowAttributesAux::new().event_mask(mask))?
            .check()?;
        Ok(Self { server, root })
    }

    /// Asks to be told when anything is drawn.
    pub(super) fn report_damage(&self) -> Result<Damage, ScreenError> {
        self.server.damage_query_version(1, 1)?.reply()?;
        let damage = self.server.generate_id().map_err(ScreenError::Make)?;
        self.server
            .damage_create(damage, self.root, ReportLevel::NON_EMPTY)?
            .check()?;
        Ok(damage)
    }

    pub(super) fn stop_damage(&self, damage: Damage) -> Result<(), ScreenError> {
        self.server.damage_destroy(damage)?.check()?;
        Ok(())
    }

    /// Waits for the next event, whatever it is.
    pub(super) fn wait(&self) -> Result<(), ScreenError> {
        self.server.flush()?;
        self.server.wait_for_event()?;
        Ok(())
    }

    /// Drops the events so far: the look that follows sees what they tell.
    pub(super) fn forget_pending(&self, damage: Option<Damage>) -> Result<(), ScreenError> {
        if let Some(damage) = damage {
            self.server
                .damage_subtract(damage, x11rb::NONE, x11rb::NONE)?
                .check()?;
        }
        while self.server.poll_for_event()?.is_some() {}
        Ok(())
    }

    pub(super) fn size(&self) -> Result<(u16, u16), ScreenError> {
        let geometry = self.server.get_geometry(self.root)?.reply()?;
        Ok((geometry.width, geometry.height))
    }

    /// The two windows; of several browser windows the one that the X server lists first.
    pub(super) fn windows(&self) -> Result<Windows, ScreenError> {
        let mut found = Windows::default();
        for (role, window) in self.mapped()? {
            let place = match role {
                BROWSER => &mut found.browser,
                _ => &mut found.terminal,
            };
            place.get_or_insert(window);
        }
        Ok(found)
    }

    /// All windows of the browser's.
    pub(super) fn browsers(&self) -> Result<Vec<Window>, ScreenError> {
        let all = self.mapped()?.into_iter();
        Ok(all
            .filter(|(role, _)| *role == BROWSER)
            .map(|(_, window)| window)
            .collect())
    }

    /// The mapped windows that have a role, under whatever frames the window manager has put around them.
    fn mapped(&self) -> Result<Vec<(&'static str, Window)>, ScreenError> {
        let mut found = Vec::new();
        let mut level = vec![self.root];
        let mut looked_at = 0;
        for _ in 0..DEPTH {
            let mut below = Vec::new();
            for parent in level {
                let children = match self.server.query_tree(parent)?.reply() {
                    Ok(tree) => tree.children,
                    // It went away meanwhile; an event about that is on its way.
                    Err(ReplyError::X11Error(_)) => continue,
                    Err(err) => return Err(err.into()),
                };
                for child in children {
                    looked_at += 1;
                    match self.role(child)? {
                        Some(role) => {
                            found.extend(self.if_mapped(child)?.map(|window| (role, window)));
                        }
                        None => below.push(child),
                    }
                }
            }
            if looked_at > WINDOWS {
                break;
            }
            level = below;
        }
        Ok(found)
    }

    /// Which of the two windows this is, by either half of `WM_CLASS` (ICCCM section 4.1.2.5): xterm puts `-name` into the
    /// first, Chromium `--class` into the second.
    fn role(&self, window: Window) -> Result<Option<&'static str>, ScreenError> {
        let reply = self
            .server
            .get_property(false, window, AtomEnum::WM_CLASS, AtomEnum::STRING, 0, 64)?
            .reply();
        match reply {
            Ok(property) => Ok(role(&property.value)),
            Err(ReplyError::X11Error(_)) => Ok(None),
            Err(err) => Err(err.into()),
        }
    }

    /// Whether this window is there and the browser's, on the screen or hidden.
    pub(super) fn has_browser(&self, window: Window) -> Result<bool, ScreenError> {
        Ok(self.role(window)? == Some(BROWSER))
    }

    fn if_mapped(&self, window: Window) -> Result<Option<Window>, ScreenError> {
        match self.server.get_window_attributes(window)?.reply() {
            Ok(attributes) => Ok((attributes.map_state == MapState::VIEWABLE).then_some(window)),
            Err(ReplyError::X11Error(_)) => Ok(None),
            Err(err) => Err(err.into()),
        }
    }

    /// Asks the window's program to close it, as the button in its frame would (ICCCM section 4.2.8.1).
    pub(super) fn close(&self, window: Window) -> Result<(), ScreenError> {
        let atom = |name: &str| -> Result<u32, ScreenError> {
            Ok(self
                .server
                .intern_atom(false, name.as_bytes())?
                .reply()?
                .atom)
        };
        let data = [atom("WM_DELETE_WINDOW")?, x11rb::CURRENT_TIME, 0, 0, 0];
        let message = ClientMessageEvent::new(32, window, atom("WM_PROTOCOLS")?, data);
        self.server
            .send_event(false, window, EventMask::NO_EVENT, message)?
            .check()?;
        Ok(())
    }

    /// Presses and releases a key in `window`. False where the keyboard has no such key.
    pub(super) fn press(&self, window: Window, keysym: u32) -> Result<bool, ScreenError> {
        let setup = self.server.setup();
        let (first, last) = (setup.min_keycode, setup.max_keycode);
        let keys = self
            .server
            .get_keyboard_mapping(first, last - first + 1)?
            .reply()?;
        let each = usize::from(keys.keysyms_per_keycode.max(1));
        let Some(at) = keys
            .keysyms
            .chunks(each)
            .position(|symbols| symbols.first() == Some(&keysym))
        else {
            return Ok(false);
        };
        let code = first.saturating_add(u8::try_from(at).unwrap_or(u8::MAX));
        self.server
            .set_input_focus(InputFocus::PARENT, window, x11rb::CURRENT_TIME)?
            .check()?;
        for kind in [KEY_PRESS_EVENT, KEY_RELEASE_EVENT] {
            self.server
                .xtest_fake_input(kind, code, x11rb::CURRENT_TIME, x11rb::NONE, 0, 0, 0)?
                .check()?;
        }
        Ok(true)
    }

    /// Puts both windows in their places.
    pub(super) fn arrange(&self, size: (u16, u16), windows: Windows) -> Result<(), ScreenError> {
        let places = [
            (windows.terminal, layout::terminal(size)),
            (windows.browser, layout::browser(size)),
        ];
        for (window, area) in places {
            if let Some(window) = window {
                self.place(window, area)?;
            }
        }
        self.server.flush()?;
        Ok(())
    }

    fn place(&self, window: Window, area: Area) -> Result<(), ScreenError> {
        let (extra_width, extra_height) = self.decoration(window)?;
        let place = ConfigureWindowAux::new()
            .x(i32::from(area.x))
            .y(i32::from(area.y))
            .width(u32::from(area.width.saturating_sub(extra_width).max(1)))
            .height(u32::from(area.height.saturating_sub(extra_height).max(1)))
            .stack_mode(StackMode::ABOVE);
        // A window that went away meanwhile is no error of ours.
        self.server.configure_window(window, &place)?.ignore_error();
        Ok(())
    }

    /// What the window manager's frame adds to the window's width and height.
    fn decoration(&self, window: Window) -> Result<(u16, u16), ScreenError> {
        let (mut frame, mut here) = (window, window);
        for _ in 0..DEPTH {
            let Ok(tree) = self.server.query_tree(here)?.reply() else {
                return Ok((0, 0));
            };
            if tree.parent == self.root || tree.parent == x11rb::NONE {
                break;
            }
            (frame, here) = (tree.parent, tree.parent);
        }
        let (inner, outer) = (
            self.server.get_geometry(window)?.reply(),
            self.server.get_geometry(frame)?.reply(),
        );
        let (Ok(inner), Ok(outer)) = (inner, outer) else {
            return Ok((0, 0));
        };
        let borders = 2 * outer.border_width;
        Ok((
            (outer.width + borders).saturating_sub(inner.width),
            (outer.height + borders).saturating_sub(inner.height),
        ))
    }

    /// Pixels of rows spread over `area`, as the screen shows them.
    pub(super) fn samples(&self, area: Area) -> Result<Vec<Rgb>, ScreenError> {
        let lsb_first = self.server.setup().image_byte_order == ImageOrder::LSB_FIRST;
        let mut samples = Vec::new();
        for row in 1..=ROWS {
            let y = i16::try_from(area.y + area.height / (ROWS + 1) * row).unwrap_or(0);
            let x = i16::try_from(area.x).unwrap_or(0);
            let reply = self
                .server
                .get_image(
                    ImageFormat::Z_PIXMAP,
                    self.root,
                    x,
                    y,
                    area.width,
                    1,
                    u32::MAX,
                )?
                .reply();
            let image = match reply {
                Ok(image) if image.depth == 24 || image.depth == 32 => image.data,
                // The screen became smaller meanwhile, or has a depth that none of our images sets.
                Ok(_) | Err(ReplyError::X11Error(_)) => continue,
                Err(err) => return Err(err.into()),
            };
            let step = (image.len() / 4 / COLUMNS).max(1);
            samples.extend(image.chunks_exact(4).step_by(step).map(|pixel| {
                match (lsb_first, pixel) {
                    (true, [b, g, r, _]) | (false, [_, r, g, b]) => [*r, *g, *b],
                    _ => [0; 3],
                }
            }));
        }
        Ok(samples)
    }
}

fn role(wm_class: &[u8]) -> Option<&'static str> {
    let mut halves = wm_class.split(|byte| *byte == 0);
    halves.find_map(|half| {
        [BROWSER, TERMINAL]
            .into_iter()
            .find(|name| name.as_bytes() == half)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_known_by_either_half_of_their_class() {
        assert_eq!(
            role(b"chromium (/home/person/.config/chromium)\0vestibule-browser\0"),
            Some(BROWSER)
        );
        assert_eq!(role(b"vestibule-terminal\0XTerm\0"), Some(TERMINAL));
        assert_eq!(role(b"blackbox\0vestibule\0"), None);
        assert_eq!(role(b""), None);
    }
}

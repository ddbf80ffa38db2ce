//! An RFB 3.8 client (RFC 6143) that sees what a person sees and does what a person does: it keeps a copy of the screen
//! up to date, finds things on it by colour, and sends pointer and key events.
//!
//! A task reads the server's messages and asks for the next change after each; whoever waits looks at the copy.
mod frame;
mod keys;
mod wire;

pub use frame::{Area, Frame};
pub use keys::{ENTER, ESCAPE, Keysym, TAB};

use crate::wait;
use anyhow::{Context, Result, bail};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    task::JoinSet,
};

/// Left button, in a pointer event's mask.
const LEFT: u8 = 1;
/// At a picture that stays.
const LOOKS: u32 = 2;
/// Messages that wait to be written; more than a person can cause.
const QUEUE: usize = 256;

/// A connection to a screen. It ends when dropped.
#[derive(Debug)]
pub struct Rfb {
    screen: Arc<Mutex<Screen>>,
    out: mpsc::Sender<Vec<u8>>,
    _tasks: JoinSet<()>,
}

/// What the reading task leaves for those who look.
#[derive(Debug, Default)]
struct Screen {
    frame: Frame,
    /// Updates so far.
    updates: u64,
    /// What the server put on its clipboard last.
    clipboard: Option<String>,
    /// Why nothing comes any more.
    ended: Option<String>,
}

impl Rfb {
    /// Shakes hands over `io` (security type None, shared) and asks for the whole screen.
    ///
    /// # Errors
    /// When the other end does not speak RFB 3.8 or wants a password.
    pub async fn connect<S>(mut io: S) -> Result<Self>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (width, height) = wire::handshake(&mut io)
            .await
            .context("shake hands with the RFB server")?;
        let screen = Arc::new(Mutex::new(Screen {
            frame: Frame::new(width, height),
            ..Screen::default()
        }));
        let (mut read, mut write) = tokio::io::split(io);
        let (out, mut queue) = mpsc::channel::<Vec<u8>>(QUEUE);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Some(message) = queue.recv().await {
                if write.write_all(&message).await.is_err() || write.flush().await.is_err() {
                    break;
                }
            }
        });
        let (shared, ask) = (Arc::clone(&screen), out.clone());
        tasks.spawn(async move {
            let ended = follow(&mut read, &shared, &ask).await;
            lock(&shared).ended = Some(match ended {
                Ok(()) => "nobody looks any more".to_owned(),
                Err(err) => format!("{err:#}"),
            });
        });
        out.send(wire::update_request(false, width, height))
            .await
            .ok();
        Ok(Self {
            screen,
            out,
            _tasks: tasks,
        })
    }

    /// A copy of the screen as it is now.
    pub fn frame(&self) -> Frame {
        lock(&self.screen).frame.clone()
    }

    /// Updates received so far.
    pub fn updates(&self) -> u64 {
        lock(&self.screen).updates
    }

    /// What the other side put on its clipboard last.
    pub fn clipboard(&self) -> Option<String> {
        lock(&self.screen).clipboard.clone()
    }

    /// Why the connection ended, if it has.
    pub fn ended(&self) -> Option<String> {
        lock(&self.screen).ended.clone()
    }

    /// Looks at every new picture until `look` finds what it wants, for at most `limit` ([`wait::patient`]). A picture that stays
    /// is looked at a second time, for those who want something that does not move, and not again: the machine that looks
    /// may be the one that the VM needs.
    ///
    /// # Errors
    /// When the time is over, or the connection ended.
    pub async fn wait_for<T>(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut(&Frame) -> Option<T>,
    ) -> Result<T> {
        let limit = wait::patient(limit);
        let end = Instant::now() + limit;
        let (mut picture, mut looks) = (None, 0);
        loop {
            {
                let screen = lock(&self.screen);
                if picture != Some(screen.updates) {
                    (picture, looks) = (Some(screen.updates), 0);
                }
                if looks < LOOKS {
                    looks += 1;
                    if let Some(found) = look(&screen.frame) {
                        return Ok(found);
                    }
                }
                if let Some(why) = &screen.ended {
                    bail!("waited for {what}: the view ended: {why}");
                }
                if Instant::now() >= end {
                    let (size, colour) = (screen.frame.size(), screen.frame.commonest());
                    bail!(
                        "waited {limit:?} for {what}; last seen: {size:?}, after {} updates, most of it {colour:?}",
                        screen.updates
                    );
                }
            }
            tokio::time::sleep(wait::PAUSE).await;
        }
    }

    /// Waits until an area of at least `pixels` pixels of this colour is there.
    ///
    /// # Errors
    /// As [`Rfb::wait_for`].
    pub async fn wait_for_colour(
        &self,
        what: &str,
        rgb: [u8; 3],
        pixels: usize,
        limit: Duration,
    ) -> Result<Area> {
        self.wait_for(what, limit, |frame| {
            frame.area(rgb).filter(|area| area.pixels >= pixels)
        })
        .await
    }

    /// Moves the pointer to a place, presses the left button there and lets it go.
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn click(&self, x: u16, y: u16) -> Result<()> {
        for buttons in [0, LEFT, 0] {
            self.send(wire::pointer(buttons, x, y)).await?;
        }
        Ok(())
    }

    /// Presses and releases one key.
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn press(&self, key: Keysym) -> Result<()> {
        self.send(wire::key(key, true)).await?;
        self.send(wire::key(key, false)).await
    }

    /// Presses keys together, in this order, and releases them.
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn chord(&self, keys: &[Keysym]) -> Result<()> {
        for key in keys {
            self.send(wire::key(*key, true)).await?;
        }
        for key in keys.iter().rev() {
            self.send(wire::key(*key, false)).await?;
        }
        Ok(())
    }

    /// Types a text, key by key.
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn type_text(&self, text: &str) -> Result<()> {
        for c in text.chars() {
            self.press(keys::keysym(c)).await?;
        }
        Ok(())
    }

    /// Asks the server for another size of the screen (`SetDesktopSize`, ExtendedDesktopSize extension).
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn resize(&self, width: u16, height: u16) -> Result<()> {
        self.send(wire::set_desktop_size(width, height)).await
    }

    async fn send(&self, message: Vec<u8>) -> Result<()> {
        if self.out.send(message).await.is_err() {
            bail!("the view ended: {}", self.ended().unwrap_or_default());
        }
        Ok(())
    }
}

fn lock(screen: &Mutex<Screen>) -> MutexGuard<'_, Screen> {
    screen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Applies message after message; ends with the stream.
async fn follow(
    read: &mut (impl AsyncRead + Unpin),
    screen: &Mutex<Screen>,
    ask: &mpsc::Sender<Vec<u8>>,
) -> Result<()> {
    loop {
        match wire::read_message(read).await? {
            wire::Message::Update(rectangles) => {
                for _ in 0..rectangles {
                    let rectangle = wire::read_rectangle(read).await?;
                    let last = matches!(rectangle, wire::Rectangle::Last);
                    lock(screen).frame.apply(rectangle);
                    if last {
                        break;
                    }
                }
                let (width, height) = {
                    let mut screen = lock(screen);
                    screen.updates += 1;
                    screen.frame.size()
                };
                if ask
                    .send(wire::update_request(true, width, height))
                    .await
                    .is_err()
                {
                    return Ok(());
                }
            }
            wire::Message::Clipboard(text) => lock(screen).clipboard = Some(text),
            wire::Message::Other => {}
        }
    }
}

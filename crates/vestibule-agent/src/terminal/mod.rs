//! The sign-in's terminal: a PTY, an emulator that answers what tools ask of it, and everybody who looks at it.
//!
//! ```text
//! tool ⇄ PTY ⇄ pump ─▶ emulator (screen, links, answers) ─▶ readers of text: prompts, codes, URLs, failures
//!                  └─▶ broadcast, without the questions ─▶ xterm on the desktop, WebSockets of the dashboard
//! ```
//! Tools wait for answers to `ESC[6n` and place words with cursor moves (reference/providers.md §0.4), so nothing here
//! looks at raw bytes for text.
mod emulator;
mod links;
mod pty;
mod redact;
mod shown;
mod snapshot;
mod view;

pub(crate) use emulator::{Emulator, Size};
pub(crate) use pty::{Started, TerminalHandle, spawn};
pub(crate) use redact::redact;
pub(crate) use view::View;

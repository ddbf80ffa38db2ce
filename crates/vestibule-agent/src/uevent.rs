//! The kernel's device events (netlink `KOBJECT_UEVENT`, as udev uses them): "something about a device changed, look
//! again". Waits on them are level-triggered: subscribe first, look, then wait, then look again.
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind,
        netlink::{KOBJECT_UEVENT, SocketAddrNetlink},
        recv, socket_with,
    },
};
use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

/// A subscription to device events.
#[derive(Debug)]
pub(crate) struct Uevents(OwnedFd);

impl Uevents {
    /// Subscribes; from now on no event is missed.
    ///
    /// # Errors
    /// When the kernel has no netlink (never in our guests).
    pub(crate) fn subscribe() -> Result<Self, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            flags,
            Some(KOBJECT_UEVENT),
        )?;
        // Group 1 carries the kernel's own events, group 2 those that udev passes on.
        bind(&socket, &SocketAddrNetlink::new(0, 1))?;
        Ok(Self(socket))
    }

    /// Looks, and looks again after each device event, until `look` finds something or `limit` has passed.
    pub(crate) fn wait_for<T>(
        &self,
        limit: Duration,
        mut look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(found) = look() {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            self.pause(left);
        }
    }

    /// Returns after the next events or after `limit`.
    fn pause(&self, limit: Duration) {
        let timeout = Timespec::try_from(limit).ok();
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        if poll(&mut fds, timeout.as_ref()).is_ok() {
            // Only that something happened matters; ENOBUFS (events lost) means the same: look again.
            let mut bytes = [0u8; 4096];
            while recv(&self.0, &mut bytes[..], RecvFlags::DONTWAIT).is_ok_and(|(read, _)| read > 0)
            {
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_looks_first_and_is_bounded() {
        let events = Uevents::subscribe().unwrap();
        assert_eq!(events.wait_for(Duration::ZERO, || Some(7)), Some(7));
        let begun = Instant::now();
        assert_eq!(
            events.wait_for(Duration::from_millis(50), || None::<()>),
            None
        );
        assert!(begun.elapsed() >= Duration::from_millis(50));
    }
}

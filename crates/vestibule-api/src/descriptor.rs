//! An open file that goes to another process beside one byte on a Unix socket (`SCM_RIGHTS`, unix(7)).
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Sends `byte`, and `file` beside it. Blocks where `socket` does.
///
/// # Errors
/// When the other end is gone, or `socket` would block.
pub fn send(socket: impl AsFd, byte: u8, file: BorrowedFd<'_>) -> io::Result<()> {
    let files = [file];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    beside.push(SendAncillaryMessage::ScmRights(&files));
    let bytes = [byte];
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(&bytes)],
        &mut beside,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Receives a byte and the file beside it; none: there was none. Blocks where `socket` does.
///
/// # Errors
/// When `socket` is broken, or would block.
pub fn receive(socket: impl AsFd) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut beside,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let files = beside.drain().filter_map(|message| {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            Some(files)
        } else {
            None
        }
    });
    Ok(files.flatten().next())
}

//! An open file that goes to another process beside one byte on a Unix socket (`SCM_RIGHTS`, unix(7)).
use rustix::{
    fs::{MemfdFlags, memfd_create},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags,
    },
};
use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Seek as _, Write as _},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// A file in memory, at its beginning: never on disk, and of any size.
///
/// # Errors
/// When the kernel has no memory or descriptor for it.
pub fn in_memory(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("vestibule-handed-over", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

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

//! A host's end of the stream to a guest, for this crate's tests: it takes every stream that the guest opens and reads none,
//! with the bytes of memory that its argument says. The guest is on its standard input, a socket.
use std::{error::Error, os::unix::net::UnixStream};
use vestibule_api::mux::{Side, start};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let bytes = std::env::args().nth(1).ok_or("how much memory?")?;
    vestibule_vm::memory::limit(bytes.parse()?)?;
    let guest = UnixStream::from(rustix::io::dup(std::io::stdin())?);
    guest.set_nonblocking(true)?;
    let (_mux, mut incoming) = start(tokio::net::UnixStream::from_std(guest)?, Side::Host);
    let mut unread = Vec::new();
    while let Some(stream) = incoming.accept().await {
        unread.push(stream?);
    }
    Ok(())
}

//! The stream over a vsock, where the machine has one in place of a virtio-serial port: the agent listens, the host comes.
//!
//! A listener takes one host and is gone: while somebody is on the stream nobody else is let wait, and a snapshot is taken of
//! an agent that listens anew and has told so. A connection does not survive a snapshot, a listener does (Firecracker's
//! docs/vsock.md), so a copy is found by whoever dials it.
use std::{io, time::Duration};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use tracing::{debug, warn};
use vestibule_api::stream::{VSOCK_LISTENS_PORT, VSOCK_PORT};

/// On the kernel's command line, where the stream is a vsock.
const OPTION: &str = "vestibule.stream=vsock";
/// A VMM that does not take the word at once takes it never; the host dials in any case.
const TELL_LIMIT: Duration = Duration::from_secs(2);

/// Why no host came.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VsockError {
    #[error("listen on the vsock port {VSOCK_PORT}")]
    Listen(#[source] io::Error),
    #[error("wait for the host on the vsock port {VSOCK_PORT}")]
    Accept(#[source] io::Error),
}

/// Whether a kernel command line says that the stream is a vsock.
pub(crate) fn chosen(options: &str) -> bool {
    options.split_ascii_whitespace().any(|word| word == OPTION)
}

/// Says that it is about to listen, listens, and waits for the host.
///
/// # Errors
/// When this kernel has no vsock, or somebody else has the port.
pub(crate) async fn connected() -> Result<VsockStream, VsockError> {
    // First the word: a host that has a connection takes it for the end of that one.
    tell().await;
    let any = VsockAddr::new(VMADDR_CID_ANY, VSOCK_PORT);
    let listener = VsockListener::bind(any).map_err(VsockError::Listen)?;
    loop {
        let (stream, peer) = listener.accept().await.map_err(VsockError::Accept)?;
        // A program in the guest could come by its own address.
        if peer.cid() == VMADDR_CID_HOST {
            return Ok(stream);
        }
        warn!(
            cid = peer.cid(),
            "somebody else than the host came to the stream"
        );
    }
}

/// A connection is the word; there is nothing to say on it.
async fn tell() {
    let host = VsockAddr::new(VMADDR_CID_HOST, VSOCK_LISTENS_PORT);
    match tokio::time::timeout(TELL_LIMIT, VsockStream::connect(host)).await {
        Ok(Ok(stream)) => drop(stream),
        Ok(Err(err)) => debug!(error = %err, "the host was not told that the agent listens"),
        Err(_) => debug!("the host was not told that the agent listens: no answer"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_chooses() {
        assert!(chosen("quiet vestibule.stream=vsock console=ttyS0\n"));
        assert!(!chosen("quiet vestibule.stream=vsockets") && !chosen(""));
    }
}

//! How host and guest talk over the one stream: first a handshake, then a multiplexer (yamux), then each multiplexed
//! stream begins with one [`Open`] header.
//!
//! The handshake proves to each side that the other holds the key made for this VM; it is HMAC-SHA256 over both
//! nonces, with a label for each direction so that an answer cannot be reflected:
//!
//! ```text
//! guest → host   MAGIC, 32 bytes nonce G
//! host  → guest  MAGIC, G, 32 bytes nonce H, HMAC(key, "vestibule host v1"  | G | H)
//! guest → host   HMAC(key, "vestibule guest v1" | G | H)
//! ```
//! A virtio-serial port has no notion of a connection: after a restore or a restart of one side, stale bytes may
//! stand in it, and a side whose peer has gone and come back need not see it. So each side skips up to [`RESYNC_LIMIT`]
//! bytes until it sees [`MAGIC`]; a hello that comes where the host waits for a proof is answered anew; a guest passes over
//! an answer to a hello that is not its own; and a host that hears nothing asks for the hello again, with [`MAGIC`] and zeros
//! where G would be.
use serde::{Deserialize, Serialize};

/// Begins what each side says. Contains bytes that no yamux header begins with; the last but one is the handshake's version.
pub const MAGIC: [u8; 8] = *b"\xf5VSTBL2\n";
/// Bytes in a nonce, in the key and in a tag.
pub const KEY_LEN: usize = 32;
/// Label of the host's tag.
pub const HOST_LABEL: &[u8] = b"vestibule host v1";
/// Label of the guest's tag.
pub const GUEST_LABEL: &[u8] = b"vestibule guest v1";
/// At most so many bytes are skipped in search of [`MAGIC`].
pub const RESYNC_LIMIT: usize = 1 << 20;
/// Name of the virtio-serial port (`/dev/virtio-ports/<name>`, `/sys/class/virtio-ports/*/name`).
pub const PORT_NAME: &str = "vestibule.stream";
/// Where there is a vsock instead: the guest's port on which it listens for the host.
pub const VSOCK_PORT: u32 = 1024;
/// The host's port to which the guest connects for a moment each time that it begins to listen.
pub const VSOCK_LISTENS_PORT: u32 = 1025;
/// An [`Open`] header is one line of JSON of at most so many bytes, newline included.
pub const OPEN_LIMIT: usize = 4096;

/// The first line of a multiplexed stream: what the rest of it is. The opener writes it; there is no reply line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "service", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Open {
    /// host → guest: HTTP/1.1 to the agent's API.
    Http,
    /// host → guest: RFB (RFC 6143) to the guest's X server, byte for byte.
    Rfb,
    /// guest → host: one client connection to the egress proxy; HTTP/1.1, `CONNECT` or absolute form.
    Proxy,
}

/// What the config drive holds: 4096 bytes, JSON padded with NUL, readable by root in the guest.
///
/// It is a second read-only virtio-blk disk with serial [`CONFIG_DRIVE_SERIAL`]; the host keeps it in a memfd, so the
/// key never reaches a disk of the host's. After a restore the guest reads it again, past its cache.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigDrive {
    pub machine_id: crate::ids::MachineId,
    /// Raised with each boot or restore of the same machine.
    pub generation: u64,
    /// The stream key, base64 of [`KEY_LEN`] bytes.
    pub stream_key: String,
    /// The host's clock in µs since the epoch when the drive was written.
    pub now_micros: i64,
    /// 64 bytes for the guest kernel's generator, base64.
    pub entropy: String,
    /// Host name for the guest.
    pub hostname: String,
}

impl std::fmt::Debug for ConfigDrive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigDrive")
            .field("machine_id", &self.machine_id)
            .field("generation", &self.generation)
            .field("hostname", &self.hostname)
            .finish_non_exhaustive()
    }
}

/// Why a config drive could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    #[error("the config drive does not fit into {CONFIG_DRIVE_LEN} bytes")]
    TooLong,
    /// The source names a position, never the content.
    #[error("the config drive holds no configuration (line {line}, column {column})")]
    NotJson { line: usize, column: usize },
}

impl ConfigDrive {
    /// The drive's bytes, [`CONFIG_DRIVE_LEN`] of them, padded with NUL and zeroed when dropped.
    ///
    /// # Errors
    /// When the host name is so long that the whole does not fit.
    pub fn to_bytes(&self) -> Result<zeroize::Zeroizing<Vec<u8>>, DriveError> {
        // Room for the whole at once: a vector that grows leaves copies of the key behind.
        let mut bytes = zeroize::Zeroizing::new(Vec::with_capacity(CONFIG_DRIVE_LEN));
        serde_json::to_writer(&mut *bytes, self).map_err(|_| DriveError::TooLong)?;
        if bytes.len() > CONFIG_DRIVE_LEN {
            return Err(DriveError::TooLong);
        }
        bytes.resize(CONFIG_DRIVE_LEN, 0);
        Ok(bytes)
    }

    /// Reads what [`ConfigDrive::to_bytes`] wrote.
    ///
    /// # Errors
    /// When the bytes before the first NUL are not such JSON; the error says where, and never what.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DriveError> {
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        serde_json::from_slice(&bytes[..end]).map_err(|err| DriveError::NotJson {
            line: err.line(),
            column: err.column(),
        })
    }
}

impl Drop for ConfigDrive {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.stream_key);
        zeroize::Zeroize::zeroize(&mut self.entropy);
    }
}

/// Serial number of the config drive (`/sys/block/*/serial`).
pub const CONFIG_DRIVE_SERIAL: &str = "vestibule-config";
/// Its size in bytes.
pub const CONFIG_DRIVE_LEN: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_drive_is_read_as_it_was_written() {
        let mut drive = ConfigDrive {
            machine_id: crate::ids::MachineId::generate(),
            generation: 1,
            stream_key: "a".repeat(44),
            now_micros: 1_763_888_400_000_000,
            entropy: "b".repeat(88),
            hostname: String::from("vestibule"),
        };
        let bytes = drive.to_bytes().unwrap();
        assert_eq!(bytes.len(), CONFIG_DRIVE_LEN);
        let read = ConfigDrive::from_bytes(&bytes).unwrap();
        assert_eq!(read.stream_key, drive.stream_key);
        assert!(!format!("{read:?}").contains("aaaa"));
        assert!(ConfigDrive::from_bytes(&bytes[..40]).is_err());
        assert!(ConfigDrive::from_bytes(&[0; CONFIG_DRIVE_LEN]).is_err());
        drive.hostname = "h".repeat(CONFIG_DRIVE_LEN);
        assert!(matches!(drive.to_bytes(), Err(DriveError::TooLong)));
    }
}

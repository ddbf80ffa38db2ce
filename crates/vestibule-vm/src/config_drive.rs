//! The config drive in a memfd: sealed, so that nobody changes it, and never on a disk of the host's.
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use rand::RngCore;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd},
};
use vestibule_api::{
    ids::MachineId,
    mux::StreamKey,
    stream::{ConfigDrive, DriveError},
    time::Timestamp,
};
use zeroize::Zeroize;

/// Bytes for the guest kernel's generator.
const ENTROPY: usize = 64;

/// Why there is no config drive.
#[derive(Debug, thiserror::Error)]
pub enum ConfigDriveError {
    #[error(transparent)]
    Content(#[from] DriveError),
    #[error("put the config drive into memory")]
    Memory(#[source] io::Error),
}

/// A descriptor of the drive, open for reading only.
#[derive(Debug)]
pub struct DriveFd(pub OwnedFd);

/// Makes the drive of one life of a machine.
///
/// # Errors
/// When the host has no memory for 4 KiB.
pub fn make(
    machine_id: MachineId,
    generation: u64,
    key: &StreamKey,
) -> Result<DriveFd, ConfigDriveError> {
    let mut entropy = [0u8; ENTROPY];
    rand::rng().fill_bytes(&mut entropy);
    let drive = ConfigDrive {
        machine_id,
        generation,
        stream_key: key.to_base64(),
        now_micros: Timestamp::now().as_micros(),
        entropy: BASE64.encode(entropy),
        hostname: hostname(machine_id),
    };
    entropy.zeroize();
    let bytes = drive.to_bytes()?;
    in_memory(&bytes)
        .map(DriveFd)
        .map_err(ConfigDriveError::Memory)
}

/// The guest's host name: from the whole id, and short enough for Linux' 64.
fn hostname(machine_id: MachineId) -> String {
    format!("vm-{machine_id}")
}

fn in_memory(bytes: &[u8]) -> io::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create(
        "vestibule-config",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    let mut file = File::from(memfd);
    file.write_all(bytes)?;
    let all = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, all)?;
    // QEMU takes a descriptor from a set only where its access mode is the one it wants.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use vestibule_api::stream::CONFIG_DRIVE_LEN;

    #[test]
    fn the_drive_is_whole_and_cannot_be_changed() {
        let (id, key) = (MachineId::generate(), StreamKey::generate());
        let fd = make(id, 3, &key).unwrap().0;
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        assert!(
            File::options()
                .write(true)
                .open(&path)
                .and_then(|mut f| f.write_all(b"x"))
                .is_err()
        );
        let mut bytes = Vec::new();
        File::from(fd).read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), CONFIG_DRIVE_LEN);
        let read = ConfigDrive::from_bytes(&bytes).unwrap();
        assert_eq!((read.machine_id, read.generation), (id, 3));
        assert_eq!(StreamKey::of(&read).unwrap().to_base64(), key.to_base64());
        assert!(read.hostname.len() < 64);
    }
}

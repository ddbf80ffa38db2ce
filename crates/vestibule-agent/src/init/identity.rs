//! What makes this VM another one than every other VM of the same image: clock, entropy, machine-id, host name.
use super::InitError;
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use rustix::{
    ioctl::{Setter, ioctl, opcode},
    time::{ClockId, Timespec, clock_settime},
};
use std::{fs, io, path::Path};
use vestibule_api::stream::ConfigDrive;

/// Bytes of entropy in the drive.
const ENTROPY_LEN: usize = 64;

/// Applies `config` to the kernel, and writes the identity below `root`.
pub(crate) fn apply(config: &ConfigDrive, root: &Path) -> Result<(), InitError> {
    set_clock(config.now_micros)?;
    let entropy = BASE64
        .decode(&config.entropy)
        .map_err(|_| InitError::ConfigValue("entropy"))?;
    let entropy: [u8; ENTROPY_LEN] = entropy
        .try_into()
        .map_err(|_| InitError::ConfigValue("entropy"))?;
    credit_entropy(entropy).map_err(InitError::Entropy)?;
    write_identity(config, root)
}

/// machine-id(5): 32 lower-case hex digits and a newline. hostname(5): one line.
fn write_identity(config: &ConfigDrive, root: &Path) -> Result<(), InitError> {
    let id: String = config
        .machine_id
        .to_string()
        .chars()
        .filter(|c| *c != '-')
        .collect();
    write(&root.join("etc/machine-id"), &format!("{id}\n"))?;
    let name = &config.hostname;
    let good = (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if !good {
        return Err(InitError::ConfigValue("host name"));
    }
    write(&root.join("etc/hostname"), &format!("{name}\n"))
}

fn write(path: &Path, text: &str) -> Result<(), InitError> {
    fs::write(path, text).map_err(|err| InitError::Write {
        path: path.to_owned(),
        err,
    })
}

pub(crate) fn set_clock(micros: i64) -> Result<(), InitError> {
    let time = Timespec {
        tv_sec: micros.div_euclid(1_000_000),
        tv_nsec: micros.rem_euclid(1_000_000) * 1000,
    };
    clock_settime(ClockId::Realtime, time).map_err(InitError::Clock)
}

/// `struct rand_pool_info` of linux/random.h.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: i32,
    buf_bytes: i32,
    buf: [u8; ENTROPY_LEN],
}

/// `RNDADDENTROPY`, `_IOW('R', 0x03, int[2])`: the size in the number is that of the head, not of the bytes.
const ADD_ENTROPY: rustix::ioctl::Opcode = opcode::write::<[i32; 2]>(b'R', 0x03);

#[expect(unsafe_code, reason = "an ioctl that rustix has no function for")]
fn credit_entropy(buf: [u8; ENTROPY_LEN]) -> io::Result<()> {
    let random = fs::File::options().write(true).open("/dev/random")?;
    let pool = RandPoolInfo {
        entropy_bits: 8 * 64,
        buf_bytes: 64,
        buf,
    };
    // SAFETY: random(4): RNDADDENTROPY reads a rand_pool_info whose `buf` is as long as `buf_bytes` says.
    unsafe { ioctl(&random, Setter::<ADD_ENTROPY, _>::new(pool)) }.map_err(io::Error::from)
}

/// `RNDRESEEDCRNG`: what was added counts for the next byte, not for those in five minutes.
const RESEED: rustix::ioctl::Opcode = opcode::none(b'R', 0x07);

/// Makes the kernel's generator begin anew from its pool (random(4)).
#[expect(unsafe_code, reason = "an ioctl that rustix has no function for")]
pub(crate) fn reseed() -> io::Result<()> {
    let random = fs::File::options().write(true).open("/dev/random")?;
    // SAFETY: random(4): RNDRESEEDCRNG takes no argument.
    unsafe { ioctl(&random, rustix::ioctl::NoArg::<RESEED>::new()) }.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(hostname: &str) -> ConfigDrive {
        ConfigDrive {
            machine_id: "018f0000-0000-7000-8000-000000000001".parse().unwrap(),
            generation: 1,
            stream_key: String::new(),
            now_micros: 0,
            entropy: String::new(),
            hostname: hostname.into(),
        }
    }

    #[test]
    fn the_identity_is_written_as_systemd_reads_it() {
        let root = camino_tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        write_identity(&config("vm-1"), root.path().as_std_path()).unwrap();
        let read = |name: &str| fs::read_to_string(root.path().join("etc").join(name)).unwrap();
        assert_eq!(
            read("machine-id"),
            "018f000000007000800000000000 0001\n".replace(' ', "")
        );
        assert_eq!(read("hostname"), "vm-1\n");
        let refused = write_identity(&config("a\nb"), root.path().as_std_path());
        assert!(matches!(refused, Err(InitError::ConfigValue("host name"))));
    }

    #[test]
    fn the_ioctl_number_is_the_kernels() {
        assert_eq!((ADD_ENTROPY, RESEED), (0x4008_5203, 0x5207));
    }
}

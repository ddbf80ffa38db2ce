//! Memory and listening sockets, from proc(5).
use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};
use vestibule_api::agent::{Listener, MemoryReport};

/// The trimmed content of a one-line file; empty where it cannot be read.
pub(super) fn line(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

pub(super) fn memory() -> io::Result<MemoryReport> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let pressure = fs::read_to_string("/proc/pressure/memory").ok();
    Ok(MemoryReport {
        total_kib: kib(&text, "MemTotal:"),
        available_kib: kib(&text, "MemAvailable:"),
        pressure_avg10: pressure.as_deref().and_then(some_avg10),
    })
}

fn kib(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// `some avg10=0.00 avg60=…` of Documentation/accounting/psi.rst.
fn some_avg10(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    line.split_whitespace()
        .find_map(|word| word.strip_prefix("avg10="))?
        .parse()
        .ok()
}

/// Everything that listens, with its process where that can be told; and what could not be read.
pub(super) fn listeners() -> (Vec<Listener>, Vec<String>) {
    let owners = owners();
    let (mut found, mut troubles) = (Vec::new(), Vec::new());
    for (family, file) in [
        ("tcp", "/proc/net/tcp"),
        ("tcp6", "/proc/net/tcp6"),
        ("unix", "/proc/net/unix"),
    ] {
        match fs::read_to_string(file) {
            Ok(text) => found.extend(text.lines().skip(1).filter_map(|line| {
                let (address, inode) = if family == "unix" {
                    unix(line)
                } else {
                    tcp(line)
                }?;
                Some(Listener {
                    family: family.to_owned(),
                    address,
                    process: owners.get(&inode).cloned(),
                })
            })),
            // A kernel without IPv6 has no tcp6.
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            Err(err) => troubles.push(format!("listeners: read {file}: {err}")),
        }
    }
    found.sort_by(|a, b| (&a.family, &a.address).cmp(&(&b.family, &b.address)));
    found.dedup();
    (found, troubles)
}

/// `sl local_address rem_address st … uid timeout inode`; state `0A` is LISTEN.
fn tcp(line: &str) -> Option<(String, u64)> {
    let fields: Vec<_> = line.split_whitespace().collect();
    if *fields.get(3)? != "0A" {
        return None;
    }
    let (address, port) = fields.get(1)?.split_once(':')?;
    let address = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(
            u32::from_str_radix(address, 16).ok()?.to_ne_bytes(),
        )),
        32 => {
            // Four words, each in the byte order of the host.
            let mut bytes = [0; 16];
            for (index, word) in bytes.chunks_exact_mut(4).enumerate() {
                let hex = address.get(index * 8..index * 8 + 8)?;
                word.copy_from_slice(&u32::from_str_radix(hex, 16).ok()?.to_ne_bytes());
            }
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    let port = u16::from_str_radix(port, 16).ok()?;
    Some((
        SocketAddr::new(address, port).to_string(),
        fields.get(9)?.parse().ok()?,
    ))
}

/// `Num RefCount Protocol Flags Type St Inode Path`; flag `10000` is a socket that accepts.
fn unix(line: &str) -> Option<(String, u64)> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let flags = u32::from_str_radix(fields.get(3)?, 16).ok()?;
    let path = fields.get(7).filter(|_| flags & 0x1_0000 != 0)?;
    Some(((*path).to_owned(), fields.get(6)?.parse().ok()?))
}

/// Every process there is.
pub(super) fn pids() -> io::Result<impl Iterator<Item = u32>> {
    let entries = fs::read_dir("/proc")?.flatten();
    Ok(entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()))
}

/// Socket inode → `name (pid)`.
fn owners() -> BTreeMap<u64, String> {
    let mut owners = BTreeMap::new();
    for pid in pids().into_iter().flatten() {
        // Processes end while we look.
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        let name = line(&format!("/proc/{pid}/comm"));
        for target in descriptors
            .flatten()
            .filter_map(|fd| fs::read_link(fd.path()).ok())
        {
            let inode = target.to_str().and_then(|text| {
                text.strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .parse()
                    .ok()
            });
            if let Some(inode) = inode {
                owners
                    .entry(inode)
                    .or_insert_with(|| format!("{name} ({pid})"));
            }
        }
    }
    owners
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_listeners_are_found() {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let dir = camino_tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let _unix = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let (found, troubles) = listeners();
        assert!(troubles.is_empty(), "{troubles:?}");
        let of = |address: &str| {
            found
                .iter()
                .find(|l| l.address == address)
                .and_then(|l| l.process.clone())
        };
        let ours = format!("({})", std::process::id());
        assert!(
            of(&tcp.local_addr().unwrap().to_string())
                .is_some_and(|process| process.ends_with(&ours))
        );
        assert!(of(path.as_str()).is_some_and(|process| process.ends_with(&ours)));
    }

    #[test]
    fn addresses_read_as_people_write_them() {
        let v6 = "  0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 77 1";
        assert_eq!(tcp(v6), Some(("[::1]:8080".to_owned(), 77)));
        assert_eq!(tcp(&v6.replace(" 0A ", " 01 ")), None);
        assert_eq!(tcp(""), None);
        assert_eq!(
            unix("0: 00000002 00000000 00010000 0001 01 99 /run/x.sock"),
            Some(("/run/x.sock".to_owned(), 99))
        );
        assert_eq!(
            unix("0: 00000002 00000000 00000000 0001 03 99 /run/x.sock"),
            None
        );
    }

    #[test]
    fn memory_and_pressure_are_numbers() {
        assert!(memory().unwrap().total_kib > 0);
        assert_eq!(
            some_avg10("some avg10=1.50 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00"),
            Some(1.5)
        );
        assert_eq!(some_avg10(""), None);
    }
}

//! The X authority file: who may talk to the X server (Xsecurity(7)). Numbers are big-endian, strings have two bytes of
//! length before them (libXau, `AuRead.c`).
use std::{
    fs, io,
    ops::Range,
    os::unix::fs::FileExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

const COOKIE: &[u8] = b"MIT-MAGIC-COOKIE-1";

/// Where in `bytes` the cookies are.
fn cookies(bytes: &[u8]) -> Vec<Range<usize>> {
    let field = |at: &mut usize| -> Option<Range<usize>> {
        let length = bytes.get(*at..*at + 2)?;
        let start = *at + 2;
        let end = start + usize::from(u16::from_be_bytes([length[0], length[1]]));
        bytes.get(start..end)?;
        *at = end;
        Some(start..end)
    };
    let mut found = Vec::new();
    let mut at = 0;
    let mut entry = || -> Option<(Range<usize>, Range<usize>)> {
        at += 2; // The family.
        let (_address, _display) = (field(&mut at)?, field(&mut at)?);
        Some((field(&mut at)?, field(&mut at)?))
    };
    while let Some((name, data)) = entry() {
        if &bytes[name] == COOKIE {
            found.push(data);
        }
    }
    found
}

/// Name and data of the first cookie.
pub(super) fn cookie(bytes: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let data = cookies(bytes).into_iter().next()?;
    Some((COOKIE.to_vec(), bytes[data].to_vec()))
}

/// Puts another cookie into the file at `path`, and nothing else: every entry is the same server's. The server reads
/// the file again when a client comes and the file's time is a later second than that of what it knows (os/auth.c,
/// `CheckAuthorization`), which a clock that was ahead when the snapshot was made would not give. It adds what it reads
/// (`LoadAuthorization`) and forgets nothing before it ends, so the snapshot's cookie stays good.
///
/// # Errors
/// When the file cannot be read or written, or has no cookie.
pub(crate) fn renew(path: &Path) -> io::Result<()> {
    let mut bytes = fs::read(path)?;
    let known = fs::metadata(path)?.modified()?;
    let all = cookies(&bytes);
    let length = all.first().map_or(0, Range::len);
    if length == 0 {
        return Err(io::Error::other("the X authority file has no cookie"));
    }
    let mut new = vec![0; length];
    rand::RngCore::fill_bytes(&mut rand::rng(), &mut new);
    for range in all.into_iter().filter(|range| range.len() == length) {
        bytes[range].copy_from_slice(&new);
    }
    // In place: the file stays the person's.
    let file = fs::File::options().write(true).open(path)?;
    file.write_all_at(&bytes, 0)?;
    file.set_modified(SystemTime::now().max(known + Duration::from_secs(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Vec<u8> {
        let mut file = Vec::new();
        for (name, data) in [
            (&b"XDM-AUTHORIZATION-1"[..], &b"x"[..]),
            (b"MIT-MAGIC-COOKIE-1", b"0123456789abcdef"),
            (b"MIT-MAGIC-COOKIE-1", b"0123456789abcdef"),
        ] {
            file.extend([0xff, 0xff]);
            for field in [&b""[..], b"1", name, data] {
                file.extend(u16::try_from(field.len()).unwrap().to_be_bytes());
                file.extend(field);
            }
        }
        file
    }

    #[test]
    fn the_cookie_is_found_behind_other_entries() {
        let file = file();
        assert_eq!(cookie(&file).unwrap().1, b"0123456789abcdef");
        let first = cookies(&file)[0].end;
        for cut in 0..first {
            assert_eq!(cookie(&file[..cut]), None, "cut at {cut}");
        }
        assert_eq!(cookie(b""), None);
    }

    #[test]
    fn the_server_sees_a_new_cookie_whatever_the_clock_says() {
        let dir = camino_tempfile::tempdir().unwrap();
        let path = dir.path().join("Xauthority");
        fs::write(&path, file()).unwrap();
        let second = |time: SystemTime| {
            time.duration_since(SystemTime::UNIX_EPOCH)
                .unwrap()
                .as_secs()
        };
        let modified = || second(fs::metadata(&path).unwrap().modified().unwrap());
        let now = SystemTime::now();
        let week = Duration::from_secs(7 * 24 * 3600);
        for known in [now, now + week, now - week] {
            let written = fs::File::options().write(true).open(&path).unwrap();
            written.set_modified(known).unwrap();
            renew(path.as_std_path()).unwrap();
            assert!(modified() > second(known) && modified() >= second(now));
        }
    }

    #[test]
    fn another_cookie_takes_the_place_of_all() {
        let dir = camino_tempfile::tempdir().unwrap();
        let path = dir.path().join("Xauthority");
        fs::write(&path, file()).unwrap();
        renew(path.as_std_path()).unwrap();
        let new = fs::read(&path).unwrap();
        let old = file();
        let (a, b) = (cookies(&new)[0].clone(), cookies(&new)[1].clone());
        assert_eq!(new[a.clone()], new[b.clone()]);
        assert_ne!(new[a.clone()], old[a.clone()]);
        assert_eq!(new[..a.start], old[..a.start]);
        assert_eq!(new[a.end..b.start], old[a.end..b.start]);
        fs::write(&path, "").unwrap();
        assert!(renew(path.as_std_path()).is_err());
    }
}

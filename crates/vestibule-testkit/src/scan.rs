//! Looks for canaries, words that only one sign-in knew: in every file that Vestibule can write, in shared memory, in core
//! dumps, and in the memory of its processes.
//!
//! A word is looked for as it is, in hexadecimal, percent-encoded, in UTF-16, and in base64 at each of the three places
//! where it can begin in a group. A core dump that is compressed is a hit of its own: nothing can be said about it.
use crate::stage::processes_of;
use aho_corasick::AhoCorasick;
use anyhow::{Context, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD as BASE64};
use camino::Utf8Path;
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Bytes read at once.
const BLOCK: usize = 1 << 20;
/// What is shorter lies about by chance, and has no form in every base64.
const SHORTEST: usize = 8;

/// Where handlers of core dumps keep them: systemd's, and Ubuntu's two.
const DUMPS: [&str; 3] = [
    "/var/lib/systemd/coredump",
    "/var/lib/apport/coredump",
    "/var/crash",
];
/// How compressed files begin, and Ubuntu's reports, which have a compressed dump in them: zstd, LZ4, xz, gzip, apport.
const COMPRESSED: [&[u8]; 5] = [
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
    b"\xfd7zXZ",
    b"\x1f\x8b",
    b"ProblemType:",
];
/// The canary of a hit that is a file which can't be looked into.
pub const UNKNOWN: &str = "unknown";

/// A canary where none may be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Hit {
    /// The canary's name, never its value.
    pub canary: String,
    /// How it was written there.
    pub form: &'static str,
    pub place: String,
}

/// What is looked for.
#[derive(Debug)]
pub struct Scan {
    /// Each form's canary and name, in the automaton's order.
    needles: Vec<(String, &'static str)>,
    /// All at once: some gigabytes of a VM are gone through.
    automaton: AhoCorasick,
    longest: usize,
    hits: Vec<Hit>,
}

impl Scan {
    /// For these words by their names.
    ///
    /// # Errors
    /// When a word has fewer than [`SHORTEST`] bytes, there is none, or there are more than an automaton can hold.
    pub fn new(canaries: &BTreeMap<String, String>) -> Result<Self> {
        let (mut needles, mut patterns) = (Vec::new(), Vec::new());
        ensure!(!canaries.is_empty(), "there is no word to look for");
        for (name, word) in canaries {
            ensure!(
                word.len() >= SHORTEST,
                "the word `{name}` has {} bytes: fewer than {SHORTEST} are found by chance",
                word.len()
            );
            for (form, bytes) in forms(word.as_bytes()) {
                needles.push((name.clone(), form));
                patterns.push(bytes);
            }
        }
        Ok(Self {
            needles,
            automaton: AhoCorasick::new(&patterns).context("make an automaton of the words")?,
            longest: patterns.iter().map(Vec::len).max().unwrap_or(1),
            hits: Vec::new(),
        })
    }

    /// Everything that the controller `pid` on `home` and its VMs can have left.
    ///
    /// # Errors
    /// When a place can't be looked at.
    pub fn everywhere(mut self, home: &Utf8Path, pid: Option<u32>) -> Result<Vec<Hit>> {
        self.files(home.as_std_path());
        self.files(Path::new("/dev/shm"));
        self.dumps(home, pid);
        for entry in std::fs::read_dir(std::env::temp_dir())?.flatten() {
            let name = entry.file_name();
            let ours = ["vestibule", "core"].map(|word| name.to_string_lossy().starts_with(word));
            if ours.contains(&true) && !entry.path().starts_with(home.as_std_path()) {
                self.files(&entry.path());
            }
        }
        let processes: Vec<u32> = processes_of(home).into_iter().chain(pid).collect();
        for pid in processes {
            let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            let name = exe
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if name == "vestibule" || name.starts_with("qemu") || name == "firecracker" {
                self.memory(pid)
                    .with_context(|| format!("read the memory of {name} ({pid})"))?;
            }
        }
        Ok(self.found())
    }

    /// Core dumps that were made since `home` was: where the kernel puts them, and where handlers do.
    fn dumps(&mut self, home: &Utf8Path, pid: Option<u32>) {
        let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
        let since = home.metadata().and_then(|home| home.created());
        let since = since.unwrap_or(SystemTime::UNIX_EPOCH);
        for dir in DUMPS {
            self.dumps_in(Path::new(dir), "", since);
        }
        let (dir, begins) = of_pattern(&pattern);
        // Where whoever died worked: the controller and its runners where this or that was started, VMMs in the home.
        let theirs = pid.map(|pid| PathBuf::from(format!("/proc/{pid}/cwd")));
        let directories = theirs.into_iter().chain([PathBuf::from(".")]);
        for worked in directories.filter_map(|dir| dir.canonicalize().ok()) {
            self.dumps_in(&worked.join(dir), begins, since);
        }
    }

    /// The files of `dir`, not of those below, whose name begins so.
    fn dumps_in(&mut self, dir: &Path, begins: &str, since: SystemTime) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let made = entry.metadata().and_then(|meta| meta.modified());
            if !entry.file_name().to_string_lossy().starts_with(begins)
                || !entry.file_type().is_ok_and(|kind| kind.is_file())
                || made.is_ok_and(|made| made < since)
            {
                continue;
            }
            match why_not(&entry.path()) {
                None => self.files(&entry.path()),
                Some(form) => self.hits.push(Hit {
                    canary: UNKNOWN.to_owned(),
                    form,
                    place: entry.path().display().to_string(),
                }),
            }
        }
    }

    /// The places, each named once.
    pub fn found(mut self) -> Vec<Hit> {
        self.hits.sort();
        self.hits.dedup();
        self.hits
    }

    /// Every regular file below `path`; links are not followed. What is gone meanwhile held nothing.
    pub fn files(&mut self, path: &Path) {
        let Ok(meta) = std::fs::symlink_metadata(path) else {
            return;
        };
        if meta.is_dir() {
            for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
                self.files(&entry.path());
            }
        } else if meta.is_file()
            && let Ok(file) = File::open(path)
        {
            let place = path.display().to_string();
            // A file that can't be read to its end was looked at as far as it can.
            drop(self.stream(file, &place));
        }
    }

    /// Every readable byte of a process's memory (proc_pid_mem(5)).
    ///
    /// # Errors
    /// When the process is gone or not ours to look into.
    pub fn memory(&mut self, pid: u32) -> io::Result<()> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let mem = File::open(format!("/proc/{pid}/mem"))?;
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let (Some(range), Some(rights)) = (words.next(), words.next()) else {
                continue;
            };
            let name = words.nth(3).unwrap_or("anonymous");
            let Some((from, to)) = range.split_once('-') else {
                continue;
            };
            let bounds = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16));
            let (Ok(from), Ok(to)) = bounds else { continue };
            if !rights.starts_with('r') || name.starts_with("[v") {
                continue;
            }
            let region = Region {
                mem: &mem,
                at: from,
                to,
            };
            // Pages that are not there (a file that was cut short) can't be read and hold nothing.
            drop(self.stream(region, &format!("memory of process {pid}, {name}")));
        }
        Ok(())
    }

    fn stream(&mut self, mut from: impl Read, place: &str) -> io::Result<()> {
        let keep = self.longest.saturating_sub(1);
        let mut buffer = Vec::with_capacity(BLOCK + keep);
        loop {
            let kept = buffer.len();
            let count = (&mut from).take(BLOCK as u64).read_to_end(&mut buffer);
            self.look(&buffer, place);
            if count? == 0 {
                return Ok(());
            }
            // A word may lie across two blocks.
            let end = buffer.len();
            debug_assert!(end >= kept, "it only grows");
            buffer.drain(..end.saturating_sub(keep));
        }
    }

    fn look(&mut self, bytes: &[u8], place: &str) {
        let found: BTreeSet<_> = self
            .automaton
            .find_overlapping_iter(bytes)
            .map(|found| found.pattern().as_usize())
            .collect();
        for (canary, form) in found.iter().filter_map(|at| self.needles.get(*at)) {
            self.hits.push(Hit {
                canary: canary.clone(),
                form,
                place: place.to_owned(),
            });
        }
    }
}

/// Of core(5)'s pattern, as far as it is always the same: the directory, from where a process works, and how the files' names
/// begin. What goes into a pipe or to a socket is in no directory that it names.
fn of_pattern(pattern: &str) -> (&str, &str) {
    let pattern = pattern.trim();
    if pattern.starts_with(['|', '@']) {
        return ("", "core");
    }
    let known = pattern.split('%').next().unwrap_or_default();
    known.split_at(known.rfind('/').map_or(0, |at| at + 1))
}

/// Why a file can't be looked into; none: it can.
fn why_not(path: &Path) -> Option<&'static str> {
    let Ok(file) = File::open(path) else {
        return Some("can't be read");
    };
    let mut head = Vec::new();
    if file.take(16).read_to_end(&mut head).is_err() {
        return Some("can't be read");
    }
    let is_compressed = COMPRESSED.iter().any(|magic| head.starts_with(magic));
    is_compressed.then_some("compressed")
}

struct Region<'a> {
    mem: &'a File,
    at: u64,
    to: u64,
}

impl Read for Region<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.to.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let want = left.min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        let count = self.mem.read_at(&mut buffer[..want], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

fn forms(word: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let hex: String = word.iter().map(|byte| format!("{byte:02x}")).collect();
    let percent: String = word
        .iter()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                char::from(*byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect();
    let utf16 = word.iter().flat_map(|byte| [*byte, 0]).collect();
    let mut forms = vec![
        ("as it is", word.to_vec()),
        ("hexadecimal", hex.into_bytes()),
        ("UTF-16", utf16),
    ];
    if percent.as_bytes() != word {
        forms.push(("percent-encoded", percent.into_bytes()));
    }
    for before in 0..3 {
        // Only what does not depend on the bytes beside it: whole groups in the word's middle.
        let skip = (3 - before) % 3;
        let whole = (word.len() - skip) / 3 * 3;
        let middle = &word[skip..skip + whole];
        if middle.len() >= 6 {
            forms.push(("base64", BASE64.encode(middle).into_bytes()));
        }
    }
    forms
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    const WORD: &str = "correct horse +/battery?";

    fn scan() -> Scan {
        Scan::new(&[("word".to_owned(), WORD.to_owned())].into()).unwrap()
    }

    #[test]
    fn a_word_that_would_not_be_looked_for_is_refused() {
        let refused = |word: &str| {
            let words = [
                ("long".to_owned(), WORD.to_owned()),
                ("short".to_owned(), word.to_owned()),
            ];
            Scan::new(&words.into()).err().map(|err| err.to_string())
        };
        for word in ["", "1234567"] {
            let said = refused(word).unwrap();
            assert!(said.contains("`short`"), "{said}");
            assert!(word.is_empty() || !said.contains(word), "{said}");
        }
        assert_eq!(refused("12345678"), None);
        assert!(Scan::new(&BTreeMap::new()).is_err());
    }

    #[test]
    fn every_form_is_found_wherever_it_lies_in_a_file() {
        let dir = camino_tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("below")).unwrap();
        let hex: String = WORD.bytes().map(|byte| format!("{byte:02x}")).collect();
        let utf16: Vec<u8> = WORD.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let mut texts = vec![
            WORD.as_bytes().to_vec(),
            hex.into_bytes(),
            utf16,
            b"correct%20horse%20%2B%2Fbattery%3F".to_vec(),
        ];
        texts.extend((0..3).map(|before| {
            let around = format!("{}{WORD} and more", &"xyz"[..before]);
            BASE64.encode(around).into_bytes()
        }));
        for (number, text) in texts.iter().enumerate() {
            // At the beginning, in the middle of a block, and across two.
            for at in [0, 5000, BLOCK - 7] {
                let path = dir.path().join("below/file");
                let mut bytes = vec![b'.'; at];
                bytes.extend_from_slice(text);
                bytes.extend(vec![b'.'; 3 * BLOCK / 2]);
                std::fs::write(&path, bytes).unwrap();
                let mut scan = scan();
                scan.files(dir.path().as_std_path());
                let hits = scan.found();
                assert!(!hits.is_empty(), "form {number} at {at}");
                assert_eq!(hits[0].place, path.as_str());
            }
        }
        std::fs::write(dir.path().join("below/file"), "correct horses, batteries").unwrap();
        let mut scan = scan();
        scan.files(dir.path().as_std_path());
        assert_eq!(scan.found(), []);
    }

    #[test]
    fn a_word_in_another_processs_memory_is_found() {
        let mut child = Command::new("cat")
            .env("SOMETHING", WORD)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut with = scan();
        // Its environment is there once it is the new program.
        let begun = std::time::Instant::now();
        while !std::fs::read_link(format!("/proc/{}/exe", child.id()))
            .is_ok_and(|exe| exe.ends_with("cat"))
        {
            assert!(begun.elapsed().as_secs() < 10);
            std::thread::yield_now();
        }
        with.memory(child.id()).unwrap();
        let found = with.found();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(
            found.iter().any(|hit| hit.place.contains("[stack]")),
            "{found:?}"
        );
    }

    #[test]
    fn a_core_dump_is_found_where_the_kernel_puts_it() {
        let home = camino_tempfile::tempdir().unwrap();
        let (dumps, words) = (camino_tempfile::tempdir().unwrap(), format!("x={WORD}"));
        // It works where it was started, as a controller does, and waits there for the one that dies.
        let script = "ulimit -c \"$(ulimit -H -c)\"; (kill -ABRT $BASHPID); echo; exec sleep 60";
        let mut child = Command::new("bash")
            .args(["-c", script, &words])
            .current_dir(dumps.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = [0];
        child.stdout.take().unwrap().read_exact(&mut line).unwrap();
        let hits = scan().everywhere(home.path(), Some(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        let here = dumps.path().canonicalize_utf8().unwrap();
        let hits = hits.unwrap();
        if dumps.path().read_dir_utf8().unwrap().count() == 0 {
            println!(
                "skipped: this host's core_pattern or limit keeps dumps from the directory: {hits:?}"
            );
            return;
        }
        let found = hits.iter().find(|hit| hit.place.starts_with(here.as_str()));
        assert_eq!(found.unwrap().canary, "word", "{hits:?}");
    }

    #[test]
    fn a_dump_that_is_compressed_or_old_is_told_from_one_that_is_clean() {
        let dir = camino_tempfile::tempdir().unwrap();
        let (then, path) = (SystemTime::now(), dir.path().as_std_path());
        for magic in COMPRESSED {
            std::fs::write(path.join("core.x.zst"), [magic, &[0; 100]].concat()).unwrap();
            let mut scan = scan();
            scan.dumps_in(path, "core", then - std::time::Duration::from_secs(60));
            let found = scan.found();
            assert_eq!(
                (found[0].canary.as_str(), found[0].form),
                (UNKNOWN, "compressed")
            );
        }
        for (begins, since) in [
            ("other", then - std::time::Duration::from_secs(60)),
            ("core", then + std::time::Duration::from_secs(60)),
        ] {
            let mut scan = scan();
            scan.dumps_in(path, begins, since);
            assert_eq!(scan.found(), []);
        }
        std::fs::write(path.join("core.x.zst"), "\x7fELF and nothing").unwrap();
        let mut scan = scan();
        scan.dumps_in(path, "core", then - std::time::Duration::from_secs(60));
        assert_eq!(scan.found(), []);
    }

    #[test]
    fn the_kernels_pattern_says_where() {
        for (pattern, dir, begins) in [
            ("core\n", "", "core"),
            ("core.%e.%p", "", "core."),
            ("/var/cores/%e.core", "/var/cores/", ""),
            ("/core-%p", "/", "core-"),
            ("cores/%p", "cores/", ""),
            ("|/usr/share/apport/apport %p", "", "core"),
        ] {
            assert_eq!(of_pattern(pattern), (dir, begins), "{pattern}");
        }
    }

    #[test]
    fn shared_memory_is_looked_at() {
        let home = camino_tempfile::tempdir().unwrap();
        let name = format!("/dev/shm/vestibule-scan-{}", std::process::id());
        std::fs::write(&name, WORD).unwrap();
        let hits = scan().everywhere(home.path(), None);
        std::fs::remove_file(&name).unwrap();
        assert!(hits.unwrap().iter().any(|hit| hit.place == name));
    }
}

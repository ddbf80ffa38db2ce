//! Journal files as systemd's own programs write them, in every form, read by us and by `journalctl`: entry by entry and
//! field by field the same. Files come from `systemd-journal-remote`, and, where the test may have a mount namespace of its
//! own (root), from a `systemd-journald` that is killed. Without those programs (Debian: systemd, systemd-journal-remote) a
//! test says so and passes; `script/test` installs them.
#![expect(
    clippy::print_stdout,
    reason = "why a test was skipped, and what it compared"
)]

mod program;

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8Path;
use flate2::read::GzDecoder;
use program::output;
use serde_json::Value;
use std::{fs, io::Read as _, path::Path, process::Command};
use vestibule_diagnose::journal::{Entry, FileState, Journal};

const REMOTE: &str = "/lib/systemd/systemd-journal-remote";
const JOURNALD: &str = "/lib/systemd/systemd-journald";
/// Bytes of a field that are kept.
const FIELD: usize = 4_096;

/// Compression, whether the file is compact, whether its hashes have a key.
const FORMS: [(&str, bool, bool); 9] = [
    ("ZSTD", true, true),
    ("ZSTD", false, true),
    ("ZSTD", false, false),
    ("LZ4", true, true),
    ("LZ4", false, true),
    ("LZ4", false, false),
    ("NONE", true, true),
    ("NONE", false, true),
    ("NONE", false, false),
];

/// Whether the programs are there; else why this test does nothing.
fn programs(needed: &[&str]) -> bool {
    let missing = needed.iter().find(|p| !Path::new(p).exists());
    if let Some(missing) = missing {
        println!("skipped: {missing} is not installed (Debian: systemd, systemd-journal-remote)");
    }
    missing.is_none()
}

fn flag(on: bool) -> &'static str {
    if on { "1" } else { "0" }
}

/// A field as `journalctl` shows it: text, the bytes of what is no text, or the first of several.
fn text(value: &Value) -> Result<String> {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "journalctl writes no other kind of value"
    )]
    Ok(match value {
        Value::String(text) => text.clone(),
        Value::Array(items) if items.iter().all(Value::is_u64) => {
            let bytes: Vec<u8> = items
                .iter()
                .filter_map(|b| u8::try_from(b.as_u64()?).ok())
                .collect();
            String::from_utf8_lossy(&bytes).into_owned()
        }
        _ => bail!("a field is {value}"),
    })
}

/// What is kept of a field.
fn cut(text: &str) -> String {
    String::from_utf8_lossy(&text.as_bytes()[..text.len().min(FIELD)]).into_owned()
}

/// Compares every entry and field that is kept; how many entries there were.
fn agree(file: &Utf8Path, about: &str) -> Result<usize> {
    let shown = output(Command::new("journalctl").args([
        "--no-pager",
        "--all",
        "-o",
        "json",
        "--file",
        file.as_str(),
    ]))?;
    let shown: Vec<Value> = serde_json::Deserializer::from_slice(&shown)
        .into_iter()
        .collect::<Result<_, _>>()?;
    let ours = Journal::parse(&fs::read(file)?, "journal");
    assert_eq!(
        ours.entries.len(),
        shown.len(),
        "{about}: {:?}",
        ours.damage
    );
    for (number, (entry, shown)) in ours.entries.iter().zip(&shown).enumerate() {
        same(entry, shown)
            .with_context(|| format!("{about}: entry {number}: {entry:?} and {shown}"))?;
    }
    Ok(shown.len())
}

fn same(entry: &Entry, shown: &Value) -> Result<()> {
    let field = |name: &str| shown.get(name).map(text).transpose();
    let numbers = [
        ("__REALTIME_TIMESTAMP", entry.realtime_us),
        ("__MONOTONIC_TIMESTAMP", entry.monotonic_us),
    ];
    for (name, ours) in numbers {
        ensure!(
            field(name)?.as_deref() == Some(&ours.to_string()),
            "{name}: {ours}"
        );
    }
    ensure!(
        field("_BOOT_ID")?.as_deref() == Some(&*entry.boot_id),
        "_BOOT_ID"
    );
    let texts = [
        ("MESSAGE", Some(&entry.message)),
        ("UNIT", entry.subject.as_ref()),
        ("_SYSTEMD_UNIT", entry.speaker.as_ref()),
        ("SYSLOG_IDENTIFIER", entry.identifier.as_ref()),
        ("_TRANSPORT", entry.transport.as_ref()),
    ];
    for (name, ours) in texts {
        let theirs = field(name)?.map(|t| cut(&t)).unwrap_or_default();
        ensure!(theirs == ours.map_or("", |t| &**t), "{name}: {ours:?}");
    }
    let pid = field("_PID")?.and_then(|p| p.parse().ok());
    ensure!(pid == entry.pid, "_PID: {:?}", entry.pid);
    Ok(())
}

/// Writes a field in the export format (<https://systemd.io/JOURNAL_EXPORT_FORMATS/>).
fn field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    if value.contains(&b'\n') || std::str::from_utf8(value).is_err() {
        out.push(b'\n');
        out.extend((value.len() as u64).to_le_bytes());
    } else {
        out.push(b'=');
    }
    out.extend_from_slice(value);
    out.push(b'\n');
}

/// Entries that try a reader: long enough to be compressed, longer than is kept, several lines, no text, two boots, units.
fn export() -> Vec<u8> {
    let mut out = Vec::new();
    for number in 0_u64..400 {
        let boot = if number < 150 { "11" } else { "22" }.repeat(16);
        let message = match number % 8 {
            0 => format!("line {number} ").repeat(80).into_bytes(),
            1 => format!("{number}: ")
                .into_bytes()
                .into_iter()
                .chain((0..6_000).map(|n| b'a' + u8::try_from(n * n % 23).unwrap_or(0)))
                .collect(),
            2 => format!("first\nsecond of {number}\n\nlast").into_bytes(),
            3 => [format!("no text {number} ").as_bytes(), &[0xff, 0xfe, 0, 1]].concat(),
            4 => format!("Zürich — {number} ✓").repeat(200).into_bytes(),
            _ => format!("Started unit {number}.").into_bytes(),
        };
        field(
            &mut out,
            "__REALTIME_TIMESTAMP",
            (1_700_000_000_000_000 + number * 1_000_003)
                .to_string()
                .as_bytes(),
        );
        field(
            &mut out,
            "__MONOTONIC_TIMESTAMP",
            (1_000 + number * 1_000_003).to_string().as_bytes(),
        );
        field(&mut out, "_BOOT_ID", boot.as_bytes());
        field(
            &mut out,
            "_MACHINE_ID",
            "0123456789abcdef".repeat(2).as_bytes(),
        );
        field(&mut out, "MESSAGE", &message);
        field(&mut out, "PRIORITY", b"6");
        if number % 3 == 0 {
            field(
                &mut out,
                "UNIT",
                format!("unit-{}.service", number % 7).as_bytes(),
            );
            field(&mut out, "_PID", b"1");
        } else {
            field(&mut out, "_SYSTEMD_UNIT", b"vm-browser-agent.service");
            field(&mut out, "_PID", (300 + number).to_string().as_bytes());
        }
        field(
            &mut out,
            "SYSLOG_IDENTIFIER",
            if number % 2 == 0 {
                b"systemd"
            } else {
                b"agent"
            },
        );
        field(
            &mut out,
            "_TRANSPORT",
            if number % 5 == 0 {
                b"kernel"
            } else {
                b"journal"
            },
        );
        field(&mut out, "CODE_FILE", "a/long/path/".repeat(60).as_bytes());
        out.push(b'\n');
    }
    out
}

/// Makes a journal file of an export; none, with a reason, where this version of systemd does not write that form.
fn native(
    export: &Utf8Path,
    to: &Utf8Path,
    (compression, compact, keyed): (&str, bool, bool),
) -> Result<()> {
    let mut command = Command::new(REMOTE);
    command
        .env(
            "SYSTEMD_JOURNAL_COMPRESS",
            if compression == "NONE" {
                "0"
            } else {
                compression
            },
        )
        .env("SYSTEMD_JOURNAL_COMPACT", flag(compact))
        .env("SYSTEMD_JOURNAL_KEYED_HASH", flag(keyed))
        .arg(format!("--output={to}"))
        .arg(format!(
            "--compress={}",
            if compression == "NONE" { "no" } else { "yes" }
        ))
        .arg(export);
    output(&mut command).map(drop)
}

/// Whether the file has the form that was asked for (its header's incompatible flags) and something compressed.
fn has_form(bytes: &[u8], (compression, compact, keyed): (&str, bool, bool)) -> bool {
    let flags = bytes.get(12).copied().unwrap_or(0);
    let compressed = match compression {
        "ZSTD" => 8,
        "LZ4" => 2,
        _ => 0,
    };
    let wanted = compressed | if keyed { 4 } else { 0 } | if compact { 16 } else { 0 };
    flags == wanted
}

#[test]
fn every_form_of_a_journal_file_is_read_as_journalctl_reads_it() -> Result<()> {
    if !programs(&[REMOTE, "/usr/bin/journalctl"]) {
        return Ok(());
    }
    let dir = camino_tempfile::tempdir()?;
    let mut exports = vec![("made here".to_owned(), export())];
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/small.export.gz");
    let mut small = Vec::new();
    GzDecoder::new(fs::File::open(fixture)?).read_to_end(&mut small)?;
    exports.push(("small.export".to_owned(), small));
    for (name, bytes) in exports {
        let export = dir.path().join("x.export");
        fs::write(&export, &bytes)?;
        for form in FORMS {
            let about = format!("{name} {form:?}");
            let file = dir.path().join("x.journal");
            let _ = fs::remove_file(&file);
            native(&export, &file, form).with_context(|| about.clone())?;
            let written = fs::read(&file)?;
            if form.0 == "LZ4" && has_form(&written, ("ZSTD", form.1, form.2)) {
                println!(
                    "skipped: {about}: this systemd compresses as it was built to (before 253)"
                );
                continue;
            }
            ensure!(
                has_form(&written, form),
                "{about}: flags {:#x}",
                written[12]
            );
            let entries = agree(&file, &about)?;
            let expected = Journal::parse(&bytes, "journal").entries.len();
            assert_eq!(entries, expected, "{about}");
            println!("{about}: {entries} entries agree");
        }
    }
    Ok(())
}

/// LZ4, which no systemd of Debian 12 writes and every one reads: `small.export` as `systemd-journal-remote` 257 (Debian 13)
/// wrote it with `SYSTEMD_JOURNAL_COMPRESS=LZ4`.
#[test]
fn lz4_is_read_as_journalctl_reads_it() -> Result<()> {
    let here = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data");
    let gunzip = |name: &str| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        GzDecoder::new(fs::File::open(format!("{here}/{name}.gz"))?).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let export = Journal::parse(&gunzip("small.export")?, "journal");
    let dir = camino_tempfile::tempdir()?;
    for (name, form) in [
        ("lz4-compact", ("LZ4", true, true)),
        ("lz4-regular", ("LZ4", false, true)),
        ("lz4-jenkins", ("LZ4", false, false)),
    ] {
        let bytes = gunzip(&format!("{name}.journal"))?;
        ensure!(has_form(&bytes, form), "{name}: flags {:#x}", bytes[12]);
        let native = Journal::parse(&bytes, "journal");
        assert_eq!(
            native.entries.len(),
            export.entries.len(),
            "{name}: {:?}",
            native.damage
        );
        for (ours, expected) in native.entries.iter().zip(&export.entries) {
            assert_eq!(
                (&ours.message, &ours.subject, ours.pid),
                (&expected.message, &expected.subject, expected.pid),
                "{name}"
            );
        }
        if programs(&["/usr/bin/journalctl"]) {
            let file = dir.path().join("x.journal");
            fs::write(&file, &bytes)?;
            println!("{name}: {} entries agree", agree(&file, name)?);
        }
    }
    Ok(())
}

/// systemd's own journald, in a mount namespace of its own with an empty `/run`, gets lines as programs send them, and is
/// killed: the file is left online, as a killed VM leaves it.
const KILLED: &str = r#"set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal /run/log/journal
"$1" >/dev/null 2>&1 &
for _ in $(seq 100); do [ -S /run/systemd/journal/socket ] && break; sleep 0.1; done
for i in 1 2 3; do echo "a line of a program $i" | systemd-cat -t teller; done
for i in $(seq 40); do
  { printf 'MESSAGE=%s\nUNIT=sent-%s.service\n' "$(head -c 3000 /dev/zero | tr '\0' "$((i % 10))")" "$i"; } | logger --journald
done
for _ in $(seq 50); do journalctl -q --no-pager -D /run/log/journal UNIT=sent-40.service | grep -q . && break; sleep 0.1; done
kill -9 $!
cat /run/log/journal/*/system.journal > "$2"
"#;

#[test]
fn what_a_killed_journald_left_is_read_as_journalctl_reads_it() -> Result<()> {
    let uid = fs::read_to_string("/proc/self/status")?;
    if !uid.lines().any(|l| l.starts_with("Uid:\t0\t")) {
        println!("skipped: a mount namespace for journald needs root");
        return Ok(());
    }
    if !programs(&[JOURNALD, "/usr/bin/journalctl", "/etc/machine-id"]) {
        return Ok(());
    }
    let dir = camino_tempfile::tempdir()?;
    for form @ (compression, compact, keyed) in [
        ("LZ4", false, true),
        ("LZ4", true, true),
        ("ZSTD", true, true),
        ("ZSTD", false, false),
    ] {
        let file = dir.path().join("killed.journal");
        output(
            Command::new("unshare")
                .args([
                    "--mount",
                    "bash",
                    "-c",
                    KILLED,
                    "killed",
                    JOURNALD,
                    file.as_str(),
                ])
                .env("SYSTEMD_JOURNAL_COMPRESS", compression)
                .env("SYSTEMD_JOURNAL_COMPACT", flag(compact))
                .env("SYSTEMD_JOURNAL_KEYED_HASH", flag(keyed)),
        )?;
        let bytes = fs::read(&file)?;
        if compression == "LZ4" && has_form(&bytes, ("ZSTD", compact, keyed)) {
            println!("skipped: {form:?}: this systemd compresses as it was built to (before 253)");
            continue;
        }
        ensure!(has_form(&bytes, form), "{form:?}: flags {:#x}", bytes[12]);
        let journal = Journal::parse(&bytes, "journal");
        assert_eq!(journal.state, FileState::Online, "{form:?}");
        let entries = agree(&file, &format!("{form:?}"))?;
        let sent = journal
            .entries
            .iter()
            .filter(|e| e.subject.as_deref().is_some_and(|s| s.starts_with("sent-")))
            .count();
        assert_eq!(sent, 40, "{form:?}");
        println!("{form:?}: {entries} entries of a killed journald agree");
    }
    Ok(())
}

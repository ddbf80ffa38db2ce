//! When evidence is weak: why a missing line proves nothing here. Notes are never the verdict.
use crate::{
    case::Case,
    log::{Line, Speaker},
    units::{
        Load,
        install::{MachineId, daemon_setting},
        quote_disk,
    },
};
use vestibule_api::{
    cause::Note,
    finding::{Quote, Weakness},
};

fn note(note: Note, quote: Quote, why: &str) -> Weakness {
    Weakness {
        note,
        evidence: vec![quote],
        why: why.to_owned(),
    }
}

/// Every weakness of the evidence.
pub fn all(case: &Case<'_>) -> Vec<Weakness> {
    let mut notes = Vec::new();
    notes.extend(console(case));
    notes.extend(journal_storage(case));
    notes.extend(other_machine(case));
    notes.extend(journald_masked(case));
    notes.extend(overlay(case));
    notes.extend(clock(case));
    notes.extend(not_flushed(case));
    notes.extend(file_system_errors(case));
    for name in &case.units {
        notes.extend(unit_output(case, name));
    }
    notes
}

fn console(case: &Case<'_>) -> Option<Weakness> {
    let why = "nothing asks the kernel to print to the serial port, so an empty serial log proves nothing";
    // A VM has one serial port, the first; what is printed to another one is read by nobody.
    let elsewhere = case.log.first(Line::is_console).is_none();
    if let Some(cmdline) = &case.cmdline
        && cmdline.contains("console=")
        && !cmdline.split_whitespace().any(|w| {
            let port = w.strip_prefix("console=").unwrap_or_default();
            ["hvc", "ttyAMA", "ttyS0"]
                .iter()
                .any(|p| port.starts_with(p))
                || port.starts_with("ttyS") && !elsewhere
        })
    {
        return Some(note(
            Note::EvidenceConsoleDisabled,
            Quote {
                source: "cmdline".into(),
                line: None,
                text: cmdline.clone(),
            },
            why,
        ));
    }
    let booted = case.log.has_journal;
    (case.serial_given && case.serial_len == 0 && booted).then(|| {
        note(
            Note::EvidenceConsoleDisabled,
            Quote {
                source: "serial".into(),
                line: None,
                text: "[empty, while the journal has a boot]".into(),
            },
            why,
        )
    })
}

fn journal_storage(case: &Case<'_>) -> Option<Weakness> {
    let root = case.disk.as_ref()?.base.root;
    let why = "the journal is kept in memory only, so a disk without entries proves nothing";
    let setting = daemon_setting(root, "journald.conf", "Journal", "Storage");
    if let Some((value, quote)) = &setting
        && matches!(value.as_str(), "volatile" | "none")
    {
        return Some(note(Note::EvidenceJournalVolatile, quote.clone(), why));
    }
    let persistent = setting.is_some_and(|(v, _)| v == "persistent");
    if !persistent && !root.is_dir("/var/log/journal") {
        return Some(note(
            Note::EvidenceJournalVolatile,
            quote_disk(
                "/var/log/journal",
                None,
                "[does not exist, and Storage= is auto]",
            ),
            why,
        ));
    }
    let mounts = &case.disk.as_ref()?.base.fstab;
    let tmpfs = mounts.entries.iter().find(|m| {
        matches!(m.kind.as_str(), "tmpfs" | "ramfs")
            && "/var/log/journal".starts_with(m.target.as_str())
            && m.target != "/"
    });
    tmpfs.map(|m| note(Note::EvidenceJournalVolatile, m.quote.clone(), why))
}

fn other_machine(case: &Case<'_>) -> Option<Weakness> {
    let disk = case.disk.as_ref()?;
    let MachineId::Set(own) = &disk.base.machine_id else {
        return None;
    };
    let others = &case.journal_machines;
    let foreign = !others.is_empty() && !others.iter().any(|m| m.split('.').next() == Some(own));
    foreign.then(|| {
        let at = others.first().map_or("", String::as_str);
        note(
            Note::EvidenceJournalOtherMachine,
            quote_disk(
                &format!("/var/log/journal/{at}"),
                None,
                "[the only journals]",
            ),
            "the journals on the disk are of another machine-id than the one that the disk has now",
        )
    })
}

fn journald_masked(case: &Case<'_>) -> Option<Weakness> {
    let disk = case.disk.as_ref()?;
    match &disk.units.load("systemd-journald.service").load {
        Load::Masked(by) => Some(note(
            Note::EvidenceJournaldMasked,
            by.clone(),
            "journald does not run, so there is no journal at all",
        )),
        Load::Loaded | Load::Missing | Load::Refused(_) => None,
    }
}

fn overlay(case: &Case<'_>) -> Option<Weakness> {
    let why =
        "what the guest writes goes to an overlay, so the disk looks as it did before the boot";
    let word = case.cmdline.as_deref().and_then(|c| {
        c.split_whitespace().find(|w| {
            w.starts_with("vestibule.overlay")
                || w.starts_with("overlayroot=")
                || w.starts_with("systemd.volatile=") && !w.ends_with("=no")
                || *w == "rd.live.overlay"
        })
    });
    if let Some(word) = word {
        return Some(note(
            Note::EvidenceOverlayRoot,
            Quote {
                source: "cmdline".into(),
                line: None,
                text: word.to_owned(),
            },
            why,
        ));
    }
    let disk = case.disk.as_ref()?;
    let path = "/etc/overlayroot.conf";
    let text = disk.base.root.read_text(path).unwrap_or_default();
    let hit = (1_u64..).zip(text.lines()).find(|(_, l)| {
        l.trim()
            .strip_prefix("overlayroot=")
            .is_some_and(|v| !v.trim_matches('"').is_empty() && v.trim_matches('"') != "disabled")
    });
    if let Some((line, content)) = hit {
        return Some(note(
            Note::EvidenceOverlayRoot,
            quote_disk(path, Some(line), content),
            why,
        ));
    }
    let over =
        disk.base.fstab.entries.iter().find(|m| {
            m.kind == "overlay" && ["/", "/var", "/var/log"].contains(&m.target.as_str())
        });
    over.map(|m| note(Note::EvidenceOverlayRoot, m.quote.clone(), why))
}

fn clock(case: &Case<'_>) -> Option<Weakness> {
    let line = case.log.any_of(&[
        "System time before build time, advancing clock",
        "System clock time unset or jumped backwards",
        "Time has been changed",
        "RTC configured in local time",
    ]);
    let line =
        line.filter(|l| l.speaker != Speaker::Program && !l.text.contains("RTC configured"))?;
    Some(note(
        Note::EvidenceClock,
        line.quote(),
        "the guest's clock was wrong, so its time stamps lie; order lines by boot and monotonic time",
    ))
}

/// The kernel met errors on the root file system, or it cannot be read in part. A counter stays until somebody checks the
/// file system, however well it has done since, so that it is no cause by itself.
fn file_system_errors(case: &Case<'_>) -> Option<Weakness> {
    let root = case.disk.as_ref()?.base.root;
    let recorded = superblock_errors(case);
    let damage = root.damage();
    let unread = damage
        .iter()
        .map(|text| quote_disk("", None, &format!("[{text}]")));
    let evidence: Vec<Quote> = recorded.into_iter().chain(unread).collect();
    (!evidence.is_empty()).then(|| Weakness {
        note: Note::EvidenceFileSystemErrors,
        evidence,
        why: "the file system had errors, so that what is read from the disk may not be what the guest wrote or read; \
              `e2fsck -fn` on a copy says what is wrong now"
            .to_owned(),
    })
}

/// What the superblock says of errors.
pub(super) fn superblock_errors(case: &Case<'_>) -> Option<Quote> {
    let superblock = case.disk.as_ref()?.base.root.superblock()?;
    Some(quote_disk("superblock", None, &superblock.errors()?))
}

/// The console shows more of the boot than the journal has.
fn not_flushed(case: &Case<'_>) -> Option<Weakness> {
    if !(case.log.has_console && case.log.has_journal) {
        return None;
    }
    let milestones = [
        "Reached target multi-user.target",
        "Reached target sysinit.target",
        "Reached target graphical.target",
    ];
    let missing = milestones.iter().find_map(|m| {
        let shown = case
            .log
            .first(|l| l.is_console() && l.text.starts_with(m))?;
        case.log
            .first(|l| !l.is_console() && l.text.starts_with(m))
            .is_none()
            .then_some(shown)
    })?;
    Some(note(
        Note::EvidenceJournalNotFlushed,
        missing.quote(),
        "the console shows this and the journal does not have it: the VM ended before the journal was written, so a missing entry proves nothing",
    ))
}

/// Settings of a unit that keep its lines out of the journal.
fn unit_output(case: &Case<'_>, name: &str) -> Vec<Weakness> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    let unit = disk.units.load(name);
    let mut notes = Vec::new();
    if let Some(a) = unit.last("Service", "LogNamespace") {
        notes.push(note(
            Note::EvidenceJournalNamespace,
            crate::units::quote_assignment(a),
            "the unit writes to a journal namespace of its own, not to the system's journal",
        ));
    }
    let elsewhere = ["StandardOutput", "StandardError"].iter().find_map(|k| {
        let a = unit.last("Service", k)?;
        let v = a.value.as_str();
        (["file:", "append:", "truncate:"]
            .iter()
            .any(|p| v.starts_with(p))
            || matches!(v, "null" | "socket" | "tty")
            || v.starts_with("fd:"))
        .then_some(a)
    });
    if let Some(a) = elsewhere {
        notes.push(note(
            Note::EvidenceOutputElsewhere,
            crate::units::quote_assignment(a),
            "the program's output does not go to the journal; look where this line sends it",
        ));
    }
    let quiet = |value: &str| {
        matches!(
            value,
            "emerg"
                | "alert"
                | "crit"
                | "err"
                | "warning"
                | "notice"
                | "0"
                | "1"
                | "2"
                | "3"
                | "4"
                | "5"
        )
    };
    if let Some(a) = unit
        .last("Service", "LogLevelMax")
        .filter(|a| quiet(&a.value))
    {
        notes.push(note(
            Note::EvidenceLogLevel,
            crate::units::quote_assignment(a),
            "the unit's ordinary lines are dropped, also PID 1's about it",
        ));
    } else if let Some((_, quote)) =
        daemon_setting(disk.base.root, "journald.conf", "Journal", "MaxLevelStore")
            .filter(|(v, _)| quiet(v))
    {
        notes.push(note(
            Note::EvidenceLogLevel,
            quote,
            "the journal keeps only lines of this priority and above",
        ));
    }
    notes
}

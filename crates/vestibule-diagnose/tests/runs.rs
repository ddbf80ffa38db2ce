//! What a run said, and the cause that it means: consoles and journals in the words of the kernel and of systemd 252, most
//! with nothing else, some with a few unit files. Beside each failure stands what looks like it and is none.
use anyhow::{Context, Result};
use camino_tempfile::tempdir;
use std::{fmt::Write as _, fs, os::unix::fs::PermissionsExt as _};
use vestibule_api::finding::VerdictKind;
use vestibule_diagnose::{Evidence, diagnose, disk::dir::DirTree};

/// A journal's entry: seconds since boot, `systemd` about the unit or the unit that speaks, and what.
type Said = (u32, &'static str, &'static str);

/// What is known of a run of `a.service`, and the cause that must be named.
#[derive(Default)]
struct Run {
    expected: &'static str,
    console: &'static str,
    journal: Vec<Said>,
    /// Unit files below `/etc/systemd/system`, beside the targets of a boot.
    units: &'static [(&'static str, &'static str)],
}

const UNIT: &str = "a.service";
const PID_1: &str = "systemd";

/// Entries that end one run of the unit, and what starts the next.
const CRASH: [Said; 3] = [
    (
        20,
        PID_1,
        "a.service: Main process exited, code=dumped, status=11/SEGV",
    ),
    (20, PID_1, "a.service: Failed with result 'core-dump'."),
    (
        21,
        PID_1,
        "a.service: Scheduled restart job, restart counter is at 1.",
    ),
];
const UP: [Said; 2] = [
    (10, PID_1, "Started a.service - A."),
    (11, UNIT, "A listening on port 8080"),
];
const AGAIN: [Said; 2] = [
    (30, PID_1, "Started a.service - A."),
    (31, UNIT, "A listening on port 8080"),
];
const DOWN: [Said; 4] = [
    (
        90,
        PID_1,
        "Stopped target multi-user.target - Multi-User System.",
    ),
    (91, PID_1, "Stopping a.service - A..."),
    (92, PID_1, "a.service: Deactivated successfully."),
    (93, PID_1, "Stopped a.service - A."),
];

/// A program that starts and says nothing, and ends with `lines`.
fn ends(lines: &[Said]) -> Vec<Said> {
    [&[(10, PID_1, "Started a.service - A.")], lines].concat()
}

fn says(line: &'static str) -> Vec<Said> {
    let exit = "a.service: Main process exited, code=exited, status=1/FAILURE";
    ends(&[(12, UNIT, line), (13, PID_1, exit)])
}

/// `a.service` after a oneshot that runs a program of which nothing is known.
const BEHIND: &[(&str, &str)] = &[
    (
        "a.service",
        "[Unit]\nAfter=setup.service\n[Service]\nExecStart=/usr/bin/a\n",
    ),
    (
        "setup.service",
        "[Unit]\nDescription=Setup\n[Service]\nType=oneshot\nExecStart=/usr/bin/setup\n",
    ),
    ("multi-user.target.wants/a.service", ""),
    ("multi-user.target.wants/setup.service", ""),
];
const OWN_NETWORK: &[(&str, &str)] = &[
    (
        "a.service",
        "[Service]\nExecStart=/usr/bin/a\nNetworkNamespacePath=/run/netns/a\n",
    ),
    ("multi-user.target.wants/a.service", ""),
];

const MADE_NETWORK: &[(&str, &str)] = &[
    (
        "a.service",
        "[Service]\nExecStart=/usr/bin/a\nNetworkNamespacePath=/run/netns/a\n",
    ),
    (
        "netns.service",
        "[Service]\nType=oneshot\nExecStart=/usr/bin/setup netns add a\n",
    ),
    ("multi-user.target.wants/a.service", ""),
    ("multi-user.target.wants/netns.service", ""),
];

const FIRST_BOOT: &str = "[    0.000000] Linux version 6.1\n[    1.0] virtio_blk virtio0: [vda] 1310720 512-byte logical blocks\n";

#[rustfmt::skip]
fn runs() -> Vec<Run> {
    let run = |expected, journal: &[Said]| Run { expected, journal: journal.to_vec(), ..Run::default() };
    let boot = |expected, console| Run { expected, console, ..Run::default() };
    vec![
        // What ended because the guest went down.
        run("healthy", &[&UP[..], &DOWN].concat()),
        run("healthy", &[&UP[..], &[(90, "systemd-logind.service", "System is powering down.")], &DOWN[1..]].concat()),
        run("unknown", &[&UP[..], &DOWN[1..]].concat()),
        run("crashed", &[&UP[..], &CRASH[..2], &DOWN].concat()),
        // Runs before the one that listens.
        run("healthy", &[&UP[..1], &CRASH, &AGAIN].concat()),
        run("crashed", &[&UP[..], &CRASH, &AGAIN].concat()),
        run("crashed", &[&UP[..1], &CRASH, &AGAIN[..1]].concat()),
        boot("init-crashed", "[    0.000000] Linux version 6.1\n[    3.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x7f00\n"),
        Run {
            console: "[    0.000000] Linux version 6.1\n[    3.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x7f00\n[    0.000000] Linux version 6.1\n[    4.0] systemd[1]: Started a.service - A.\n",
            ..run("healthy", &UP)
        },
        // Ends with success.
        run("exited-cleanly", &ends(&[(12, PID_1, "a.service: Deactivated successfully.")])),
        run("exited-cleanly", &ends(&[(12, PID_1, "a.service: Deactivated successfully."), (15, PID_1, "a.service: Scheduled restart job, restart counter is at 1."), (15, PID_1, "Stopped a.service - A.")])),
        run("unknown", &ends(&[(12, PID_1, "a.service: Deactivated successfully."), (15, PID_1, "a.service: Scheduled restart job, restart counter is at 1."), (15, PID_1, "Stopped a.service - A."), (16, PID_1, "Started a.service - A.")])),
        run("never-notified-ready", &[(10, PID_1, "Starting a.service - A..."), (12, PID_1, "a.service: Failed with result 'protocol'."), (12, PID_1, "Failed to start a.service - A.")]),
        // The network namespace.
        run("namespace-path-missing", &ends(&[(12, PID_1, "a.service: Failed to open network namespace path /run/netns/a: No such file or directory"), (12, PID_1, "a.service: Main process exited, code=exited, status=225/NETWORK")])),
        Run { expected: "namespace-path-missing", units: OWN_NETWORK, ..Run::default() },
        Run { expected: "private-network", units: MADE_NETWORK, ..Run::default() },
        // Programs' own lines.
        run("shared-library-missing", &says("/usr/bin/a: /lib/libc.so.6: version `GLIBC_2.38' not found (required by /usr/bin/a)")),
        run("shared-library-missing", &says("/usr/bin/a: symbol lookup error: /usr/bin/a: undefined symbol: b")),
        run("disk-full", &says("Error: ENOSPC: no space left on device, write")),
        run("unknown", &says("Error: ENOSPC: System limit for number of file watchers reached, watch '/opt'")),
        run("unknown", &says("inotify_add_watch: No space left on device")),
        run("localhost-unresolvable", &says("Error: getaddrinfo ENOTFOUND localhost")),
        run("name-not-found", &says("Error: getaddrinfo ENOTFOUND console.example.com")),
        run("healthy", &[&UP[..], &[(12, UNIT, "warn: getaddrinfo EAI_AGAIN telemetry.example.com")]].concat()),
        run("port-in-use", &says("Error: listen EADDRINUSE: address already in use 0.0.0.0:8080")),
        run("healthy", &[&UP[..], &[(12, UNIT, "EADDRINUSE fallback not needed")]].concat()),
        run("environment-ignored", &[(9, PID_1, "a.service: Ignoring invalid environment assignment 'export PORT=8080': /etc/a.env"), UP[0], (11, UNIT, "A listening on port 9090")]),
        run("listens-on-wrong-port", &[(9, PID_1, "a.service: Ignoring invalid environment assignment 'export COLOR=1': /etc/a.env"), UP[0], (11, UNIT, "A listening on port 9090")]),
        // Waits.
        Run { units: BEHIND, ..run("waits-for-unit", &[(10, "setup", "Starting setup.service - Setup..."), (60, "cron.service", "tick")]) },
        Run { units: BEHIND, ..run("unknown", &[(10, "setup", "Starting setup.service - Setup..."), (20, "cron.service", "tick")]) },
        Run { units: BEHIND, ..run("unknown", &[(10, "setup", "Starting setup.service - Setup..."), (14, "setup", "Finished setup.service - Setup."), (60, "cron.service", "tick")]) },
        Run { units: BEHIND, ..boot("unknown", "[    9.0] systemd[1]: Hostname set\n         Starting setup.service - Setup...\n[   60.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:\n") },
        boot("waits-for-unit", "[  *** ] (1 of 2) Job systemd-logind.service/start running (39s / 2min 1s)\n"),
        boot("unknown", "[  *** ] (1 of 2) Job systemd-logind.service/start running (39s / 2min 1s)\n[  OK  ] Started systemd-logind.se…ice - User Login Management.\n"),
        Run {
            console: "[  *** ] (1 of 2) Job systemd-logind.service/start running (39s / 2min 1s)\n",
            ..run("unknown", &[(40, "logind", "Started systemd-logind.service - User Login Management."), (1, "cron.service", "tick")])
        },
        boot("default-target-wrong", "[    7.8] systemd[1]: Unit default.target not found.\n[    7.8] systemd[1]: Falling back to rescue.target.\n"),
        boot("default-target-wrong", "[    7.8] systemd[1]: Queued start job for default target rescue.target.\n"),
        boot("unknown", "[    7.8] systemd[1]: Queued start job for default target graphical.target.\n"),
        // Before the units.
        boot("init-missing", "Target filesystem doesn't have requested /sbin/init.\nNo init found. Try passing init= bootarg.\n(initramfs) \n"),
        boot("unknown", "Target filesystem doesn't have requested /sbin/init.\n[    5.0] systemd[1]: Hostname set\n"),
        boot("init-crashed", "[   10.3] systemd[1]: Caught <SEGV>, dumped core as pid 130.\n[   10.3] systemd[1]: Freezing execution.\n"),
        boot("init-crashed", "[!!!!!!] Failed to mount API filesystems.\n[    4.3] systemd[1]: Freezing execution.\n"),
        boot("filesystem-check-failed", "[FAILED] Failed to start systemd-fsck@dev-vdb…File System Check on /dev/vdb.\n[DEPEND] Dependency failed for local-fs.target - Local File Systems.\nYou are in emergency mode.\n"),
        boot("unknown", "[FAILED] Failed to start systemd-fsck@dev-vdb…File System Check on /dev/vdb.\n[  OK  ] Reached target local-fs.target - Local File Systems.\n"),
    ]
}

/// The kernel's last lines where the root file system cannot be mounted, with the disk there.
#[test]
fn a_root_that_the_kernel_cannot_read() -> Result<()> {
    let panic = "[    1.5] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(254,0)\n";
    for (lines, expected) in [
        (
            "[    1.5] No filesystem could mount root, tried: \n[    1.5]  squashfs\n",
            "root-driver-missing",
        ),
        (
            "[    1.5] VFS: Cannot open root device \"vda\" or unknown-block(254,0): error -19\n",
            "root-driver-missing",
        ),
        (
            "[    1.5] No filesystem could mount root, tried: \n[    1.5]  ext3\n[    1.5]  ext4\n",
            "kernel-panic",
        ),
    ] {
        let console = format!("{FIRST_BOOT}{lines}{panic}");
        assert_eq!(
            verdict(Evidence::new().serial(console)),
            expected,
            "{lines}"
        );
    }
    let other = "[    1.5] VFS: Cannot open root device \"vdb\" or unknown-block(0,0): error -6\n";
    let console = format!("{FIRST_BOOT}{other}");
    assert_eq!(
        verdict(Evidence::new().serial(console)),
        "root-device-missing"
    );
    Ok(())
}

/// The header of a program of this machine that needs nothing: 64 bits, little endian, executable, x86-64.
const ELF: &[u8; 64] = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0\
    \0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x40\0\x38\0\0\0\x40\0\0\0\0\0";

fn export(said: &[Said]) -> Result<String> {
    let mut text = String::new();
    for (at, who, message) in said {
        let from = match *who {
            "systemd" => format!("_PID=1\nUNIT={UNIT}"),
            "setup" => "_PID=1\nUNIT=setup.service".to_owned(),
            "logind" => "_PID=1\nUNIT=systemd-logind.service".to_owned(),
            unit => format!("_PID=77\n_SYSTEMD_UNIT={unit}"),
        };
        write!(
            text,
            "__MONOTONIC_TIMESTAMP={at}000000\n_BOOT_ID=b\n{from}\nMESSAGE={message}\n\n"
        )?;
    }
    Ok(text)
}

fn verdict(evidence: Evidence) -> String {
    let verdict = diagnose(&evidence.unit(UNIT).expected_port(8080));
    match (verdict.finding, verdict.verdict) {
        (Some(f), _) => f.cause.id().to_owned(),
        (None, VerdictKind::Healthy) => "healthy".to_owned(),
        (None, VerdictKind::Cause | VerdictKind::Unknown) => "unknown".to_owned(),
    }
}

#[test]
fn runs_are_understood() -> Result<()> {
    let mut wrong = Vec::new();
    for run in runs() {
        let dir = tempdir()?;
        let mut evidence = Evidence::new();
        if !run.units.is_empty() {
            let lib = dir.path().join("usr/lib/systemd/system");
            fs::create_dir_all(&lib)?;
            for (target, wants) in [
                ("multi-user", "basic"),
                ("basic", "sysinit"),
                ("sysinit", ""),
            ] {
                let line = format!("[Unit]\nRequires={wants}.target\nAfter={wants}.target\n");
                let text = if wants.is_empty() { "[Unit]\n" } else { &line };
                fs::write(lib.join(format!("{target}.target")), text)?;
            }
            std::os::unix::fs::symlink("multi-user.target", lib.join("default.target"))?;
            for (name, text) in run.units {
                let path = dir.path().join("etc/systemd/system").join(name);
                fs::create_dir_all(path.parent().context("a unit's directory")?)?;
                match path.file_name().filter(|_| text.is_empty()) {
                    Some(name) => std::os::unix::fs::symlink(format!("../{name}"), &path)?,
                    None => fs::write(&path, text)?,
                }
            }
            // What is run, so that only the run can be to blame.
            for program in ["usr/bin/a", "usr/bin/setup", "sbin/init"] {
                let path = dir.path().join(program);
                fs::create_dir_all(path.parent().context("a program's directory")?)?;
                fs::write(&path, ELF)?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
            }
            fs::create_dir_all(dir.path().join("var/log/journal"))?;
            evidence = evidence.cmdline("console=ttyS0 root=/dev/vda rw");
            evidence = evidence.disk(DirTree::new(dir.path().as_std_path()));
        }
        if !run.console.is_empty() {
            evidence = evidence.serial(run.console);
        }
        if !run.journal.is_empty() {
            evidence = evidence.journal(export(&run.journal)?.as_bytes(), "journal");
        }
        let got = verdict(evidence);
        if got != run.expected {
            wrong.push(format!(
                "expected {}, got {got}: {:?} {:?}",
                run.expected, run.console, run.journal
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    Ok(())
}

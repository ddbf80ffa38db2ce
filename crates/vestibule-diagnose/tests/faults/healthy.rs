//! Healthy trees, many of them: each recorded or written trap with a random set of things that are in images and harm
//! nothing, and on random command lines. No verdict may name a cause.
//!
//! `VESTIBULE_HEALTHY=300` says how many; in CI there are fewer. A run is told by its number, and comes again with it:
//! `VESTIBULE_HEALTHY_RUN=17` runs that one alone.
use crate::{expect, variants};
use anyhow::{Context, Result};
use proptest::{
    prelude::*,
    sample::subsequence,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use std::{
    fs,
    path::{Path, PathBuf},
};
use vestibule_diagnose::{Evidence, diagnose, disk::dir::DirTree};

const RUNS: usize = 24;

/// Each changes what no other one and no trap does.
const HARMLESS: &[&str] = &[
    // Packages that nothing on the way to the agent needs.
    "rm -f $R/usr/sbin/nft $R/usr/lib/systemd/system/nftables.service",
    "rm -f $R/usr/bin/ps $R/usr/bin/top $R/usr/bin/free",
    "rm -rf $R/usr/share/zoneinfo",
    "rm -f $R/bin/hostname $R/usr/bin/hostname",
    "rm -rf $R/var/lib/dpkg $R/var/cache/apt $R/etc/apt",
    "rm -rf $R/usr/lib/python* $R/usr/share/perl5",
    // What other software brings.
    "printf '[Unit]\\nDescription=Broken, and nobody asks for it\\n[Service]\\nExecStart=/opt/absent\\n' > $S/unused.service",
    "printf '[Service]\\nExecStart=/opt/absent\\nType=oneshot\\n' > $S/beside.service; ln -s ../beside.service $W/",
    "printf '[Service]\\nExecStart=/bin/true\\n[Install]\\nWantedBy=multi-user.target\\n' > $S/disabled.service",
    "mkdir -p $S/late.timer.d; printf '[Timer]\\nOnCalendar=daily\\n[Install]\\nWantedBy=timers.target\\n' > $S/late.timer; printf '[Service]\\nExecStart=/opt/absent\\n' > $S/late.service; mkdir -p $S/timers.target.wants; ln -s ../late.timer $S/timers.target.wants/",
    "ln -sf /dev/null $S/systemd-timesyncd.service; ln -sf /dev/null $S/e2scrub_all.timer",
    "ln -s /lib/systemd/system/none.service $S/none.service.link",
    "mkdir -p $R/etc/systemd/journald.conf.d; printf '[Journal]\\nSystemMaxUse=16M\\nMaxLevelConsole=info\\n' > $R/etc/systemd/journald.conf.d/size.conf",
    "mkdir -p $R/etc/systemd/system.conf.d; printf '[Manager]\\nDefaultTimeoutStopSec=5s\\nLogLevel=info\\n' > $R/etc/systemd/system.conf.d/stop.conf",
    "mkdir -p $R/usr/lib/systemd/user; printf '[Service]\\nExecStart=/opt/absent\\n' > $R/usr/lib/systemd/user/desk.service",
    "echo 'd /run/things 0755 root root' > $R/usr/lib/tmpfiles.d/things.conf; echo 'u things - -' > $R/usr/lib/sysusers.d/things.conf",
    "printf 'kernel.printk = 4 4 1 7\\nvm.swappiness = 10\\n' > $R/etc/sysctl.d/80-quiet.conf",
    "printf '# nothing\\n' > $R/etc/modules-load.d/none.conf; printf 'blacklist pcspkr\\n' > $R/etc/modprobe.d/quiet.conf",
    "mkdir -p $R/srv/data; printf 'failed error panic segfault denied\\n' > $R/srv/data/words; printf 'Failed to start\\n' > $R/etc/motd",
    "echo 'person:x:1000:1000::/home/person:/bin/sh' >> $R/etc/passwd; echo 'person:x:1000:' >> $R/etc/group; mkdir -p $R/home/person",
    "mkdir -p $R/usr/local/lib/empty; ln -s /nowhere/at/all $R/usr/local/lib/dangling; ln -s loop $R/usr/local/lib/loop",
    "touch $R/forcefsck $R/.autorelabel $R/etc/nologin.txt",
];

const COMMAND_LINES: &[&str] = &[
    "console=ttyS0 root=/dev/vda rw net.ifnames=0",
    "console=ttyS0 root=/dev/vda rw net.ifnames=0 quiet loglevel=3",
    "console=tty0 console=ttyS0,115200n8 root=/dev/vda rw net.ifnames=0 systemd.show_status=1",
    "root=/dev/vda rw net.ifnames=0 console=hvc0 mitigations=off random.trust_cpu=on",
    "console=ttyS0 root=/dev/vda rw net.ifnames=0 systemd.log_level=info nosuchparameter=1 -- nosuchoption",
];

/// What may lie beneath the harmless things.
#[derive(Clone, Debug)]
enum Ground {
    /// A recorded case that is healthy, with its own command line.
    Recorded(PathBuf, String, String),
    Written(&'static str),
    Bare,
}

fn recorded(faults: &Path) -> Result<Vec<Ground>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(faults)? {
        let dir = entry?.path();
        if dir.join("expect.toml").is_file() {
            let expect = expect(&dir).with_context(|| dir.display().to_string())?;
            if expect.verdict == "healthy" && expect.packing != crate::tree::Packing::Filled {
                all.push(Ground::Recorded(dir, expect.unit, expect.cmdline));
            }
        }
    }
    all.sort_by_key(|ground| format!("{ground:?}"));
    Ok(all)
}

#[test]
fn healthy_trees_have_no_cause() -> Result<()> {
    let Some((faults, base)) = crate::faults("healthy")? else {
        return Ok(());
    };
    let number = |name| {
        let text = std::env::var(name).ok()?;
        text.parse::<usize>().ok()
    };
    let runs = number("VESTIBULE_HEALTHY").unwrap_or(RUNS);
    let only = number("VESTIBULE_HEALTHY_RUN");

    let mut grounds = recorded(&faults)?;
    grounds.extend(variants::healthy().map(Ground::Written));
    grounds.push(Ground::Bare);
    let every = (
        proptest::sample::select(grounds),
        subsequence(HARMLESS.to_vec(), 0..=HARMLESS.len() / 2),
        proptest::sample::select(COMMAND_LINES.to_vec()),
    );
    // The same runs each time: a failure has a number.
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let mut wrong = Vec::new();
    for run in 0..only.map_or(runs, |only| only + 1) {
        let tree = every.new_tree(&mut runner);
        let (ground, harmless, mut cmdline) = tree.map_err(anyhow::Error::msg)?.current();
        if only.is_some_and(|only| only != run) {
            continue;
        }
        let mut unit = variants::AGENT.to_owned();
        let mut script = harmless.join("\n");
        let mutated = match &ground {
            Ground::Recorded(dir, named, line) => {
                unit.clone_from(named);
                cmdline = line;
                let mutated = base.mutate(dir, crate::tree::Packing::None)?;
                mutated.change(&script)?;
                mutated
            }
            Ground::Written(lines) => {
                script = format!("{lines}\n{script}");
                base.script(&script)?
            }
            Ground::Bare => base.script(&script)?,
        };
        let evidence = Evidence::new().unit(&unit).cmdline(cmdline);
        let verdict = diagnose(&evidence.disk(DirTree::new(&mutated.dir)));
        if let Some(finding) = verdict.finding {
            wrong.push(format!(
                "run {run}: {} ({}) {:?}\n  {ground:?}\n  {cmdline}\n  {}",
                finding.cause,
                finding.why,
                finding.evidence,
                harmless.join("\n  ")
            ));
        }
    }
    println!("{runs} healthy trees, {} of them with a cause", wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

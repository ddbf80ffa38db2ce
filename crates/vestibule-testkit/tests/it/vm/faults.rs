//! Broken images, really booted: what the runner collects of a VM that never came up names the cause that is on the disk.
//! The first case is the earlier system's: an enabled unit behind `network-online.target`, and no journal entry at all.
use super::{
    alone,
    guest::{Guest, run_vm},
    took,
};
use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use futures_util::future::join_all;
use serde::Deserialize;
use std::{
    fs,
    io::Write as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use vestibule_api::{
    cause::Cause,
    finding::{Quote, VerdictKind},
    machine::VmSpec,
};
use vestibule_testkit::stage::{binary, image_home, residue};

/// All boot at once on two cores; what is broken waits for this deadline.
const DEADLINE_S: u32 = 90;
const LIMIT: Duration = Duration::from_secs(400);
const UNIT: &str = "/usr/lib/systemd/system/vm-browser-agent.service";
const WANTS: &str = "/etc/systemd/system/multi-user.target.wants/vm-browser-agent.service";
const PROGRAM: &str = "/usr/lib/vestibule/vestibule-agent";

/// One change of a root file system, as debugfs(8) makes it.
enum Change {
    Remove(&'static str),
    Directory(&'static str),
    Link(&'static str, &'static str),
    Write(&'static str, &'static str),
    Mode(&'static str, &'static str),
}

struct Fault {
    name: &'static str,
    changes: &'static [Change],
    cause: Cause,
}

use Change::{Directory, Link, Mode, Remove, Write};

/// The agent waits for the network; the network's own waiting never ends, for no link is managed.
const BEHIND_NETWORK_ONLINE: [Change; 7] = [
    Remove("/etc/systemd/system/systemd-networkd.service"),
    Remove("/etc/systemd/system/systemd-networkd-wait-online.service"),
    Link(
        "/etc/systemd/system/multi-user.target.wants/systemd-networkd.service",
        "/lib/systemd/system/systemd-networkd.service",
    ),
    Directory("/etc/systemd/system/network-online.target.wants"),
    Link(
        "/etc/systemd/system/network-online.target.wants/systemd-networkd-wait-online.service",
        "/lib/systemd/system/systemd-networkd-wait-online.service",
    ),
    Directory("/etc/systemd/system/vm-browser-agent.service.d"),
    Write(
        "/etc/systemd/system/vm-browser-agent.service.d/network.conf",
        "[Unit]\nWants=network-online.target\nAfter=network-online.target\n",
    ),
];

/// What was declared the fix, once.
const PRESET: Change = Write(
    "/usr/lib/systemd/system-preset/00-agent.preset",
    "enable vm-browser-agent.service\n",
);

const FAULTS: [Fault; 8] = [
    Fault {
        name: "behind network-online.target",
        changes: &BEHIND_NETWORK_ONLINE,
        cause: Cause::WaitsForNetworkOnline,
    },
    Fault {
        name: "the same with a preset that enables the agent",
        changes: &{
            let [a, b, c, d, e, f, g] = BEHIND_NETWORK_ONLINE;
            [a, b, c, d, e, f, g, PRESET]
        },
        cause: Cause::WaitsForNetworkOnline,
    },
    Fault {
        name: "not enabled",
        changes: &[Remove(WANTS)],
        cause: Cause::UnitNotEnabled,
    },
    Fault {
        name: "masked",
        changes: &[Link(
            "/etc/systemd/system/vm-browser-agent.service",
            "/dev/null",
        )],
        cause: Cause::UnitMasked,
    },
    Fault {
        name: "program removed",
        changes: &[Remove(PROGRAM)],
        cause: Cause::ExecMissing,
    },
    Fault {
        name: "program not executable",
        changes: &[Mode(PROGRAM, "0100644")],
        cause: Cause::ExecNotExecutable,
    },
    Fault {
        name: "user missing",
        changes: &[
            Directory("/etc/systemd/system/vm-browser-agent.service.d"),
            Write(
                "/etc/systemd/system/vm-browser-agent.service.d/user.conf",
                "[Service]\nUser=nobody-has-this-name\n",
            ),
        ],
        cause: Cause::UserMissing,
    },
    Fault {
        name: "unit removed",
        changes: &[Remove(UNIT)],
        cause: Cause::UnitFileMissing,
    },
];

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image tiny; script/test faults"]
async fn a_broken_image_that_was_booted_names_its_cause() -> Result<()> {
    let _alone = alone().await;
    let begin = Instant::now();
    let image = image_home()
        .join("aliases/tiny")
        .canonicalize_utf8()
        .context("no image `tiny`: `script/test images` builds it")?;
    let home = camino_tempfile::tempdir()?;
    let booted = FAULTS.iter().enumerate().map(|(number, fault)| {
        let (image, dir) = (image.clone(), home.path().join(number.to_string()));
        async move {
            let outcome = outcome(&image, &dir, fault).await;
            (fault.name, outcome)
        }
    });
    let mut wrong = Vec::new();
    for (name, outcome) in join_all(booted).await {
        if let Err(err) = outcome {
            wrong.push(format!("{name}: {err:#}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    took("eight broken images, booted and explained", begin);
    Ok(())
}

/// A recipe whose agent could not start: there is no image of it, and what the build says is the diagnosis.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the layers of the image tiny; script/test faults"]
async fn a_broken_image_is_not_built() -> Result<()> {
    let workspace = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let recipes = camino_tempfile::tempdir()?;
    let copied = Command::new("cp")
        .args(["-r", "--"])
        .args([
            workspace.join("images/tiny").as_str(),
            recipes.path().as_str(),
        ])
        .status()
        .context("start cp")?;
    ensure!(copied.success(), "cp: {copied}");
    let recipe = recipes.path().join("broken");
    let dropins = recipe.join("overlay/etc/systemd/system/vm-browser-agent.service.d");
    fs::create_dir_all(&dropins)?;
    fs::write(
        recipe.join("recipe.toml"),
        "schema = 1\nname = \"broken\"\nbase = \"tiny\"\n",
    )?;
    fs::write(
        dropins.join("user.conf"),
        "[Service]\nUser=nobody-has-this-name\n",
    )?;
    let agent = workspace.join("target/agent/vestibule-agent");
    let out = tokio::process::Command::new(binary()?)
        .args(["--home", image_home().as_str(), "image", "build"])
        .args(["--agent", agent.as_str(), recipe.as_str()])
        .output()
        .await?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(!out.status.success() && out.stdout.is_empty(), "{said}");
    for word in ["user-missing", "user.conf:2", "nobody-has-this-name"] {
        ensure!(said.contains(word), "no `{word}`: {said}");
    }
    Ok(())
}

/// Breaks a copy of the image, boots it until its runner gives up, and asks what was wrong.
async fn outcome(image: &Utf8Path, dir: &Utf8Path, fault: &Fault) -> Result<()> {
    let broken = dir.join(image.file_name().context("the image has a digest")?);
    fs::create_dir_all(&broken)?;
    let root = broken.join("root.ext4");
    let files = ["vmlinuz", "initrd", "manifest.json", "root.ext4"];
    // Holes stay holes.
    let copied = Command::new("cp")
        .args(["--sparse=always", "--reflink=auto", "--"])
        .args(files.map(|name| image.join(name)))
        .arg(&broken)
        .status()
        .context("start cp")?;
    ensure!(copied.success(), "cp: {copied}");
    change(&root, dir, fault.changes)?;

    let mut spec = Guest::spec(dir, &broken)?;
    spec.boot_deadline_s = DEADLINE_S;
    spec.evidence_dir = dir
        .join("evidence")
        .join(spec.machine_id.to_string())
        .into_string();
    run(&spec).await?;
    let evidence = Utf8PathBuf::from(&spec.evidence_dir);
    // Bundle and disk; and the bundle alone, whose image is looked up.
    let by_hand = [
        "diagnose",
        "--evidence",
        evidence.as_str(),
        "--disk",
        root.as_str(),
    ];
    let by_id = [
        "--home",
        dir.as_str(),
        "vm",
        "why",
        &spec.machine_id.to_string(),
    ];
    for words in [by_hand, by_id] {
        let told = explain(&words).await?;
        ensure!(
            (told.verdict, told.cause) == (VerdictKind::Cause, Some(fault.cause)),
            "not `{}` by {words:?}: {told:?}",
            fault.cause
        );
        ensure!(!told.evidence.is_empty(), "nothing is quoted: {told:?}");
    }
    ensure!(
        residue(Utf8Path::new(&spec.vm_dir), None).is_empty(),
        "something is left"
    );
    Ok(())
}

fn change(root: &Utf8Path, dir: &Utf8Path, changes: &[Change]) -> Result<()> {
    let mut script = String::new();
    for (number, change) in changes.iter().enumerate() {
        let line = match change {
            Remove(path) => format!("rm {path}\n"),
            Directory(path) => format!("mkdir {path}\n"),
            Link(path, target) => format!("symlink {path} {target}\n"),
            Mode(path, mode) => format!("sif {path} mode {mode}\n"),
            Write(path, text) => {
                let file = dir.join(format!("file-{number}"));
                fs::write(&file, text)?;
                format!("write {file} {path}\nsif {path} mode 0100644\n")
            }
        };
        script.push_str(&line);
    }
    let mut debugfs = Command::new("debugfs")
        .args(["-w", "-f", "-", root.as_str()])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start debugfs")?;
    let mut stdin = debugfs.stdin.take().context("its standard input")?;
    stdin.write_all(script.as_bytes())?;
    drop(stdin);
    let output = debugfs.wait_with_output()?;
    // It says its version there as well.
    let said = String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<&str> = said
        .lines()
        .filter(|line| !line.starts_with("debugfs "))
        .collect();
    ensure!(
        output.status.success() && complaints.is_empty(),
        "debugfs: {complaints:?}"
    );
    Ok(())
}

/// The runner's whole life: a VM that comes up goes on, and this takes too long.
async fn run(spec: &VmSpec) -> Result<()> {
    let mut process = run_vm(spec, tokio::process::Command::new(binary()?)).await?;
    tokio::time::timeout(LIMIT, process.wait())
        .await
        .context("the runner goes on")??;
    Ok(())
}

/// What `vestibule diagnose --json` prints, as far as it is compared.
#[derive(Debug, Deserialize)]
struct Told {
    verdict: VerdictKind,
    cause: Option<Cause>,
    #[serde(default)]
    evidence: Vec<Quote>,
}

async fn explain(arguments: &[&str]) -> Result<Told> {
    let output = tokio::process::Command::new(binary()?)
        .arg("--json")
        .args(arguments)
        .output()
        .await?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

//! A whole sign-in on real Firecracker, nested under emulation: a test of `vm`, in the nested machine, on the driver
//! `firecracker`. `script/test-nested` runs it; it takes too long for CI.
use crate::vm::vendors;
use anyhow::{Context as _, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use std::{fs, time::Duration};
use vestibule_testkit::{
    nested::{Nested, Run},
    process::workspace,
    stage::{binary, image_home},
};

/// A hang, nothing else.
const LIMIT: Duration = Duration::from_secs(3 * 3600);
/// For one VM of 2 GiB with its VMM, what the host keeps of the image, and L1 itself.
const MEMORY_MIB: u32 = 5120;
/// For the controller's home, and for evidence.
const SPARE_MIB: u64 = 1024;
/// How much slower than one emulation the two are.
const PATIENCE: &str = "4";
/// A boot and a sign-in. What is known of one that failed is said, and what the nested machine was busy with.
const STEPS: &str = "cd /data && mkdir -p tmp workspace/crates/vestibule-controller && \
    it nested::inside_after_a_boot --ignored --exact --nocapture && exit 0; \
    ps -o pid,time,comm | sort -k 2 | tail -n 15; \
    find workspace/target/evidence -type f | while read -r file; do echo \"== $file\"; tail -n 60 \"$file\"; done; \
    find workspace/target/e2e -type f | while read -r file; do echo \"== $file (base64)\"; base64 \"$file\"; done; exit 1";

/// Where the programs know their checkout to be, there is one.
fn steps(here: &Utf8Path) -> String {
    format!("mkdir -p {here} && mount -o bind /data/workspace {here} && {STEPS}")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image browser-test; script/test-nested"]
async fn sign_in_on_firecracker() -> Result<()> {
    let nested = Nested::find()?;
    let image = image_home()
        .join("aliases/browser-test")
        .canonicalize_utf8()
        .context("no image `browser-test`: `script/test images` builds it")?;
    let digest = image.file_name().unwrap_or_default();
    let here = workspace();
    let target = here.join("target");
    let this = Utf8PathBuf::try_from(std::env::current_exe()?)?;
    let logs = target.join("nested");
    fs::create_dir_all(&logs).with_context(|| format!("make `{logs}`"))?;
    let console = logs.join("console.log");
    println!("the console is in `{console}`");
    let ran = nested
        .run(&Run {
            programs: &[("it", this.as_path()), ("vestibule", binary()?.as_path())],
            files: &[
                ("firecracker", target.join("tools/firecracker").as_path()),
                (&format!("images/{digest}"), image.as_path()),
                ("workspace/target/test-ca", target.join("test-ca").as_path()),
            ],
            links: &[("aliases/browser-test", &format!("../images/{digest}"))],
            command: &["sh", "-c", &steps(&here)],
            environment: &[
                ("PATH", "/data:/bin"),
                ("RUST_BACKTRACE", "0"),
                ("TMPDIR", "/data/tmp"),
                ("VESTIBULE_BIN", "/data/vestibule"),
                ("VESTIBULE_FIRECRACKER", "/data/firecracker/firecracker"),
                ("VESTIBULE_TEST_DRIVER", "firecracker"),
                ("VESTIBULE_TEST_HOME", "/data"),
                // On the one processor that the nested machine has, two would wait for each other.
                ("VESTIBULE_TEST_VCPUS", "1"),
                ("VESTIBULE_TEST_PATIENCE", PATIENCE),
            ],
            console: Some(&console),
            spare_mib: SPARE_MIB,
            cpus: 1,
            memory_mib: MEMORY_MIB,
            limit: LIMIT,
        })
        .await?;
    for line in ran
        .console
        .lines()
        .rev()
        .take(40)
        .collect::<Vec<_>>()
        .iter()
        .rev()
    {
        println!("{line}");
    }
    ensure!(ran.status == 0, "the sign-in ended with {}", ran.status);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "what `sign_in_on_firecracker` runs in the nested machine"]
async fn inside_after_a_boot() -> Result<()> {
    vendors::codex_after_a_boot().await
}

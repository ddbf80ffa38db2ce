//! The conformance suite on each driver: QEMU here, and real Firecracker where its KVM is, nested under emulation.
use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use std::time::Duration;
use vestibule_api::machine::DriverChoice;
use vestibule_testkit::{
    conformance::{self, SAYS, Setup},
    nested::{Nested, OnImage},
    stage::{binary, image_home},
};

/// Emulation of emulation. The suite on QEMU has to fit in as well: `script/test` adds them up.
const LIMIT: Duration = Duration::from_mins(12);

fn image() -> Result<Utf8PathBuf> {
    let tiny = image_home().join("aliases/tiny").canonicalize_utf8();
    tiny.context("no image `tiny`: `script/test tiny` builds it")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image tiny; script/test runner"]
async fn qemu() -> Result<()> {
    let home = camino_tempfile::tempdir()?;
    conformance::run(Setup {
        program: binary()?,
        driver: DriverChoice::Qemu,
        image: image()?,
        home: home.path().to_owned(),
        jail_required: false,
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image tiny; script/test nested"]
async fn firecracker() -> Result<()> {
    let nested = Nested::find()?;
    let image = image()?;
    let ran = nested
        .run_on_image(&OnImage {
            testkit: Utf8Path::new(env!("CARGO_BIN_EXE_vestibule-testkit")),
            image: &image,
            programs: &[],
            command: &[
                "conformance",
                "--driver",
                "firecracker",
                "--jail",
                "required",
            ],
            limit: LIMIT,
        })
        .await?;
    if ran.status != 0 {
        println!("{}", ran.console);
    }
    for line in ran.console.lines().filter(|line| line.starts_with(SAYS)) {
        println!("{line}");
    }
    ensure!(ran.status == 0, "the suite ended with {}", ran.status);
    Ok(())
}

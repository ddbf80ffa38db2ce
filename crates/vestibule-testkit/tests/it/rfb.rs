//! The RFB client against a server that we did not write: QEMU's, showing a machine that does not run.
use anyhow::{Context, Result};
use std::{process::Stdio, time::Duration};
use tokio::{net::UnixStream, process::Command};
use vestibule_testkit::{rfb::Rfb, wait};

#[tokio::test]
async fn it_sees_the_screen_of_a_real_server() -> Result<()> {
    let dir = camino_tempfile::tempdir()?;
    let socket = dir.path().join("vnc.sock");
    let Ok(mut qemu) = Command::new("qemu-system-x86_64")
        .args([
            "-S",
            "-nodefaults",
            "-machine",
            "q35,accel=tcg",
            "-vga",
            "std",
            "-display",
        ])
        .arg(format!("vnc=unix:{socket}"))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
    else {
        anyhow::bail!("qemu-system-x86_64 is not installed");
    };
    let io = wait::until("QEMU's VNC server", Duration::from_secs(30), || async {
        UnixStream::connect(&socket)
            .await
            .map_err(|err| err.to_string())
    })
    .await?;
    let rfb = Rfb::connect(io).await.context("connect")?;
    let shown = rfb
        .wait_for("a first picture", Duration::from_secs(30), |frame| {
            let (width, height) = frame.size();
            (width >= 320 && height >= 200).then(|| frame.clone())
        })
        .await?;
    let png = dir.path().join("screen.png");
    shown.save(&png)?;
    assert!(std::fs::read(&png)?.starts_with(b"\x89PNG\r\n\x1a\n"));
    rfb.click(10, 10).await?;
    rfb.type_text("ä\n").await?;

    qemu.kill().await?;
    let why = wait::until("the end of the view", Duration::from_secs(10), || {
        std::future::ready(rfb.ended().ok_or("still open"))
    })
    .await?;
    assert!(why.contains("read a message"), "{why}");
    assert!(
        rfb.wait_for("anything", Duration::from_secs(5), |_| None::<()>)
            .await
            .is_err()
    );
    Ok(())
}

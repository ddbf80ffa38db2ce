//! Real Firecracker with the image in `VESTIBULE_TEST_IMAGE`, nested under QEMU's TCG: boot, the agent over the vsock, save, two
//! copies at once, a pause.
use camino::{Utf8Path, Utf8PathBuf};
use std::time::Duration;
use vestibule_testkit::{nested::Nested, process::workspace};

/// Emulation of emulation, beside whatever else runs.
const LIMIT: Duration = Duration::from_secs(900);
/// The VMs of 256 MiB, their snapshot in a tmpfs, and L1 itself.
const MEMORY_MIB: u32 = 2560;

#[tokio::test]
#[ignore = "boots a real image, nested: set VESTIBULE_TEST_IMAGE, run with --ignored"]
async fn an_image_lives_under_firecracker() {
    let Some(nested) = Nested::find() else {
        return;
    };
    let image = std::env::var("VESTIBULE_TEST_IMAGE")
        .map(Utf8PathBuf::from)
        .expect("VESTIBULE_TEST_IMAGE names an image's directory");
    let firecracker = workspace().join("target/tools/firecracker/firecracker");
    let program = crate::support::example("firecracker-by-hand");
    let ran = nested
        .run(
            &program,
            &["/data/image"],
            &[("VESTIBULE_FIRECRACKER", "/data/firecracker")],
            &[
                ("firecracker", &firecracker),
                ("image", Utf8Path::new(&image)),
            ],
            MEMORY_MIB,
            LIMIT,
        )
        .await
        .unwrap();
    println!("{}", ran.console);
    assert_eq!(ran.status, 0);
    for milestone in [
        "KVM runs guests",
        "the agent is on the stream",
        "saved",
        "copy 1 answers",
        "copy 2 answers",
        "copy 2 was paused, and answers",
        "done",
    ] {
        assert!(ran.console.contains(milestone), "{milestone}");
    }
}

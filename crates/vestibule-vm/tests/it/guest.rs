//! A real guest: the image in `VESTIBULE_TEST_IMAGE` under the runner. What any VM must do, on each driver, is the conformance
//! suite's (`vestibule-testkit`).
use crate::support::{Place, Running};
use camino::Utf8PathBuf;
use hyper::Method;
use std::time::Duration;
use vestibule_api::{
    agent::{ExecReply, ExecRequest, ExecUser},
    egress::EgressPolicy,
    image::Manifest,
};

fn image() -> Utf8PathBuf {
    let image = std::env::var("VESTIBULE_TEST_IMAGE");
    image
        .expect("VESTIBULE_TEST_IMAGE names an image's directory")
        .into()
}

pub(crate) fn manifest_of() -> Manifest {
    let manifest = std::fs::read(image().join("manifest.json")).unwrap();
    serde_json::from_slice(&manifest).unwrap()
}

/// A place with the image that the environment names.
pub(crate) fn place(egress: EgressPolicy) -> Place {
    let home = camino_tempfile::tempdir().unwrap();
    let mut place = Place::new(home, &image(), manifest_of().default_memory_mib);
    place.spec.vcpus = 2;
    place.spec.egress = egress;
    place.spec.boot_deadline_s = 240;
    place.spec.console_keep_bytes = 256 << 10;
    place
}

pub(crate) async fn exec(runner: &Running, script: &str) -> ExecReply {
    run_in(runner, ExecUser::Root, script, 50).await
}

pub(crate) async fn run_in(
    runner: &Running,
    user: ExecUser,
    script: &str,
    timeout_s: u32,
) -> ExecReply {
    let request = ExecRequest {
        argv: ["bash", "-c", script].map(str::to_owned).into(),
        user,
        stdin: String::new(),
        timeout_s,
    };
    let call = runner
        .client
        .call(Method::POST, "/agent/exec", Some(&request));
    tokio::time::timeout(Duration::from_secs(u64::from(timeout_s) + 10), call)
        .await
        .expect("it took too long")
        .unwrap()
}

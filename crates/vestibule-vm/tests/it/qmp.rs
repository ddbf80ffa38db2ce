//! The QMP client and the process keeper against a real QEMU that runs no guest.
use crate::support::{qemu_program, soon};
use serde_json::json;
use std::os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream};
use tokio::net::UnixStream;
use vestibule_vm::{
    process::{Child, Program, number},
    qemu::qmp::{Qmp, QmpError},
};

async fn qemu(extra: &[&str]) -> (Child, UnixStream) {
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let theirs = OwnedFd::from(theirs);
    let mut args: Vec<String> = "-nodefaults -no-user-config -display none -S -machine none"
        .split(' ')
        .map(str::to_owned)
        .collect();
    args.extend([
        "-chardev".into(),
        format!("socket,id=qmp,fd={}", number(&theirs)),
        "-mon".into(),
        "chardev=qmp,mode=control".into(),
    ]);
    args.extend(extra.iter().map(ToString::to_string));
    let program = Program {
        confinement: Default::default(),
        path: qemu_program(),
        args,
        directory: "/".into(),
        stdout: None,
        stderr: std::fs::File::options()
            .write(true)
            .open("/dev/null")
            .unwrap()
            .into(),
        inherit: vec![theirs],
    };
    let child = program.spawn().await.unwrap();
    (child, UnixStream::from_std(ours).unwrap())
}

#[tokio::test]
async fn commands_refusals_and_events() {
    let (child, socket) = qemu(&[]).await;
    let (qmp, version, mut events) = soon(Qmp::connect(socket)).await.unwrap();
    assert!(version.split('.').count() == 3, "{version}");
    let status = soon(qmp.execute("query-status", json!({}))).await.unwrap();
    assert_eq!(status["running"], false);
    let refused = soon(qmp.execute("no-such-command", json!({})))
        .await
        .unwrap_err();
    assert!(
        matches!(refused, QmpError::Refused { ref class, .. } if class == "CommandNotFound"),
        "{refused}"
    );
    // Many at once find their own replies.
    let (a, b) = tokio::join!(
        qmp.execute("query-status", json!({})),
        qmp.execute("query-version", json!({}))
    );
    assert!(a.unwrap()["status"].is_string() && b.unwrap()["qemu"].is_object());
    soon(qmp.execute("quit", json!({}))).await.unwrap();
    assert_eq!(soon(events.recv()).await.unwrap().event, "SHUTDOWN");
    assert_eq!(soon(child.wait()).await.code, Some(0));
    assert!(matches!(
        soon(qmp.execute("query-status", json!({}))).await,
        Err(QmpError::Closed)
    ));
}

#[tokio::test]
async fn a_qemu_that_refuses_its_arguments_closes_the_socket() {
    let (child, socket) = qemu(&["-no-such-option"]).await;
    assert!(matches!(
        soon(Qmp::connect(socket)).await,
        Err(QmpError::Closed)
    ));
    assert_eq!(soon(child.wait()).await.code, Some(1));
}

#[tokio::test]
async fn a_child_dies_with_its_handle_and_inherits_nothing_else() {
    let (child, socket) = qemu(&[]).await;
    let _qmp = soon(Qmp::connect(socket)).await.unwrap();
    let pid = child.pid();
    let links: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|e| {
            std::fs::read_link(e.unwrap().path())
                .unwrap()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    // Its own: null, null, null, the control socket, and what QEMU opens for its event loops.
    let foreign: Vec<_> = links
        .iter()
        .filter(|l| {
            !l.starts_with("/dev/null")
                && !l.starts_with("anon_inode:")
                && !l.starts_with("socket:")
        })
        .collect();
    assert!(foreign.is_empty(), "{links:?}");
    assert!(
        links.iter().filter(|l| l.starts_with("socket:")).count() == 1,
        "{links:?}"
    );
    assert!(
        std::fs::read_to_string(format!("/proc/{pid}/environ"))
            .unwrap()
            .is_empty()
    );
    let ended = child.watch();
    drop(child);
    assert_eq!(soon(ended).await.signal, Some(9));
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named() {
    let program = Program {
        confinement: Default::default(),
        path: "/no/such/qemu".into(),
        args: Vec::new(),
        directory: "/".into(),
        stdout: None,
        stderr: std::fs::File::open("/dev/null").unwrap().into(),
        inherit: Vec::new(),
    };
    let err = program.spawn().await.unwrap_err();
    assert!(err.to_string().contains("/no/such/qemu"), "{err}");
}

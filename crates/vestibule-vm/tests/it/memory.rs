//! What a guest may cost its host: a program of the runner's, and a guest that writes yamux frames by hand.
use crate::{
    bare::Then,
    support::{Place, example},
};
use std::{
    io::{Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::ExitStatusExt as _},
    },
    process::{Child, Command, Stdio},
};
use vestibule_api::{machine::MachineState, mux::STREAM_LIMIT};
use vestibule_vm::memory::RUNNER_BYTES;

const MIB: u64 = 1 << 20;
/// yamux's first window of a stream.
const WINDOW: usize = 256 << 10;

/// A data frame of one byte (yamux's specification, *Framing*): version, type, flags, stream, length.
fn frame(stream: u32, flags: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0, 0];
    frame.extend(flags.to_be_bytes());
    frame.extend(stream.to_be_bytes());
    frame.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    frame.extend(payload);
    frame
}

/// Bytes of a line of `/proc/PID/status`.
fn of(pid: u32, name: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// A host with so much memory, the guest's end of its stream, and the most that the host ever took while `frames` of
/// `payload` went to each of all streams, or to as many as it lived for.
fn flood(bytes: u64, payload: &[u8], frames: usize) -> (Child, UnixStream, u64) {
    const SYN: u16 = 1;
    let (mut guest, host) = UnixStream::pair().unwrap();
    let mut host = Command::new(example("unread-streams"))
        .arg(bytes.to_string())
        .stdin(Stdio::from(OwnedFd::from(host)))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // What the host says back is read and dropped, or it would wait for us.
    let mut said = guest.try_clone().unwrap();
    std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
    let mut peak = 0;
    // A guest is the server: its streams are even.
    for stream in (1..=STREAM_LIMIT).map(|n| u32::try_from(2 * n).unwrap()) {
        let mut sent = frame(stream, SYN, b"{\"service\":\"proxy\"}\n");
        sent.extend(frame(stream, 0, payload).repeat(frames));
        if guest.write_all(&sent).is_err() {
            break;
        }
        peak = peak.max(of(host.id(), "VmHWM:").unwrap_or(0));
        if let Some(_status) = host.try_wait().unwrap() {
            break;
        }
    }
    (host, guest, peak)
}

#[test]
fn a_guest_that_sends_single_bytes_costs_its_own_runner_and_no_more() {
    let limit = 64 * MIB;
    // Most of a window in each stream, byte by byte: what is unread must not open the window again.
    let (mut host, _guest, peak) = flood(limit, b"x", WINDOW / 2);
    let status = host.wait().unwrap();
    let mut said = String::new();
    host.stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{status}: {said}");
    assert!(said.contains("memory allocation of"), "{said}");
    println!("most: {} MiB of {}", peak / MIB, limit / MIB);
    assert!(peak < limit + 32 * MIB, "{peak}");
}

#[test]
fn one_that_fills_every_window_in_frames_of_a_size_is_carried() {
    let (mut host, guest, peak) = flood(RUNNER_BYTES, &[b'x'; 1 << 10], 200);
    println!(
        "all windows full: {} MiB of {}",
        peak / MIB,
        RUNNER_BYTES / MIB
    );
    assert!(peak < RUNNER_BYTES / 4, "{peak}");
    assert_eq!(host.try_wait().unwrap(), None, "it lives");
    guest.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(host.wait().unwrap().success());
}

#[tokio::test]
async fn a_runner_has_the_limit_and_its_vmm_has_not() {
    let limit = |pid: u32| {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max data size"));
        line.unwrap().split_whitespace().next().unwrap().to_owned()
    };
    let mut place = Place::bare("up\n", Then::Halt);
    // The VMM that is asked what it can do has not, either: with the limit it would have no room for translated code, and
    // snapshots would be refused.
    place.spec.save_to = Some(place.home.path().join("unfinished").into_string());
    let runner = place.start().await;
    runner.state(MachineState::Booting).await;
    let vmm = runner.view().await.vmm_pid.unwrap();
    assert_eq!(
        limit(runner.process.id().unwrap()),
        RUNNER_BYTES.to_string()
    );
    assert_eq!(
        limit(vmm),
        limit(std::process::id()),
        "the guest's memory is the VMM's own"
    );
    runner.stop().await;
    runner.ended().await;
}

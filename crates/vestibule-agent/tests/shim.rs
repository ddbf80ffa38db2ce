//! The URL shims as tools start them: the real binary, under each of its names.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has failed"
)]
use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{fs::symlink, net::UnixListener},
    process::{Command, Output},
    thread,
};

/// Runs the binary as `name` with `args`; the agent answers with `answer` and hands back what it was asked.
fn run(name: &str, args: &[&str], answer: &'static str) -> (Output, String) {
    let dir = camino_tempfile::tempdir().unwrap();
    let (program, socket) = (dir.path().join(name), dir.path().join("shim.sock"));
    symlink(env!("CARGO_BIN_EXE_vestibule-agent"), &program).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    let agent = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        if !line.is_empty() {
            (&stream).write_all(answer.as_bytes()).unwrap();
        }
        line
    });
    let output = Command::new(&program)
        .args(args)
        .env_clear()
        .env("VESTIBULE_SHIM", &socket)
        .output()
        .unwrap();
    // Frees an agent that was never asked.
    drop(std::os::unix::net::UnixStream::connect(&socket));
    (output, agent.join().unwrap())
}

#[test]
fn every_name_hands_over_its_url_and_waits_for_the_answer() {
    for name in [
        "xdg-open",
        "sensible-browser",
        "x-www-browser",
        "www-browser",
        "open-url",
    ] {
        let (output, asked) = run(
            name,
            &["--new-window", "https://a.test/?x=\"1\"&y"],
            "{\"ok\":true}\n",
        );
        assert_eq!(output.status.code(), Some(0), "{name}");
        assert_eq!(asked, "{\"url\":\"https://a.test/?x=\\\"1\\\"&y\"}\n");
        assert!(output.stdout.is_empty() && output.stderr.is_empty());
    }
}

#[test]
fn a_refusal_is_a_failure_that_says_why_and_not_what() {
    let (output, _) = run(
        "xdg-open",
        &["https://evil.test/?code=SECRET"],
        "{\"ok\":false,\"why\":\"its host is not allowed\"}\n",
    );
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "open: refused: its host is not allowed\n"
    );
}

#[test]
fn without_a_url_or_an_agent_it_fails_at_once() {
    let (output, asked) = run("xdg-open", &["--version"], "");
    assert_eq!((output.status.code(), asked.as_str()), (Some(2), ""));
    let dir = camino_tempfile::tempdir().unwrap();
    let program = dir.path().join("open-url");
    symlink(env!("CARGO_BIN_EXE_vestibule-agent"), &program).unwrap();
    let output = Command::new(&program)
        .arg("https://a.test/?s=SECRET")
        .env("VESTIBULE_SHIM", dir.path().join("none"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(!String::from_utf8(output.stderr).unwrap().contains("SECRET"));
}

#[test]
fn roles_that_are_not_ours_to_play_are_refused() {
    let run = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_vestibule-agent"))
            .args(args)
            .output()
            .unwrap()
    };
    assert_eq!(run(&[]).status.code(), Some(2));
    assert_eq!(run(&["init"]).status.code(), Some(2));
    assert_eq!(run(&["nonsense"]).status.code(), Some(2));
}

//! The role `run-vm` and nothing else: a runner for this crate's own tests, as a process of its own.
use std::process::ExitCode;
use vestibule_api::error::Chain;
use vestibule_vm::{Prepared, memory};

#[tokio::main]
async fn main() -> ExitCode {
    let spec = match serde_json::from_reader(std::io::stdin().lock()) {
        Ok(spec) => spec,
        Err(err) => return fail(&err),
    };
    if let Err(err) = memory::limit(memory::RUNNER_BYTES) {
        return fail(&err);
    }
    match vestibule_vm::run(spec, Prepared::default()).await {
        Ok(_) => ExitCode::SUCCESS,
        Err(err) => fail(&err),
    }
}

#[expect(clippy::print_stderr, reason = "a program says why it failed")]
fn fail(err: &(dyn std::error::Error + 'static)) -> ExitCode {
    eprintln!("run-vm: {}", Chain(err));
    ExitCode::FAILURE
}

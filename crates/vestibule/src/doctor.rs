//! `vestibule doctor`: what this host can run.
use crate::{home::Home, output::Output};
use std::process::ExitCode;

pub(crate) fn run(home: &Home, out: Output) -> anyhow::Result<ExitCode> {
    let report = vestibule_vm::doctor(home.path());
    out.print(&report, ToString::to_string)?;
    Ok(if report.usable() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

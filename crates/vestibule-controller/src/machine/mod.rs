//! Machines from the controller's side: each runner's events are followed and become facts of the session, the login is
//! started through it, the credential is fetched through it, and in the end it is stopped and its evidence completed.
pub(crate) mod collect;
pub(crate) mod evidence;
pub(crate) mod follow;
#[cfg(any(test, fuzzing))]
pub mod hostile;
pub(crate) mod launch;
pub(crate) mod login;
mod receipt;
mod report;
pub(crate) mod teardown;

use vestibule_api::{
    cause::Cause,
    client::CallError,
    error::Chain,
    finding::{Finding, Quote},
};

/// Why an effect was not carried out now. It is tried again until the state's deadline.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EffectError {
    #[error("use the database")]
    Store(#[from] crate::store::StoreError),
    #[error("ask the runner")]
    Runner(#[from] CallError),
    #[error("the runner did not answer within {0} s")]
    Timeout(u64),
    #[error("the runner still lives")]
    StillAlive,
    #[error("write the evidence")]
    Evidence(#[from] crate::file::FileError),
    #[error("seal the credential")]
    Vault(#[from] vestibule_vault::PutError),
    #[error("remove the credential")]
    Remove(#[from] vestibule_vault::RemoveError),
    #[error("do it off the runtime")]
    Join(#[from] tokio::task::JoinError),
}

/// The runner ended without a word; its last words, where there were some, are the proof.
pub(crate) fn lost(quote: Quote) -> Finding {
    Finding::new(
        Cause::RunnerLost,
        quote,
        "the process that owned the VM is gone and wrote no end of its own",
        "start the sign-in again; read runner.stderr in the VM's evidence",
    )
    .refuted_by("the runner's socket answers, or its events end with `ended`")
    .retryable()
}

/// Time was over, and nobody was there.
pub(crate) fn person_left(quote: Quote) -> Finding {
    Finding::new(
        Cause::PersonLeft,
        quote,
        "nobody was watching when the time for the sign-in was over",
        "start the sign-in again and stay until it says completed",
    )
    .refuted_by("an open view at the deadline")
    .retryable()
}

/// A runner that did not do what it was asked.
pub(crate) fn refused(cause: Cause, err: &CallError, why: &str, fix: &str) -> Finding {
    let quote = Quote {
        source: "report".to_owned(),
        line: None,
        text: Chain(err).to_string(),
    };
    Finding::new(cause, quote, why, fix)
}

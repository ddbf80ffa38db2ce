//! Ends what sessions have on hosts that are lost, so that their people can start again. Such a host's own controller ends
//! the VMs when it comes back.
use super::ReconcileError;
use crate::core::Shared;
use vestibule_api::{
    cause::Cause,
    finding::{Finding, Quote},
};

pub(super) async fn run(core: &Shared) -> Result<u64, ReconcileError> {
    if !core.store.is_shared() {
        return Ok(0);
    }
    let after = core.config.cluster().lost_after();
    let mut ended = 0;
    for (machine, host) in core.store.machines_of_lost_hosts(after).await? {
        let quote = Quote {
            source: "database".to_owned(),
            line: None,
            text: format!(
                "the lease of host `{host}` ran out more than {} s ago",
                after.as_secs()
            ),
        };
        let finding = Finding::new(
            Cause::HostLost,
            quote,
            "the host that ran the VM, or its controller, does not answer any more",
            format!("start the sign-in again, it goes to another host; look at host `{host}` and at `vestibule host list`"),
        )
        .refuted_by("`vestibule host list` shows that the host's lease was renewed without a gap")
        .retryable();
        let now = core.now();
        let told = core.store.host_lost(machine, after, finding, now).await?;
        core.metrics.ingested(told.as_ref(), &[], now);
        if told.is_some() {
            tracing::error!(machine.id = %machine, host, "a session's host is lost");
            ended += 1;
        }
    }
    Ok(ended)
}

//! `[scheduler]`: who starts runners.
use camino::Utf8PathBuf;
use serde::Deserialize;
use url::Url;

/// Who starts runners, and restarts what fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// The controller, as processes of this host.
    #[default]
    Local,
    Nomad,
    Kubernetes,
}

/// `[scheduler]`. With an engine, a runner is a job, or a pod, on the node whose controller places the VM.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SchedulerConfig {
    pub engine: EngineKind,
    /// A job of Nomad, or a pod of Kubernetes, in JSON, from which each runner's is made (`deploy/`).
    pub template: Option<Utf8PathBuf>,
    /// This node, as the engine knows it: Nomad's node id, or Kubernetes' `kubernetes.io/hostname`. None: the environment
    /// variable `VESTIBULE_NODE`.
    pub node: Option<String>,
    /// The engine's API. None: `NOMAD_ADDR` or `http://127.0.0.1:4646`; in a pod, the cluster's own.
    pub address: Option<String>,
    /// A file with the token that the API is shown, read anew for each request. None: in a pod, the service account's.
    pub token_file: Option<Utf8PathBuf>,
    /// Certificate authorities of the API in PEM. None: in a pod, the cluster's; else the public ones.
    pub ca_file: Option<Utf8PathBuf>,
    /// None: `default`; in a pod, the pod's own.
    pub namespace: Option<String>,
}

impl SchedulerConfig {
    /// The first key with a value that can't be, and what was expected there.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let wrong = |key: &str, what: &str| Err((format!("scheduler.{key}"), what.to_owned()));
        if self.engine == EngineKind::Local {
            return Ok(());
        }
        if self.template.is_none() {
            return wrong(
                "template",
                "missing; expected a file such as those in `deploy/`",
            );
        }
        if let Some(address) = &self.address
            && !Url::parse(address).is_ok_and(|url| matches!(url.scheme(), "http" | "https"))
        {
            return wrong("address", "expected `https://name:port`");
        }
        Ok(())
    }
}

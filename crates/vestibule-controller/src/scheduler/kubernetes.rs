//! Runners as pods of Kubernetes (its API, kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1). Three
//! requests; `kube` would bring 48 crates for them.
use super::engine::{self, Api, Engine, EngineError, Job, Status, name};
use crate::config::SchedulerConfig;
use camino::{Utf8Path, Utf8PathBuf};
use futures_util::{FutureExt as _, future::BoxFuture};
use reqwest::Method;
use serde_json::{Value, json};
use vestibule_api::ids::MachineId;

/// Where a pod finds what its service account is known by.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// `AlreadyExists`.
const CONFLICT: u16 = 409;

#[derive(Debug)]
pub(super) struct Kubernetes {
    api: Api,
    namespace: String,
    node: String,
    template: Value,
}

impl Kubernetes {
    pub(super) fn new(config: &SchedulerConfig) -> Result<Self, EngineError> {
        let in_pod = |name: &str| {
            let path = Utf8Path::new(ACCOUNT).join(name);
            path.exists().then_some(path)
        };
        let address = config.address.clone().or_else(|| {
            let host = std::env::var("KUBERNETES_SERVICE_HOST").ok()?;
            let port = std::env::var("KUBERNETES_SERVICE_PORT").ok()?;
            // An IPv6 address stands in brackets (RFC 3986, section 3.2.2).
            let host = if host.contains(':') {
                format!("[{host}]")
            } else {
                host
            };
            Some(format!("https://{host}:{port}"))
        });
        let own: Option<Utf8PathBuf> = in_pod("namespace");
        let own = own.and_then(|path| std::fs::read_to_string(path).ok());
        let namespace = config
            .namespace
            .clone()
            .or_else(|| own.map(|text| text.trim().to_owned()));
        let kubernetes = Self {
            api: Api::new(
                &address.ok_or(EngineError::Address)?,
                config.token_file.clone().or_else(|| in_pod("token")),
                config
                    .ca_file
                    .clone()
                    .or_else(|| in_pod("ca.crt"))
                    .as_deref(),
                ("Authorization", "Bearer "),
            )?,
            namespace: namespace.unwrap_or_else(|| "default".to_owned()),
            node: engine::node(config)?,
            template: engine::template(config)?,
        };
        // What is wrong with the template is said at the start.
        let (id, spec) = (MachineId::generate(), "spec.json".into());
        kubernetes.pod(&Job {
            id,
            spec,
            memory_mib: 1,
        })?;
        Ok(kubernetes)
    }

    fn pod(&self, job: &Job<'_>) -> Result<Value, EngineError> {
        let mut made = self.template.clone();
        let metadata = engine::object(&mut made, "", "metadata")?;
        metadata.remove("generateName");
        metadata.insert("name".to_owned(), json!(name(job.id)));
        metadata.insert("namespace".to_owned(), json!(self.namespace));
        engine::object(&mut made, "/metadata", "labels")?
            .insert("vestibule/machine".to_owned(), json!(job.id));
        // A VM's memory does not outlive its runner.
        engine::at(&mut made, "/spec")?["restartPolicy"] = json!("Never");
        // By its name, as a DaemonSet's pods are: the label `kubernetes.io/hostname` may differ from it.
        let here = json!({ "key": "metadata.name", "operator": "In", "values": [self.node] });
        engine::object(&mut made, "/spec", "affinity")?;
        engine::object(&mut made, "/spec/affinity", "nodeAffinity")?.insert(
            "requiredDuringSchedulingIgnoredDuringExecution".to_owned(),
            json!({ "nodeSelectorTerms": [{ "matchFields": [here] }] }),
        );
        engine::at(&mut made, "/spec/containers/0")?["args"] =
            json!(["run-vm", "--spec", job.spec]);
        engine::object(&mut made, "/spec/containers/0", "resources")?;
        for bound in ["requests", "limits"] {
            engine::object(&mut made, "/spec/containers/0/resources", bound)?
                .insert("memory".to_owned(), json!(format!("{}Mi", job.memory_mib)));
        }
        Ok(made)
    }

    fn path(&self, id: MachineId) -> String {
        format!("/api/v1/namespaces/{}/pods/{}", self.namespace, name(id))
    }
}

/// Why a pod came to its end.
fn words(pod: &Value) -> String {
    let status = &pod["status"];
    let containers = status["containerStatuses"].as_array().into_iter().flatten();
    let ended =
        containers.flat_map(|one| [&one["state"]["terminated"], &one["lastState"]["terminated"]]);
    let ended = ended.flat_map(|ended| [&ended["reason"], &ended["message"]]);
    let said = [&status["phase"], &status["reason"], &status["message"]]
        .into_iter()
        .chain(ended);
    let said: Vec<_> = said.filter_map(Value::as_str).collect();
    let text = format!("kubernetes: pod {}", said.join(": "));
    text.chars()
        .filter(|c| !c.is_control())
        .take(2000)
        .collect()
}

impl Engine for Kubernetes {
    fn submit<'a>(&'a self, job: &'a Job<'a>) -> BoxFuture<'a, Result<(), EngineError>> {
        async move {
            let pod = self.pod(job)?;
            let path = format!("/api/v1/namespaces/{}/pods", self.namespace);
            match self
                .api
                .call("make the runner's pod", Method::POST, &path, Some(&pod))
                .await
            {
                Ok(Some(_))
                | Err(EngineError::Refused {
                    status: CONFLICT, ..
                }) => Ok(()),
                Ok(None) => Err(EngineError::Refused {
                    what: "make the runner's pod",
                    status: 404,
                    text: format!("there is no namespace `{}`", self.namespace),
                }),
                Err(err) => Err(err),
            }
        }
        .boxed()
    }

    fn status(&self, id: MachineId) -> BoxFuture<'_, Result<Status, EngineError>> {
        async move {
            let path = self.path(id);
            let found = self
                .api
                .call("ask for the runner's pod", Method::GET, &path, None)
                .await?;
            Ok(match found {
                None => Status::Absent,
                Some(pod) => match pod["status"]["phase"].as_str() {
                    Some("Succeeded" | "Failed") => Status::Over(words(&pod)),
                    // `Unknown`: the node does not answer; nobody is declared dead unseen.
                    Some(_) | None => Status::Live,
                },
            })
        }
        .boxed()
    }

    fn remove(&self, id: MachineId) -> BoxFuture<'_, Result<(), EngineError>> {
        async move {
            let path = format!("{}?gracePeriodSeconds=0", self.path(id));
            let done = self
                .api
                .call("remove the runner's pod", Method::DELETE, &path, None);
            done.await.map(drop)
        }
        .boxed()
    }
}

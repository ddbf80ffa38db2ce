//! Runners as batch jobs of Nomad (its HTTP API, developer.hashicorp.com/nomad/api-docs/jobs).
use super::engine::{self, Api, Engine, EngineError, Job, Status, name};
use crate::config::SchedulerConfig;
use futures_util::{FutureExt as _, future::BoxFuture};
use reqwest::Method;
use serde_json::{Value, json};
use vestibule_api::ids::MachineId;

#[derive(Debug)]
pub(super) struct Nomad {
    api: Api,
    namespace: String,
    node: String,
    /// The object of a job.
    template: Value,
}

impl Nomad {
    pub(super) fn new(config: &SchedulerConfig) -> Result<Self, EngineError> {
        let address = config
            .address
            .clone()
            .or_else(|| std::env::var("NOMAD_ADDR").ok());
        let address = address.unwrap_or_else(|| "http://127.0.0.1:4646".to_owned());
        let mut template = engine::template(config)?;
        // `nomad job run -output` writes the job into an object.
        if let Some(job) = template.get_mut("Job") {
            template = job.take();
        }
        let nomad = Self {
            api: Api::new(
                &address,
                config.token_file.clone(),
                config.ca_file.as_deref(),
                ("X-Nomad-Token", ""),
            )?,
            namespace: config
                .namespace
                .clone()
                .unwrap_or_else(|| "default".to_owned()),
            node: engine::node(config)?,
            template,
        };
        // What is wrong with the template is said at the start.
        let (id, spec) = (MachineId::generate(), "spec.json".into());
        nomad.job(&Job {
            id,
            spec,
            memory_mib: 1,
        })?;
        Ok(nomad)
    }

    fn job(&self, job: &Job<'_>) -> Result<Value, EngineError> {
        let mut made = self.template.clone();
        let own = name(job.id);
        {
            let made = made.as_object_mut().ok_or(EngineError::Template("Job"))?;
            made.insert("ID".to_owned(), json!(own));
            made.insert("Name".to_owned(), json!(own));
            made.insert("Namespace".to_owned(), json!(self.namespace));
            made.insert("Type".to_owned(), json!("batch"));
            let constraints = made.entry("Constraints").or_insert_with(|| json!([]));
            if constraints.is_null() {
                *constraints = json!([]);
            }
            let here =
                json!({ "LTarget": "${node.unique.id}", "Operand": "=", "RTarget": self.node });
            let constraints = constraints.as_array_mut();
            constraints
                .ok_or(EngineError::Template("Constraints"))?
                .push(here);
        }
        engine::object(&mut made, "", "Meta")?.insert("machine".to_owned(), json!(job.id));
        // A VM's memory does not outlive its runner: there is nothing to restart, here or elsewhere.
        engine::object(&mut made, "/TaskGroups/0", "RestartPolicy")?.extend([
            ("Attempts".to_owned(), json!(0)),
            ("Mode".to_owned(), json!("fail")),
        ]);
        engine::object(&mut made, "/TaskGroups/0", "ReschedulePolicy")?.extend([
            ("Attempts".to_owned(), json!(0)),
            ("Unlimited".to_owned(), json!(false)),
        ]);
        engine::object(&mut made, "/TaskGroups/0/Tasks/0", "Config")?
            .insert("args".to_owned(), json!(["run-vm", "--spec", job.spec]));
        engine::object(&mut made, "/TaskGroups/0/Tasks/0", "Resources")?
            .insert("MemoryMB".to_owned(), json!(job.memory_mib));
        Ok(made)
    }

    fn path(&self, id: MachineId, more: &str) -> String {
        format!("/v1/job/{}{more}namespace={}", name(id), self.namespace)
    }

    /// Why a job that is over came to its end, as its newest allocation says it.
    async fn words(&self, id: MachineId) -> Result<String, EngineError> {
        let path = self.path(id, "/allocations?");
        let found = self.api.call(
            "ask Nomad for the runner's allocations",
            Method::GET,
            &path,
            None,
        );
        let found = found.await?.unwrap_or_default();
        let newest = found.as_array().into_iter().flatten();
        let newest = newest.max_by_key(|one| one["CreateIndex"].as_u64());
        let Some(newest) = newest else {
            return Ok("nomad: the job was given no allocation".to_owned());
        };
        let states = newest["TaskStates"].as_object().into_iter().flatten();
        let events = states.flat_map(|(_, state)| state["Events"].as_array().into_iter().flatten());
        let events: Vec<_> = events
            .filter_map(|event| event["DisplayMessage"].as_str())
            .collect();
        let status = newest["ClientStatus"].as_str().unwrap_or("unknown");
        let text = format!("nomad: allocation {status}: {}", events.join("; "));
        Ok(text
            .chars()
            .filter(|c| !c.is_control())
            .take(2000)
            .collect())
    }
}

impl Engine for Nomad {
    fn submit<'a>(&'a self, job: &'a Job<'a>) -> BoxFuture<'a, Result<(), EngineError>> {
        async move {
            let body = json!({ "Job": self.job(job)? });
            let path = format!("/v1/jobs?namespace={}", self.namespace);
            // To register the same job once more changes nothing.
            let done = self.api.call(
                "register the runner's job",
                Method::POST,
                &path,
                Some(&body),
            );
            done.await.map(drop)
        }
        .boxed()
    }

    fn status(&self, id: MachineId) -> BoxFuture<'_, Result<Status, EngineError>> {
        async move {
            let path = self.path(id, "?");
            let found = self
                .api
                .call("ask Nomad for the runner's job", Method::GET, &path, None);
            Ok(match found.await? {
                None => Status::Absent,
                Some(job) if job["Status"] == "dead" => Status::Over(self.words(id).await?),
                Some(_) => Status::Live,
            })
        }
        .boxed()
    }

    fn remove(&self, id: MachineId) -> BoxFuture<'_, Result<(), EngineError>> {
        async move {
            let path = self.path(id, "?purge=true&");
            let done = self
                .api
                .call("remove the runner's job", Method::DELETE, &path, None);
            done.await.map(drop)
        }
        .boxed()
    }
}

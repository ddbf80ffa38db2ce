//! Both engines against servers that speak their APIs, with the replies that these document; the servers really run what they are
//! given, as far as a lock shows it. Neither was tried with a real engine.
use super::*;
use axum::{
    Json, Router,
    extract::{Path, Request, State},
    http::StatusCode as Status_,
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fs::File,
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Mutex},
};

/// What a server was given, and whether it runs.
#[derive(Debug)]
struct Given {
    job: Value,
    /// The lock of `run-vm --spec`, as long as it runs.
    lock: Option<File>,
    ended: bool,
}

#[derive(Debug, Default)]
struct Cluster {
    jobs: Mutex<BTreeMap<String, Given>>,
    /// Jobs wait for room.
    full: Mutex<bool>,
    broken: Mutex<bool>,
    removed: Mutex<Vec<String>>,
}

type Shared = Arc<Cluster>;

impl Cluster {
    /// Runs what `args` say, unless there is no room.
    fn run(&self, name: &str, job: Value, args: &Value) {
        let args: Vec<_> = args
            .as_array()
            .unwrap()
            .iter()
            .map(|a| a.as_str().unwrap())
            .collect();
        let ["run-vm", "--spec", path] = args[..] else {
            panic!("{args:?}")
        };
        let spec: VmSpec = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o777, 0o600);
        let lock = (!*self.full.lock().unwrap()).then(|| {
            let path = Utf8Path::new(&spec.vm_dir).join("runner.stderr");
            let file = File::options()
                .create(true)
                .append(true)
                .open(path)
                .unwrap();
            file.try_lock().unwrap();
            file
        });
        let given = Given {
            job,
            lock,
            ended: false,
        };
        self.jobs.lock().unwrap().insert(name.to_owned(), given);
    }

    fn end(&self, name: &str) {
        let mut jobs = self.jobs.lock().unwrap();
        let given = jobs.get_mut(name).unwrap();
        (given.lock, given.ended) = (None, true);
    }

    fn job(&self, name: &str) -> Value {
        self.jobs.lock().unwrap()[name].job.clone()
    }

    /// A job's field, as the engine shows it.
    fn show(&self, name: &str, [waits, runs, over]: [&str; 3]) -> Option<String> {
        let jobs = self.jobs.lock().unwrap();
        let given = jobs.get(name)?;
        let word = match given {
            Given { ended: true, .. } => over,
            Given { lock: Some(_), .. } => runs,
            Given { .. } => waits,
        };
        Some(word.to_owned())
    }

    fn remove(&self, name: &str) -> bool {
        self.removed.lock().unwrap().push(name.to_owned());
        self.jobs.lock().unwrap().remove(name).is_some()
    }
}

/// Refuses whoever does not show the token.
async fn guarded(
    State((cluster, token)): State<(Shared, &'static str)>,
    request: Request,
    next: Next,
) -> Response {
    if *cluster.broken.lock().unwrap() {
        return (
            Status_::INTERNAL_SERVER_ERROR,
            "rpc error: No cluster leader",
        )
            .into_response();
    }
    let shown = ["x-nomad-token", "authorization"];
    let shown = shown
        .iter()
        .find_map(|name| request.headers().get(*name)?.to_str().ok());
    if shown == Some(token) {
        next.run(request).await
    } else {
        (Status_::FORBIDDEN, "Permission denied").into_response()
    }
}

async fn serve(router: Router<Shared>, token: &'static str) -> (Shared, SocketAddr) {
    let cluster = Shared::default();
    let guard = middleware::from_fn_with_state((Arc::clone(&cluster), token), guarded);
    let router = router.layer(guard).with_state(Arc::clone(&cluster));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    (cluster, address)
}

/// developer.hashicorp.com/nomad/api-docs/jobs: *Create Job*, *Read Job*, *List Job Allocations*, *Stop a Job*.
async fn nomad() -> (Shared, SocketAddr) {
    async fn register(State(cluster): State<Shared>, Json(body): Json<Value>) -> Json<Value> {
        let job = body["Job"].clone();
        let name = job["ID"].as_str().unwrap().to_owned();
        let args = job["TaskGroups"][0]["Tasks"][0]["Config"]["args"].clone();
        if cluster.show(&name, ["", "", ""]).is_none() {
            cluster.run(&name, job, &args);
        }
        Json(
            json!({ "EvalID": "d092fdc0-e1fd-2536-67d8-43af8ca798ac", "EvalCreateIndex": 35, "JobModifyIndex": 34,
                     "Warnings": "", "Index": 35, "LastContact": 0, "KnownLeader": false }),
        )
    }
    async fn read(State(cluster): State<Shared>, Path(name): Path<String>) -> Response {
        match cluster.show(&name, ["pending", "running", "dead"]) {
            None => (Status_::NOT_FOUND, "job not found").into_response(),
            Some(status) => Json(
                json!({ "ID": name, "Status": status, "StatusDescription": "", "Stop": false,
                                         "Type": "batch", "Version": 0 }),
            )
            .into_response(),
        }
    }
    async fn allocations(State(cluster): State<Shared>, Path(name): Path<String>) -> Json<Value> {
        let status = cluster.show(&name, ["pending", "running", "failed"]);
        let events = json!([{ "Type": "Received", "DisplayMessage": "Task received by client" },
                            { "Type": "Driver Failure", "DisplayMessage": "failed to launch command: no such file" }]);
        Json(
            json!([{ "ID": "a8198d79-cfdb-6593-a999-1e9adabcba2e", "ClientStatus": status, "CreateIndex": 54,
                      "TaskStates": { "runner": { "State": "dead", "Failed": true, "Events": events } } }]),
        )
    }
    async fn stop(State(cluster): State<Shared>, Path(name): Path<String>) -> Response {
        if cluster.remove(&name) {
            Json(json!({ "EvalID": "", "EvalCreateIndex": 0, "JobModifyIndex": 57, "Index": 0 }))
                .into_response()
        } else {
            (Status_::NOT_FOUND, "job not found").into_response()
        }
    }
    let router = Router::new()
        .route("/v1/jobs", post(register))
        .route("/v1/job/{name}", get(read).delete(stop))
        .route("/v1/job/{name}/allocations", get(allocations));
    serve(router, "t0ken").await
}

/// kubernetes.io/docs/reference: *Pod v1 core*, and `Status` of an error.
async fn kubernetes() -> (Shared, SocketAddr) {
    fn status(code: u16, reason: &str) -> Response {
        let body = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                           "message": format!("pods: {reason}"), "reason": reason, "code": code });
        (Status_::from_u16(code).unwrap(), Json(body)).into_response()
    }
    async fn create(
        State(cluster): State<Shared>,
        Path(space): Path<String>,
        Json(pod): Json<Value>,
    ) -> Response {
        assert_eq!(pod["metadata"]["namespace"], space);
        let name = pod["metadata"]["name"].as_str().unwrap().to_owned();
        if cluster.show(&name, ["", "", ""]).is_some() {
            return status(409, "AlreadyExists");
        }
        let args = pod["spec"]["containers"][0]["args"].clone();
        cluster.run(&name, pod.clone(), &args);
        (Status_::CREATED, Json(pod)).into_response()
    }
    async fn read(
        State(cluster): State<Shared>,
        Path((_, name)): Path<(String, String)>,
    ) -> Response {
        let Some(phase) = cluster.show(&name, ["Pending", "Running", "Failed"]) else {
            return status(404, "NotFound");
        };
        let ended = json!({ "terminated": { "exitCode": 137, "reason": "OOMKilled", "startedAt": null, "finishedAt": null } });
        let containers =
            json!([{ "name": "runner", "ready": false, "restartCount": 0, "state": ended }]);
        Json(
            json!({ "kind": "Pod", "apiVersion": "v1", "metadata": { "name": name },
                     "status": { "phase": phase, "containerStatuses": containers } }),
        )
        .into_response()
    }
    async fn delete(
        State(cluster): State<Shared>,
        Path((_, name)): Path<(String, String)>,
    ) -> Response {
        if cluster.remove(&name) {
            Json(json!({ "kind": "Pod", "apiVersion": "v1" })).into_response()
        } else {
            status(404, "NotFound")
        }
    }
    let router = Router::new()
        .route("/api/v1/namespaces/{space}/pods", post(create))
        .route(
            "/api/v1/namespaces/{space}/pods/{name}",
            get(read).delete(delete),
        );
    serve(router, "Bearer t0ken").await
}

struct Set {
    home: camino_tempfile::Utf8TempDir,
    cluster: Shared,
    scheduler: Arc<Engined>,
}

impl Set {
    async fn new(kind: EngineKind) -> Self {
        let home = camino_tempfile::tempdir().unwrap();
        let token = home.path().join("engine-token");
        std::fs::write(&token, "t0ken\n").unwrap();
        let (template, (cluster, address)) = match kind {
            EngineKind::Nomad => ("nomad/run-vm.json", nomad().await),
            EngineKind::Kubernetes => ("kubernetes/run-vm.json", kubernetes().await),
            EngineKind::Local => unreachable!(),
        };
        let template = format!("{}/../../deploy/{template}", env!("CARGO_MANIFEST_DIR"));
        let config = SchedulerConfig {
            engine: kind,
            template: Some(template.into()),
            node: Some("node-1".to_owned()),
            address: Some(format!("http://{address}")),
            token_file: Some(token),
            ca_file: None,
            namespace: Some("sign-ins".to_owned()),
        };
        let engine = of(&config).unwrap().unwrap();
        let scheduler = Engined::new(home.path().to_owned(), engine, Handle::current());
        Self {
            home,
            cluster,
            scheduler: Arc::new(scheduler),
        }
    }

    fn spec(&self) -> VmSpec {
        crate::scheduler::tests::spec(self.home.path())
    }

    /// As the controller calls it: off the runtime's threads.
    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Engined) -> T + Send + 'static,
    ) -> T {
        let scheduler = Arc::clone(&self.scheduler);
        tokio::task::spawn_blocking(move || work(&scheduler))
            .await
            .unwrap()
    }

    async fn launch(&self, spec: &VmSpec) -> Result<(), LaunchError> {
        let spec = spec.clone();
        self.call(move |scheduler| scheduler.launch(&spec)).await
    }

    async fn alive(&self, id: MachineId) -> bool {
        self.call(move |scheduler| scheduler.alive(id)).await
    }
}

async fn a_life(kind: EngineKind, over: &str) -> Value {
    let set = Set::new(kind).await;
    let spec = set.spec();
    let (id, name) = (spec.machine_id, format!("vestibule-vm-{}", spec.machine_id));
    assert!(!set.alive(id).await);
    // It waits for its place, and lives; twice is once.
    *set.cluster.full.lock().unwrap() = true;
    set.launch(&spec).await.unwrap();
    assert!(set.alive(id).await, "it waits");
    set.launch(&spec).await.unwrap();
    assert_eq!(set.cluster.jobs.lock().unwrap().len(), 1);
    // An engine that does not answer says nothing about anybody.
    *set.cluster.broken.lock().unwrap() = true;
    assert!(set.alive(id).await);
    let refused = set.launch(&set.spec()).await.unwrap_err();
    let refused = Chain(&refused).to_string();
    assert!(
        refused.contains("500") && refused.contains("No cluster leader"),
        "{refused}"
    );
    *set.cluster.broken.lock().unwrap() = false;
    // It ends before it ran: what the engine says is kept.
    set.cluster.end(&name);
    assert!(!set.alive(id).await);
    let kept = std::fs::read_to_string(Utf8Path::new(&spec.vm_dir).join("runner.stderr")).unwrap();
    assert!(kept.contains(over), "{kept}");
    set.call(move |scheduler| scheduler.forget(id)).await;
    assert!(set.cluster.jobs.lock().unwrap().is_empty());

    // One that runs; the lock says so, whatever the engine says.
    *set.cluster.full.lock().unwrap() = false;
    let spec = set.spec();
    let (id, name) = (spec.machine_id, format!("vestibule-vm-{}", spec.machine_id));
    set.launch(&spec).await.unwrap();
    *set.cluster.broken.lock().unwrap() = true;
    assert!(set.alive(id).await);
    *set.cluster.broken.lock().unwrap() = false;
    let job = set.cluster.job(&name);
    set.call(move |scheduler| scheduler.kill(id)).await;
    assert!(!set.alive(id).await);
    set.call(move |scheduler| scheduler.forget(id)).await;
    assert_eq!(set.cluster.removed.lock().unwrap().last(), Some(&name));
    job
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runner_is_a_job_of_nomad() {
    let job = a_life(
        EngineKind::Nomad,
        "nomad: allocation failed: Task received by client; failed to launch",
    )
    .await;
    let here = json!({ "LTarget": "${node.unique.id}", "Operand": "=", "RTarget": "node-1" });
    assert!(
        job["Constraints"].as_array().unwrap().contains(&here),
        "{job}"
    );
    let group = &job["TaskGroups"][0];
    assert_eq!(
        (
            &group["RestartPolicy"]["Attempts"],
            &group["ReschedulePolicy"]["Attempts"]
        ),
        (&json!(0), &json!(0))
    );
    assert_eq!(
        group["Tasks"][0]["Resources"]["MemoryMB"],
        2048 + OVERHEAD_MIB
    );
    assert_eq!(
        (&job["Type"], &job["Namespace"]),
        (&json!("batch"), &json!("sign-ins"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runner_is_a_pod_of_kubernetes() {
    let pod = a_life(EngineKind::Kubernetes, "kubernetes: pod Failed: OOMKilled").await;
    let required =
        &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    let field = &required["nodeSelectorTerms"][0]["matchFields"][0];
    assert_eq!(
        (&field["key"], &field["values"]),
        (&json!("metadata.name"), &json!(["node-1"]))
    );
    assert_eq!(pod["spec"]["restartPolicy"], "Never");
    let memory = format!("{}Mi", 2048 + OVERHEAD_MIB);
    let resources = &pod["spec"]["containers"][0]["resources"];
    assert_eq!(
        (
            &resources["requests"]["memory"],
            &resources["limits"]["memory"]
        ),
        (&json!(memory), &json!(memory))
    );
}

#[tokio::test]
async fn what_is_wrong_with_the_configuration_is_said_at_the_start() {
    let home = camino_tempfile::tempdir().unwrap();
    let template = home.path().join("template.json");
    let engine = |kind, node: Option<&str>| {
        let config = SchedulerConfig {
            engine: kind,
            template: Some(template.clone()),
            node: node.map(str::to_owned),
            address: Some("http://127.0.0.1:1".to_owned()),
            ..SchedulerConfig::default()
        };
        Chain(&of(&config).unwrap_err()).to_string()
    };
    for kind in [EngineKind::Nomad, EngineKind::Kubernetes] {
        assert!(engine(kind, Some("n")).contains("template.json"));
        std::fs::write(&template, "{}").unwrap();
        let said = engine(kind, Some("n"));
        assert!(
            said.contains("TaskGroups") || said.contains("spec"),
            "{said}"
        );
        assert!(engine(kind, None).contains(NODE));
        std::fs::remove_file(&template).unwrap();
    }
}

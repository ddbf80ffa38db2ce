//! Every body that the driver can send, held against Firecracker's own OpenAPI documents: of the oldest version that is
//! supported and of the newest known. The documents are read from the folder of shared data beside the checkout, or from
//! the one that `VESTIBULE_DATA` names, which must have them.
//!
//! The documents do not say it, and Firecracker does it: an unknown field is an error (Firecracker fact 1). So each object
//! that lists its properties is closed before anything is validated.
use super::{
    api::{Api, ApiError},
    request::{self, BackendType, Boot, MemoryBackend, Request, Restore},
    version::Version,
};
use axum::{Router, body::Bytes, http::Uri};
use camino::{Utf8Path, Utf8PathBuf};
use hyper::{Method, StatusCode};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use tokio::net::UnixListener;
use yaml_rust2::{Yaml, YamlLoader};

/// Document and version.
const DOCUMENTS: [(&str, Version); 2] = [
    ("firecracker-v1.12.1.yaml", Version::new(1, 12, 1)),
    ("firecracker-v1.16.1.yaml", Version::new(1, 16, 1)),
];

/// One OpenAPI document, closed.
struct Document(Value);

impl Document {
    /// None, with a printed reason, where the shared data is not on this machine.
    fn read(name: &str) -> Option<Self> {
        let beside = Utf8PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
        let named = std::env::var("VESTIBULE_DATA").ok().map(Utf8PathBuf::from);
        let path = named.as_ref().unwrap_or(&beside).join(name);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(err) if err.kind() == std::io::ErrorKind::NotFound && named.is_none() => {
                println!("skipped: there is no `{path}`; VESTIBULE_DATA says where it is");
                return None;
            }
            Err(err) => panic!("read `{path}`: {err}"),
        };
        let parsed = YamlLoader::load_from_str(&text).unwrap();
        let mut document = json_of(&parsed[0]);
        close(&mut document);
        Some(Self(document))
    }

    /// What is wrong with `body` as the body of this request; nothing where it is valid.
    fn wrong(&self, method: &Method, path: &str, body: &Value) -> Vec<String> {
        let template = match path.strip_prefix("/drives/") {
            Some(_) => "/drives/{drive_id}",
            None => path,
        };
        let operation = &self.0["paths"][template][method.as_str().to_lowercase()];
        let Some(parameters) = operation["parameters"].as_array() else {
            return vec![format!("the document has no {method} {template}")];
        };
        let body_of = parameters.iter().find(|one| one["in"] == "body").unwrap();
        let mut schema = body_of["schema"].clone();
        schema["definitions"] = self.0["definitions"].clone();
        let validator = jsonschema::draft4::new(&schema).unwrap();
        validator
            .iter_errors(body)
            .map(|err| format!("{method} {path}: {err} at `{}`", err.instance_path()))
            .collect()
    }

    fn wrong_request(&self, request: &Request) -> Vec<String> {
        self.wrong(&request.method(), &request.path(), &request.body().unwrap())
    }
}

fn json_of(yaml: &Yaml) -> Value {
    match yaml {
        Yaml::Real(text) => json!(text.parse::<f64>().unwrap()),
        Yaml::Integer(number) => json!(number),
        Yaml::String(text) => json!(text),
        Yaml::Boolean(truth) => json!(truth),
        Yaml::Array(items) => items.iter().map(json_of).collect(),
        Yaml::Hash(entries) => {
            // A status stands as a number.
            let key = |key: &Yaml| match key.as_i64() {
                Some(number) => number.to_string(),
                None => key.as_str().unwrap().to_owned(),
            };
            let entries = entries.iter().map(|(k, v)| (key(k), json_of(v)));
            Value::Object(entries.collect::<Map<_, _>>())
        }
        Yaml::Null | Yaml::BadValue | Yaml::Alias(_) => Value::Null,
    }
}

/// Lets no object have a property that it does not list.
fn close(value: &mut Value) {
    match value {
        Value::Object(object) => {
            if object.get("type") == Some(&json!("object")) && object.contains_key("properties") {
                object.insert("additionalProperties".into(), json!(false));
            }
            object.values_mut().for_each(close);
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Every request that the driver sends to this version, with every choice that changes one.
fn all(version: Version) -> Vec<Request> {
    let mut requests = vec![request::metrics()];
    requests.extend(request::boot(&Boot {
        vcpus: 2,
        memory_mib: 512,
        cmdline: String::from("console=ttyS0"),
    }));
    for backend_type in [BackendType::File, BackendType::Uffd] {
        let restore = Restore {
            state: String::from("/proc/self/fd/7"),
            memory: MemoryBackend {
                backend_type,
                backend_path: String::from("/memory"),
            },
        };
        requests.push(request::restore(version.features(), &restore));
    }
    requests.extend(request::save("/memory"));
    requests.extend([request::resume(), request::flush_metrics()]);
    requests
}

#[test]
fn every_body_is_what_each_version_takes() {
    for (name, version) in DOCUMENTS {
        let Some(document) = Document::read(name) else {
            return;
        };
        assert_eq!(document.0["info"]["version"], version.to_string());
        let requests = all(version);
        let wrong: Vec<_> = requests
            .iter()
            .flat_map(|request| document.wrong_request(request))
            .collect();
        assert!(wrong.is_empty(), "{version}: {wrong:#?}");
        println!("{version}: {} bodies are valid", requests.len());
    }
}

#[test]
fn what_a_version_does_not_know_is_refused() {
    let Some(oldest) = Document::read(DOCUMENTS[0].0) else {
        return;
    };
    let newest = DOCUMENTS[1].1;
    let unknown: Vec<_> = all(newest)
        .iter()
        .flat_map(|request| oldest.wrong_request(request))
        .collect();
    let named = |wrong: &String| {
        wrong.starts_with("PUT /snapshot/load") && wrong.contains("vsock_override")
    };
    assert!(
        !unknown.is_empty() && unknown.iter().all(named),
        "{unknown:#?}"
    );
}

#[test]
fn the_validation_sees_what_is_wrong() {
    let Some(document) = Document::read(DOCUMENTS[1].0) else {
        return;
    };
    let put = |path: &str, body: Value| document.wrong(&Method::PUT, path, &body);
    let machine = json!({ "vcpu_count": 2, "mem_size_mib": 512 });
    assert_eq!(put("/machine-config", machine), Vec::<String>::new());
    for (path, body) in [
        ("/machine-config", json!({ "vcpu_count": 2 })),
        (
            "/machine-config",
            json!({ "vcpu_count": 33, "mem_size_mib": 512 }),
        ),
        (
            "/machine-config",
            json!({ "vcpu_count": "2", "mem_size_mib": 512 }),
        ),
        ("/vsock", json!({ "guest_cid": 2, "uds_path": "s" })),
        ("/actions", json!({ "action_type": "Explode" })),
        ("/entropy", json!({ "rate": 1 })),
        (
            "/snapshot/load",
            json!({ "snapshot_path": "s", "mem_backend": { "backend_type": "Tape", "backend_path": "m" } }),
        ),
        (
            "/snapshot/load",
            json!({ "snapshot_path": "s", "mem_backend": { "backend_type": "File", "backend_path": "m", "more": 1 } }),
        ),
        ("/no-such-resource", json!({})),
    ] {
        assert!(!put(path, body.clone()).is_empty(), "{path} {body}");
    }
}

/// A server that answers as a Firecracker of that version does: it refuses what its document does not have, in words.
fn serve(document: Document, version: Version, socket: &Utf8Path) {
    let document = Arc::new(document);
    let answer = move |method: Method, uri: Uri, body: Bytes| {
        let document = Arc::clone(&document);
        async move {
            if uri.path() == "/version" {
                let body = json!({ "firecracker_version": version.to_string() });
                return (StatusCode::OK, body.to_string());
            }
            let body = serde_json::from_slice(&body).unwrap();
            let wrong = document.wrong(&method, uri.path(), &body);
            match wrong.as_slice() {
                [] => (StatusCode::NO_CONTENT, String::new()),
                [..] => {
                    let fault = json!({ "fault_message": wrong.join("; ") });
                    (StatusCode::BAD_REQUEST, fault.to_string())
                }
            }
        }
    };
    let listener = UnixListener::bind(socket).unwrap();
    let server = axum::serve(listener, Router::new().fallback(answer));
    tokio::spawn(server.into_future());
}

#[tokio::test]
async fn each_version_takes_what_the_client_sends_and_the_oldest_refuses_the_newest_ones() {
    let newest = DOCUMENTS[1].1;
    for (name, version) in DOCUMENTS {
        let Some(document) = Document::read(name) else {
            return;
        };
        let home = camino_tempfile::tempdir().unwrap();
        let socket = home.path().join("api.sock");
        serve(document, version, &socket);
        let api = Api::new(socket);
        assert_eq!(api.version().await.unwrap(), version);
        for request in all(version) {
            api.send(&request).await.unwrap();
        }
        let mut refused = Vec::new();
        for request in all(newest) {
            if let Err(err) = api.send(&request).await {
                refused.push(err);
            }
        }
        assert_eq!(refused.is_empty(), version == newest, "{refused:?}");
        let named = |err: &ApiError| {
            matches!(err, ApiError::Refused { status, fault, .. }
                if *status == StatusCode::BAD_REQUEST && fault.contains("vsock_override"))
        };
        assert!(refused.iter().all(named), "{refused:?}");
    }
}

/// A VMM that hangs, or was taken over, accepts and says nothing.
#[tokio::test(start_paused = true)]
async fn a_server_that_accepts_and_stays_silent_is_given_up() {
    let home = camino_tempfile::tempdir().unwrap();
    let socket = home.path().join("api.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let api = Api::new(socket);
    for request in all(DOCUMENTS[1].1) {
        let err = api.send(&request).await.unwrap_err();
        assert!(
            matches!(err, ApiError::Silent { limit, .. } if limit == request.limit()),
            "{err}"
        );
    }
    assert!(matches!(api.version().await, Err(ApiError::Silent { .. })));
}

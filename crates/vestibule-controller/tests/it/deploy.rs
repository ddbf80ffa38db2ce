//! The health checks of the manifests in `deploy/`, sent as the engines send them.
use crate::{
    support::home::Home,
    tls::{certificate, config},
};
use reqwest::{Certificate, Client, StatusCode, header};
use std::net::SocketAddr;
use yaml_rust2::{Yaml, YamlLoader};

/// A node's address, as the engine asks it: what the Host header is where the manifest says nothing.
const NODE: &str = "192.0.2.7:4443";

/// What an engine asks a controller, to know how it is.
#[derive(Clone, Debug)]
struct Probe {
    name: String,
    /// Of the manifest.
    port: String,
    path: String,
    host: Option<String>,
    /// Whether the certificate may be anybody's.
    any_certificate: bool,
}

impl Probe {
    /// The status that a controller answers at this address, whose certificate has `root`. The manifest's port becomes its own.
    async fn ask(&self, address: SocketAddr, root: &[u8]) -> reqwest::Result<StatusCode> {
        let host = self.host.as_deref().unwrap_or(NODE);
        let name = host.strip_suffix(&format!(":{}", self.port));
        let name = name.unwrap_or_else(|| panic!("{}: {host} is not on {}", self.name, self.port));
        let client = Client::builder().no_proxy();
        let client = if self.any_certificate {
            client.tls_danger_accept_invalid_certs(true)
        } else {
            client.tls_certs_only([Certificate::from_der(root)?])
        };
        let request = client
            .build()?
            .get(format!("https://{address}{}", self.path))
            .header(header::HOST, format!("{name}:{}", address.port()));
        Ok(request.send().await?.status())
    }
}

fn manifest(name: &str) -> String {
    let path = format!("{}/../../deploy/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).unwrap()
}

/// The probes of the DaemonSet's container. The kubelet checks no certificate
/// (kubernetes.io/docs/tasks/configure-pod-container/configure-liveness-readiness-startup-probes).
fn kubernetes() -> Vec<Probe> {
    let documents = YamlLoader::load_from_str(&manifest("kubernetes/controller.yaml")).unwrap();
    let set = documents
        .iter()
        .find(|document| document["kind"].as_str() == Some("DaemonSet"))
        .unwrap();
    let container = &set["spec"]["template"]["spec"]["containers"][0];
    let named = |list: &Yaml, name: &Yaml| {
        let mut entries = list.as_vec().unwrap().iter();
        entries.find(|entry| entry["name"] == *name).cloned()
    };
    ["startupProbe", "livenessProbe", "readinessProbe"]
        .map(|name| {
            let get = &container[name]["httpGet"];
            assert_eq!(get["scheme"].as_str(), Some("HTTPS"), "{name}");
            let port = named(&container["ports"], &get["port"]).unwrap();
            let host = Yaml::String("Host".to_owned());
            let host = named(&get["httpHeaders"], &host).unwrap();
            Probe {
                name: name.to_owned(),
                port: port["containerPort"].as_i64().unwrap().to_string(),
                path: get["path"].as_str().unwrap().to_owned(),
                host: host["value"].as_str().map(str::to_owned),
                any_certificate: true,
            }
        })
        .into()
}

/// What stands between the braces after the first `head`.
fn block<'a>(text: &'a str, head: &str) -> &'a str {
    let (_, rest) = text.split_once(&format!("{head} {{")).unwrap();
    let mut depth = 1;
    let end = rest.find(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        depth == 0
    });
    &rest[..end.unwrap()]
}

/// The value of a key in a block, without quotes.
fn value(block: &str, key: &str) -> Option<String> {
    let mut pairs = block.lines().filter_map(|line| line.split_once('='));
    let (_, value) = pairs.find(|(found, _)| found.trim() == key)?;
    let quotes = |c: char| matches!(c, '"' | '[' | ']' | ' ');
    Some(value.trim_matches(quotes).to_owned())
}

/// The check of the job's service (developer.hashicorp.com/nomad/docs/job-specification/check).
fn nomad() -> Probe {
    let job = manifest("nomad/controller.nomad.hcl");
    let check = block(&job, "check");
    assert_eq!(value(check, "type").as_deref(), Some("http"));
    assert_eq!(value(check, "protocol").as_deref(), Some("https"));
    Probe {
        name: "check".to_owned(),
        port: value(block(&job, r#"port "https""#), "static").unwrap(),
        path: value(check, "path").unwrap(),
        host: value(block(check, "header"), "Host"),
        any_certificate: value(check, "tls_skip_verify").as_deref() == Some("true"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_engines_ask_is_answered() {
    let mut home = Home::new();
    let root = certificate(home.path());
    home.configure(&config(&home));
    let controller = home.serve().await;
    let address = controller.serving.address;
    let nomad = nomad();
    for probe in kubernetes().into_iter().chain([nomad.clone()]) {
        let status = probe.ask(address, &root).await;
        assert_eq!(status.unwrap(), StatusCode::OK, "{probe:?}");
    }

    // What would be refused: the test asks as an engine does, and sees it.
    let token = Probe {
        path: "/ready".to_owned(),
        ..nomad.clone()
    };
    let status = token.ask(address, &root).await.unwrap();
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    let by_address = Probe {
        host: None,
        ..nomad.clone()
    };
    let status = by_address.ask(address, &root).await.unwrap();
    assert_eq!(status, StatusCode::FORBIDDEN);
    let strict = Probe {
        any_certificate: false,
        ..nomad
    };
    let refused = strict.ask(address, &root).await.unwrap_err();
    assert!(refused.is_connect(), "{refused:?}");
    controller.stop().await;
}

/// What a runner's pod shares with the others of its node has the same path in it: images and evidence, and the locks by which
/// each VM has a user that no other VM has.
#[test]
fn pods_of_one_node_share_their_locks() {
    let pod: serde_json::Value = serde_json::from_str(&manifest("kubernetes/run-vm.json")).unwrap();
    let spec = &pod["spec"];
    let mounts = spec["containers"][0]["volumeMounts"].as_array().unwrap();
    let shared: Vec<_> = mounts
        .iter()
        .map(|mount| {
            let volumes = spec["volumes"].as_array().unwrap();
            let volume = volumes.iter().find(|one| one["name"] == mount["name"]);
            let on_node = &volume.unwrap()["hostPath"]["path"];
            assert_eq!(*on_node, mount["mountPath"], "{mount}");
            on_node.as_str().unwrap()
        })
        .collect();
    assert_eq!(shared, ["/var/lib/vestibule", "/run/vestibule/uids"]);
}

//! Every operation of the document × role × whose object it is about, answered as the table of rights says.
use crate::{
    lifecycle::{FILE, SECRET},
    support::{api::Api, home::Home, people::Person, wait_for},
};
use camino::Utf8Path;
use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use vestibule_api::{
    ids::{CredentialId, MachineId, SessionId},
    people::Role,
    session::{SessionState, StartReply},
};
use vestibule_controller::{Access, Reach, Right, rights, rights_table};

/// Whose objects somebody asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Own,
    /// A colleague's, of the same organisation.
    Near,
    /// Of another organisation.
    Far,
}

/// One of each, made by one sign-in.
struct Objects {
    session: SessionId,
    machine: MachineId,
    credential: CredentialId,
}

/// A sign-in of `owner` that has completed, with what is left of it.
async fn objects(home: &Home, api: &Api, owner: &str) -> Objects {
    let start = json!({ "provider": "codex", "owner": owner });
    let reply = api.post("/api/auth/start", &start).await;
    assert_eq!(reply.status(), StatusCode::CREATED, "{owner}");
    let session = reply.json::<StartReply>().await.unwrap().session_id;
    let machine = api.machine(session).await;
    let runner = home.runner(machine).await;
    runner.up();
    api.until(session, SessionState::AwaitingUser).await;
    runner.capture(FILE, SECRET);
    let view = api.until(session, SessionState::Completed).await;
    let evidence = home.evidence(machine);
    wait_for("the evidence", || async {
        evidence.join("verdict.json").exists().then_some(())
    })
    .await;
    Objects {
        session,
        machine,
        credential: view.credential_id.unwrap(),
    }
}

/// The operations of the document, as the table has them; what ends something or somebody comes last.
async fn operations(api: &Api) -> Vec<Right> {
    let document = api.json("/api/openapi.json").await;
    let mut known = rights();
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let id = operation["operationId"].as_str().unwrap();
            let at = known.iter().position(|right| {
                right.operation == id
                    && right.path == path
                    && right.method.eq_ignore_ascii_case(method)
            });
            let at = at
                .unwrap_or_else(|| panic!("{method} {path} ({id}) is not in the table of rights"));
            found.push(known.swap_remove(at));
        }
    }
    assert!(known.is_empty(), "not in the document: {known:?}");
    found.sort_by_key(|right| (right.operation == "logout", right.method == "DELETE"));
    found
}

fn concrete(right: &Right, objects: &Objects) -> String {
    let id = match right.object {
        Some("session") => objects.session.to_string(),
        Some("machine") => objects.machine.to_string(),
        Some("credential") => objects.credential.to_string(),
        Some(other) => panic!("an object of a kind that this test does not make: {other}"),
        None => SessionId::generate().to_string(),
    };
    right
        .path
        .replace("{id}", &id)
        .replace("{sessionId}", &id)
        .replace("{file}", "verdict.json")
        .replace("{name}", "nobody")
}

/// What comes of a request: its status, and the message of an error without the ids in it.
async fn ask(person: &Person, right: &Right, path: &str) -> (StatusCode, String) {
    let method: Method = right.method.parse().unwrap();
    let request = person.request(method.clone(), path);
    let request = if method == Method::GET {
        request
    } else {
        request.json(&json!({}))
    };
    let reply = request.send().await.unwrap();
    let status = reply.status();
    if status.is_success() {
        return (status, String::new());
    }
    let body: Value = reply.json().await.unwrap_or_default();
    let message = body["error"]["message"].as_str().unwrap_or_default();
    let id = path.split('/').find(|part| part.len() == 36).unwrap_or("-");
    (status, message.replace(id, "ID"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_answers_each_role_as_the_table_says() {
    let home = Home::with(
        "confirm_account = 'never'\n[limits]\nvms = 64\nlive_per_user = 0\n[pool]\nbrowser = 0\n",
    );
    let controller = home.serve().await;
    let api = &controller.api;
    for name in ["acme", "umbra"] {
        api.organisation(name).await;
    }
    api.user("near", "signer", Some("acme")).await;
    api.user("far", "signer", Some("umbra")).await;
    let operations = operations(api).await;
    let mut tried = BTreeSet::new();
    for role in Role::ALL {
        let organisation = (role != Role::Admin).then_some("acme");
        let person = api.user(role.id(), role.id(), organisation).await;
        let made = [
            (Whose::Own, role.id()),
            (Whose::Near, "near"),
            (Whose::Far, "far"),
        ]
        .map(async |(whose, owner)| (whose, objects(&home, api, owner).await));
        let made = join_all(made).await;
        for right in &operations {
            for (whose, objects) in &made {
                let place = format!("{} {} as {role}, {whose:?}", right.method, right.path);
                let got = ask(&person, right, &concrete(right, objects)).await;
                check(right, role, *whose, &got, &place);
                if let (Some(_), StatusCode::NOT_FOUND) = (right.object, got.0)
                    && *whose != Whose::Own
                {
                    let none = Objects {
                        session: SessionId::generate(),
                        machine: MachineId::generate(),
                        credential: CredentialId::generate(),
                    };
                    let nothing = ask(&person, right, &concrete(right, &none)).await;
                    assert_eq!(got, nothing, "{place}: as if it had never been");
                }
                tried.insert((right.operation, role.id()));
                if right.object.is_none() {
                    break;
                }
            }
        }
    }
    assert_eq!(tried.len(), operations.len() * Role::ALL.len());
    controller.stop().await;
}

fn check(right: &Right, role: Role, whose: Whose, got: &(StatusCode, String), place: &str) {
    let (status, message) = got;
    let refused = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN];
    let reach = match &right.access {
        // What is wrong with an empty body is for the handler to say.
        Access::Open => return assert_ne!(*status, StatusCode::FORBIDDEN, "{place}"),
        Access::HomeToken => return assert_eq!(*status, StatusCode::FORBIDDEN, "{place}"),
        Access::Roles { reach, .. } => reach.iter().find(|(of, _)| *of == role).unwrap().1,
    };
    let confined = role != Role::Admin;
    let reached = match reach {
        Reach::None => return assert_eq!(*status, StatusCode::FORBIDDEN, "{place}"),
        Reach::All if confined => return assert_eq!(*status, StatusCode::FORBIDDEN, "{place}"),
        Reach::Own => whose == Whose::Own,
        Reach::Organisation => whose != Whose::Far,
        Reach::All | Reach::Yes => true,
    };
    if right.object.is_some() && !reached {
        assert_eq!(*status, StatusCode::NOT_FOUND, "{place}: {message}");
    } else {
        assert!(!refused.contains(status), "{place}: {status} {message}");
        // A handler may miss a file of the evidence, but not the object itself.
        let hidden = [
            "there is no session ID",
            "there is no VM ID",
            "there is no credential ID",
        ];
        assert!(!hidden.contains(&message.as_str()), "{place}: {message}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_show_what_is_within_reach() {
    let home = Home::with("confirm_account = 'never'\n[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    let api = &controller.api;
    for name in ["acme", "umbra"] {
        api.organisation(name).await;
    }
    let signer = api.user("ada", "signer", Some("acme")).await;
    api.user("near", "signer", Some("acme")).await;
    api.user("far", "signer", Some("umbra")).await;
    let operator = api.user("olga", "operator", Some("acme")).await;
    let (platform, _) = api.service("platform", "operator", None).await;
    let mut made = Vec::new();
    for owner in ["ada", "near", "far"] {
        made.push(objects(&home, api, owner).await);
    }
    let count = async |reply: reqwest::Response| {
        let list: Value = reply.json().await.unwrap();
        list.as_array().unwrap().len()
    };
    for (path, of_signer) in [
        ("/api/sessions", Some(1)),
        ("/api/credentials", Some(1)),
        ("/api/vms?all=1", None),
    ] {
        if let Some(expected) = of_signer {
            assert_eq!(count(signer.get(path).await).await, expected, "{path}");
        }
        assert_eq!(count(operator.get(path).await).await, 2, "{path}");
        assert_eq!(
            count(platform.get(path).await).await,
            3,
            "{path}, of no organisation"
        );
        assert_eq!(count(api.get(path).await).await, 3, "{path}, local admin");
    }
    let me: Value = signer.get("/api/me").await.json().await.unwrap();
    assert_eq!(
        (&me["name"], &me["role"], &me["organisation"]),
        (&json!("ada"), &json!("signer"), &json!("acme"))
    );
    let may = |operation: &str| {
        me["operations"]
            .as_array()
            .unwrap()
            .contains(&json!(operation))
    };
    assert!(
        may("start") && may("confirm") && !may("vms") && !may("credentialContent") && !may("users")
    );
    controller.stop().await;
}

/// What is of the whole installation is for whoever is confined to no part of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_of_no_organisation_sees_the_installation() {
    let home = Home::with("[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    let api = &controller.api;
    api.organisation("acme").await;
    let free = api.user("free", "operator", None).await;
    let confined = api.user("confined", "operator", Some("acme")).await;
    let (platform, _) = api.service("platform", "operator", None).await;
    let (branch, _) = api.service("branch", "operator", Some("acme")).await;
    let of_all = |right: &Right| match &right.access {
        Access::Roles { reach, .. } => reach.contains(&(Role::Operator, Reach::All)),
        Access::Open | Access::HomeToken => false,
    };
    let mut tried = BTreeSet::new();
    for right in rights().into_iter().filter(of_all) {
        assert_eq!(right.method, "GET", "{}: try it too", right.path);
        for (who, reply) in [
            ("a person", free.get(right.path).await),
            ("a program", platform.get(right.path).await),
        ] {
            assert_eq!(reply.status(), StatusCode::OK, "{who} {}", right.path);
            assert!(
                !reply.text().await.unwrap().is_empty(),
                "{who} {}",
                right.path
            );
        }
        for (who, reply) in [
            ("a person", confined.get(right.path).await),
            ("a program", branch.get(right.path).await),
        ] {
            assert_eq!(
                reply.status(),
                StatusCode::FORBIDDEN,
                "{who} {}",
                right.path
            );
        }
        tried.insert(right.path);
    }
    for path in ["/metrics", "/api/hosts", "/api/reconcilers"] {
        assert!(tried.contains(path), "{path}");
    }
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_in_disguise_is_none() {
    let home = Home::with("[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let id = api.start("codex").await.to_string();
    let signer = api.user("ada", "signer", None).await;
    // The first digit as an escape: the handler would read it as the id.
    let escaped = format!("%3{}{}", &id[..1], &id[1..]);
    for path in [
        format!("/api/auth/session/{escaped}"),
        format!("/api/auth/session/{escaped}/events"),
    ] {
        assert_eq!(
            signer.get(&path).await.status(),
            StatusCode::BAD_REQUEST,
            "{path}"
        );
    }
    for same in [
        id.clone(),
        id.to_uppercase(),
        id.replace('-', ""),
        format!("{{{id}}}"),
    ] {
        let reply = signer.get(&format!("/api/auth/session/{same}")).await;
        let status = reply.status();
        assert!(
            matches!(status, StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST),
            "{same}: {status}"
        );
    }
    controller.stop().await;
}

const BEGIN: &str = "<!-- rights: begin -->\n";
const END: &str = "<!-- rights: end -->";

#[test]
fn the_documented_table_is_the_codes() {
    let path = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/security.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text
        .split_once(BEGIN)
        .expect("docs/security.md has a place for the table");
    let (_, after) = rest.split_once(END).unwrap();
    let expected = format!("{before}{BEGIN}{}{END}{after}", rights_table());
    if std::env::var_os("VESTIBULE_UPDATE").is_some() {
        std::fs::write(&path, &expected).unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(
        text == expected,
        "docs/security.md is not the code's: run this test with VESTIBULE_UPDATE=1"
    );
}

//! What people may do holds at two controllers alike: what is taken back at one, and what both count together.
use crate::{
    cluster::{Hosts, on_a, session_path},
    lifecycle::signing_in,
    support::{
        PATIENCE,
        api::{Api, Socket, bytes, closed},
        people::code,
    },
};
use futures_util::{SinkExt as _, StreamExt as _, future::join_all};
use reqwest::{Method, StatusCode};
use serde_json::json;
use std::time::Duration;
use tokio_tungstenite::tungstenite::Message;
use vestibule_api::session::{CloseCode, Right};

/// Code with which a view is closed, within a second.
async fn closed_at_once(view: &mut Socket) -> u16 {
    let closed = tokio::time::timeout(Duration::from_secs(1), closed(view)).await;
    closed.expect("it is still open").0
}

/// Whatever is taken back at one controller is closed at the other, wherever the VM is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_revoked_at_one_is_closed_at_the_other_within_a_second() {
    let hosts = Hosts::new("", "");
    let (a, b) = on_a(&hosts).await;
    let revoked = CloseCode::Revoked as u16;
    for (at, other) in [(&a.api, &b.api), (&b.api, &a.api)] {
        let name = format!("watcher-{}", at.address.port());
        let (watcher, token) = at.service(&name, "operator", None).await;
        let by = |api: &Api| Api::new(api.address, &watcher.token);
        let (id, _runner) = signing_in(&hosts.a, &by(&a.api)).await;
        let there = by(other);
        let bystander = signing_in(&hosts.a, &a.api).await.0;
        let mut bystander = other.view(bystander, Right::View).await;
        assert!(bytes(&mut bystander).await.is_some());
        let delete = async |path: String| {
            let reply = at.request(Method::DELETE, &path).send().await.unwrap();
            assert_eq!(reply.status(), StatusCode::NO_CONTENT, "{path}");
        };

        let mut view = there.view(id, Right::View).await;
        assert!(bytes(&mut view).await.is_some());
        let unused = there.ticket(id, Right::View).await;
        delete(session_path(id, "/tickets")).await;
        assert_eq!(closed_at_once(&mut view).await, revoked, "by the session");
        let mut late = there.socket(id, "view", &unused).await;
        let code = closed_at_once(&mut late).await;
        assert_eq!(code, CloseCode::BadTicket as u16, "nor does a ticket open");

        let mut view = there.view(id, Right::View).await;
        let ticket = there.ticket(id, Right::View).await;
        let mut terminal = there.socket(id, "terminal", &ticket).await;
        assert!(bytes(&mut view).await.is_some() && bytes(&mut terminal).await.is_some());
        delete(format!("/api/tokens/{token}")).await;
        assert_eq!(closed_at_once(&mut view).await, revoked, "by the token");
        assert_eq!(closed_at_once(&mut terminal).await, revoked);

        // What is somebody else's stays open.
        bystander.send(Message::Ping("p".into())).await.unwrap();
        let heard = tokio::time::timeout(PATIENCE, bystander.next()).await;
        let pong = heard.unwrap().unwrap().unwrap();
        assert_eq!(pong, Message::Pong("p".into()));
    }
    a.stop().await;
    b.stop().await;
}

/// A quota counts what every controller has started, also while many ask all of them at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quotas_hold_for_both_together() {
    let limits = "[limits]\nlive_per_user = 2\nlive_per_organisation = 5\nstarts_per_minute = 0\nwaiting = 100";
    let hosts = Hosts::new("", limits);
    let (a, b) = (hosts.a.serve().await, hosts.b.serve().await);
    // How many of these were made; the others were told that the quota is full.
    let made = async |starts: Vec<(Api, String)>| {
        let all = starts.iter().map(async |(api, user)| {
            let wanted = json!({ "provider": "codex", "userId": user });
            let reply = api.post("/api/auth/start", &wanted).await;
            let made = reply.status() == StatusCode::CREATED;
            if !made {
                assert_eq!(reply.status(), StatusCode::TOO_MANY_REQUESTS, "{user}");
                assert_eq!(code(reply).await, "quota_exceeded");
            }
            made
        });
        let all = join_all(all).await;
        all.into_iter().filter(|made| *made).count()
    };
    for round in 0..3 {
        let acme = format!("acme{round}");
        a.api.organisation(&acme).await;
        let mut tokens = Vec::new();
        for i in 0..4 {
            let name = format!("t{round}-{i}");
            let (platform, _) = a.api.service(&name, "operator", Some(&acme)).await;
            tokens.push(platform.token);
        }
        let at_both = |token: &String, user: &str| {
            let of = |api: &Api| (Api::new(api.address, token), user.to_owned());
            [of(&a.api), of(&b.api)]
        };
        let one = (0..6).flat_map(|_| at_both(&tokens[0], "one"));
        assert_eq!(made(one.collect()).await, 2, "of one user");
        // Each by another token and for another user: nothing but the organisation is the same.
        let every = tokens.iter().flat_map(|token| at_both(token, "other"));
        assert_eq!(made(every.collect()).await, 3, "of one organisation");
        let organisations = b.api.json("/api/organisations").await;
        let own = organisations.as_array().unwrap().iter();
        let live = own.filter(|one| one["name"] == acme.as_str());
        let live: Vec<_> = live.map(|one| one["live"].clone()).collect();
        assert_eq!(live, [5], "{organisations}");
    }
    a.stop().await;
    b.stop().await;
}

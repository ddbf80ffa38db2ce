//! Screen and terminal: tickets, rights, limits, and every close with a code and a reason.
use crate::{
    lifecycle::{nothing_left, signing_in},
    support::{
        api::{Api, bytes, closed},
        home::Home,
        runner::Runner,
        wait_for,
    },
};
use futures_util::{SinkExt as _, StreamExt as _};
use reqwest::{StatusCode, header};
use std::sync::{Arc, atomic::Ordering};
use tokio_tungstenite::tungstenite::{self, Message, client::IntoClientRequest as _};
use vestibule_api::{
    ids::SessionId,
    session::{CloseCode, Right},
};

const HELLO: &[u8] = b"RFB 003.008\n\x01\x01";
const KEY: [u8; 8] = [4, 1, 0, 0, 0, 0, 0, 0x41];
const UPDATE: [u8; 10] = [3, 0, 0, 0, 0, 0, 4, 0, 3, 0];

fn binary(bytes: &[u8]) -> Message {
    Message::Binary(bytes.to_vec().into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_passes_everything_and_view_passes_no_input() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    for old in [false, true] {
        let (id, runner) = signing_in(&home, api).await;
        runner.old.store(old, Ordering::Relaxed);
        control_and_view(api, id, &runner).await;
        api.cancel(id).await;
    }
    controller.stop().await;
}

async fn control_and_view(api: &Api, id: SessionId, runner: &Arc<Runner>) {
    let sent = |expected: Vec<u8>| {
        let runner = runner.clone();
        async move {
            wait_for("the guest to hear it", || async {
                let heard = runner.rfb.lock().unwrap().clone();
                (heard.len() >= expected.len()).then_some(heard)
            })
            .await
        }
    };
    let mut control = api.view(id, Right::Control).await;
    assert_eq!(bytes(&mut control).await.unwrap(), b"RFB 003.008\n");
    let all = [HELLO, &KEY, &UPDATE].concat();
    control.send(binary(&all)).await.unwrap();
    assert_eq!(sent(all.clone()).await, all);
    control.close(None).await.unwrap();

    runner.rfb.lock().unwrap().clear();
    let mut view = api.view(id, Right::View).await;
    assert_eq!(bytes(&mut view).await.unwrap(), b"RFB 003.008\n");
    for byte in &all {
        view.send(binary(&[*byte])).await.unwrap();
    }
    let expected = [HELLO, &UPDATE].concat();
    assert_eq!(sent(expected.clone()).await, expected, "no key");
    view.send(binary(b"\x63 is no message")).await.unwrap();
    assert_eq!(closed(&mut view).await.0, CloseCode::Protocol as u16);

    let mut text = api.view(id, Right::Control).await;
    text.send(Message::text("hello")).await.unwrap();
    assert_eq!(closed(&mut text).await.0, CloseCode::Protocol as u16);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_opens_one_view_of_one_session() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, _) = signing_in(&home, api).await;
    let (other, _) = signing_in(&home, api).await;
    let bad = CloseCode::BadTicket as u16;
    let ticket = api.ticket(id, Right::View).await;
    let mut first = api.socket(id, "view", &ticket).await;
    assert!(bytes(&mut first).await.is_some());
    let mut again = api.socket(id, "view", &ticket).await;
    let (code, reason) = closed(&mut again).await;
    assert!(code == bad && reason.contains("ticket"), "{code} {reason}");
    let ticket = api.ticket(id, Right::View).await;
    assert_eq!(
        closed(&mut api.socket(other, "view", &ticket).await)
            .await
            .0,
        bad,
        "for another session"
    );
    for none in ["", "nonsense"] {
        assert_eq!(
            closed(&mut api.socket(id, "terminal", none).await).await.0,
            bad
        );
    }
    // Without an upgrade the ticket opens nothing; with a foreign page behind it neither.
    let path = format!(
        "/api/auth/session/{id}/view?ticket={}",
        api.ticket(id, Right::View).await
    );
    let reply = api.bare(reqwest::Method::GET, &path).send().await.unwrap();
    assert_eq!(reply.status(), StatusCode::UNAUTHORIZED);
    let mut request = format!("ws://{}{path}", api.address)
        .into_client_request()
        .unwrap();
    request
        .headers_mut()
        .insert(header::ORIGIN, "http://evil.example".parse().unwrap());
    match tokio_tungstenite::connect_async(request).await {
        Err(tungstenite::Error::Http(reply)) => assert_eq!(reply.status(), StatusCode::FORBIDDEN),
        other => panic!("a foreign page got {other:?}"),
    }
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn second_viewers_watch_along_up_to_the_limit() {
    let home = Home::with("[limits]\nviewers = 2\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, _) = signing_in(&home, api).await;
    let mut first = api.view(id, Right::Control).await;
    let mut second = api.view(id, Right::View).await;
    assert!(bytes(&mut first).await.is_some() && bytes(&mut second).await.is_some());
    let (code, reason) = closed(&mut api.view(id, Right::View).await).await;
    assert!(code == CloseCode::TooManyViewers as u16 && !reason.is_empty());
    second.close(None).await.unwrap();
    wait_for("the place of the second", || async {
        let mut next = api.view(id, Right::View).await;
        bytes(&mut next).await
    })
    .await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn views_end_with_a_reason() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;

    let early = api.start("codex").await;
    home.runner(api.machine(early).await).await;
    assert_eq!(
        closed(&mut api.view(early, Right::View).await).await.0,
        CloseCode::NotReady as u16
    );

    let (id, _) = signing_in(&home, api).await;
    let mut view = api.view(id, Right::Control).await;
    assert!(bytes(&mut view).await.is_some());
    let unused = api.ticket(id, Right::View).await;
    api.cancel(id).await;
    let (code, reason) = closed(&mut view).await;
    assert!(
        code == CloseCode::SessionEnded as u16 && reason.contains("cancelled"),
        "{code} {reason}"
    );
    assert_eq!(
        closed(&mut api.socket(id, "view", &unused).await).await.0,
        CloseCode::SessionEnded as u16
    );

    let (id, runner) = signing_in(&home, api).await;
    let mut view = api.view(id, Right::Control).await;
    assert!(bytes(&mut view).await.is_some());
    runner.die();
    let (code, reason) = closed(&mut view).await;
    let gone = [
        CloseCode::MachineGone as u16,
        CloseCode::SessionEnded as u16,
    ];
    assert!(
        gone.contains(&code) && !reason.is_empty(),
        "{code} {reason}"
    );

    let (id, _) = signing_in(&home, api).await;
    let mut view = api.view(id, Right::Control).await;
    let mut terminal = api
        .socket(id, "terminal", &api.ticket(id, Right::View).await)
        .await;
    assert!(bytes(&mut view).await.is_some() && bytes(&mut terminal).await.is_some());
    let (stopped, view, terminal) =
        tokio::join!(controller.stop(), closed(&mut view), closed(&mut terminal));
    let () = stopped;
    assert_eq!([view.0, terminal.0], [CloseCode::GoingAway as u16; 2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_terminal_takes_keys_only_with_control() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, runner) = signing_in(&home, api).await;
    let resize = r#"{"type":"resize","cols":80,"rows":24}"#;
    let mut view = api
        .socket(id, "terminal", &api.ticket(id, Right::View).await)
        .await;
    assert_eq!(bytes(&mut view).await.unwrap(), b"right=view");
    view.send(binary(b"rm -rf")).await.unwrap();
    view.send(Message::text(resize)).await.unwrap();
    let mut control = api
        .socket(id, "terminal", &api.ticket(id, Right::Control).await)
        .await;
    assert_eq!(bytes(&mut control).await.unwrap(), b"right=control");
    control.send(Message::text(resize)).await.unwrap();
    control.send(binary(b"ls\r")).await.unwrap();
    assert_eq!(bytes(&mut control).await.unwrap(), b"ls\r");
    assert_eq!(
        *runner.terminal.lock().unwrap(),
        [resize, "ls\r"],
        "nothing of the viewer without control"
    );
    api.cancel(id).await;
    assert_eq!(closed(&mut control).await.0, CloseCode::SessionEnded as u16);
    nothing_left(&home).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_viewer_slows_the_guest_and_loses_nothing() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    for old in [false, true] {
        let (id, runner) = signing_in(&home, api).await;
        runner.old.store(old, Ordering::Relaxed);
        let mut view = api.view(id, Right::Control).await;
        assert!(bytes(&mut view).await.is_some());
        view.send(Message::Ping("p".into())).await.unwrap();
        assert_eq!(
            view.next().await.unwrap().unwrap(),
            Message::Pong("p".into())
        );
        view.send(binary(b"POUR")).await.unwrap();
        let mut total = 0;
        while total < 32 << 20 {
            let frame = bytes(&mut view).await.expect("all of it arrives");
            assert!(frame.len() <= 1 << 20 && frame.iter().all(|byte| *byte == 0x5a));
            total += frame.len();
        }
        assert_eq!(total, 32 << 20);
        // An end amid the stream comes after a whole frame, with its reason.
        view.send(binary(b"POUR")).await.unwrap();
        assert!(bytes(&mut view).await.is_some());
        view.send(Message::text("not RFB")).await.unwrap();
        assert_eq!(closed(&mut view).await.0, CloseCode::Protocol as u16);
        wait_for("the bytes to be counted", || async {
            let text = api.get("/metrics").await.text().await.unwrap();
            let line = text.lines().find(|line| {
                line.starts_with("vestibule_relayed_bytes_total") && line.contains("ToViewer")
            })?;
            let bytes: u64 = line.rsplit_once(' ')?.1.parse().ok()?;
            (bytes >= 32 << 20).then_some(())
        })
        .await;
        api.cancel(id).await;
    }
    controller.stop().await;
}

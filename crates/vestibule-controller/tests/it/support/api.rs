//! The controller's API as a client sees it.
use super::{PATIENCE, wait_for};
use futures_util::StreamExt as _;
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};
use std::net::SocketAddr;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest as _},
};
use vestibule_api::{
    ids::{MachineId, SessionId},
    session::{Right, SessionEvent, SessionState, SessionView, StartReply, TicketReply},
};

pub(crate) type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) address: SocketAddr,
    pub(crate) token: String,
    http: reqwest::Client,
}

impl Api {
    pub(crate) fn new(address: SocketAddr, token: &str) -> Self {
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(PATIENCE)
            .build()
            .unwrap();
        Self {
            address,
            token: token.to_owned(),
            http,
        }
    }

    /// A request without a token.
    pub(crate) fn bare(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http
            .request(method, format!("http://{}{path}", self.address))
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.bare(method, path).bearer_auth(&self.token)
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        self.request(Method::GET, path).send().await.unwrap()
    }

    pub(crate) async fn json(&self, path: &str) -> Value {
        let reply = self.get(path).await;
        assert_eq!(reply.status(), StatusCode::OK, "{path}");
        reply.json().await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Response {
        self.request(Method::POST, path)
            .json(body)
            .send()
            .await
            .unwrap()
    }

    pub(crate) async fn start(&self, provider: &str) -> SessionId {
        let reply = self
            .post("/api/auth/start", &json!({ "provider": provider }))
            .await;
        assert_eq!(reply.status(), StatusCode::CREATED);
        reply.json::<StartReply>().await.unwrap().session_id
    }

    pub(crate) async fn session(&self, id: SessionId) -> SessionView {
        let reply = self.get(&format!("/api/auth/session/{id}")).await;
        assert_eq!(reply.status(), StatusCode::OK);
        reply.json().await.unwrap()
    }

    /// Waits until the session is in `state`.
    pub(crate) async fn until(&self, id: SessionId, state: SessionState) -> SessionView {
        wait_for(&format!("state {state:?}"), || async {
            let view = self.session(id).await;
            let over = view.state.is_terminal() && view.state != state;
            assert!(
                !over,
                "waiting for {state:?}, but it is {:?}: {:?}",
                view.state, view.failure
            );
            (view.state == state).then_some(view)
        })
        .await
    }

    pub(crate) async fn machine(&self, id: SessionId) -> MachineId {
        wait_for("the session's VM", || async {
            self.session(id).await.machine_id
        })
        .await
    }

    pub(crate) async fn cancel(&self, id: SessionId) -> SessionView {
        let reply = self
            .post(&format!("/api/auth/session/{id}/cancel"), &json!({}))
            .await;
        assert_eq!(reply.status(), StatusCode::OK);
        reply.json().await.unwrap()
    }

    /// The events after `after`, until the stream ends or `enough` says so.
    pub(crate) async fn events(
        &self,
        id: SessionId,
        after: u64,
        enough: impl Fn(&[SessionEvent]) -> bool,
    ) -> Vec<SessionEvent> {
        let path = format!("/api/auth/session/{id}/events");
        let request = self
            .request(Method::GET, &path)
            .header("last-event-id", after.to_string());
        let reply = request.send().await.unwrap();
        assert_eq!(reply.status(), StatusCode::OK);
        let mut body = reply.bytes_stream();
        let (mut text, mut events) = (String::new(), Vec::new());
        while let Some(chunk) = body.next().await {
            text.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
            while let Some((frame, rest)) = text.split_once("\n\n") {
                events.extend(parse(frame));
                text = rest.to_owned();
            }
            if enough(&events) {
                break;
            }
        }
        events
    }

    pub(crate) async fn ticket(&self, id: SessionId, right: Right) -> String {
        let reply = self
            .post(
                &format!("/api/auth/session/{id}/tickets"),
                &json!({ "right": right }),
            )
            .await;
        assert_eq!(reply.status(), StatusCode::CREATED);
        reply.json::<TicketReply>().await.unwrap().ticket
    }

    /// Opens a WebSocket with nothing but the ticket.
    pub(crate) async fn socket(&self, id: SessionId, pane: &str, ticket: &str) -> Socket {
        let url = format!(
            "ws://{}/api/auth/session/{id}/{pane}?ticket={ticket}",
            self.address
        );
        tokio_tungstenite::connect_async(url.into_client_request().unwrap())
            .await
            .unwrap()
            .0
    }

    pub(crate) async fn view(&self, id: SessionId, right: Right) -> Socket {
        let ticket = self.ticket(id, right).await;
        self.socket(id, "view", &ticket).await
    }
}

fn parse(frame: &str) -> Option<SessionEvent> {
    let field = |name: &str| {
        frame
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
    };
    let event: SessionEvent = serde_json::from_str(field("data:")?).unwrap();
    assert_eq!(field("id:").unwrap(), event.seq.to_string());
    let kind = serde_json::to_value(&event.event).unwrap();
    assert_eq!(field("event:").unwrap(), kind["type"]);
    Some(event)
}

/// The bytes of the next binary message; none when the socket is closed.
pub(crate) async fn bytes(socket: &mut Socket) -> Option<Vec<u8>> {
    loop {
        match tokio::time::timeout(PATIENCE, socket.next())
            .await
            .expect("the socket says nothing")?
        {
            Ok(Message::Binary(bytes)) => return Some(bytes.to_vec()),
            Ok(Message::Close(_)) | Err(_) => return None,
            Ok(_) => {}
        }
    }
}

/// Code and reason with which the socket is closed.
pub(crate) async fn closed(socket: &mut Socket) -> (u16, String) {
    loop {
        match tokio::time::timeout(PATIENCE, socket.next())
            .await
            .expect("the socket says nothing")
        {
            Some(Ok(Message::Close(Some(frame)))) => {
                return (frame.code.into(), frame.reason.to_string());
            }
            Some(Ok(Message::Close(None))) | None => panic!("closed without a code"),
            Some(Err(err)) => panic!("broken: {err}"),
            Some(Ok(_)) => {}
        }
    }
}

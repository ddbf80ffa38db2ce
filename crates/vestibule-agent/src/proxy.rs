//! The guest's way out: whoever connects to 127.0.0.1:3128 gets a stream of its own to the egress proxy on the host, which
//! decides. Nothing is looked at here.
use crate::agent::Agent;
use std::{io, sync::Arc, time::Duration};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
};
use tracing::warn;
use vestibule_api::{mux::STREAM_LIMIT, stream::Open};

/// Connections at once; some streams are left for the agent itself.
const CONNECTIONS: usize = STREAM_LIMIT - 8;
const BUFFER: usize = 64 * 1024;
/// What a client gets while there is no host: a proxy's word for it (RFC 9110 section 15.6.4).
const NO_HOST: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";

/// Serves for as long as the agent runs.
pub(crate) async fn serve(agent: Arc<Agent>, listener: TcpListener) {
    let slots = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS));
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        match listener.accept().await {
            Ok((client, _)) => {
                let agent = Arc::clone(&agent);
                tokio::spawn(async move {
                    // An error is one side that went away; the other sees its end.
                    let _ = relay(&agent, client).await;
                    drop(slot);
                });
            }
            Err(err) => {
                warn!(error = %err, "accept a connection to the way out");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn relay(agent: &Agent, mut client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let link = agent.link.borrow().clone();
    let Some(link) = link else {
        return client.write_all(NO_HOST).await;
    };
    match link.open(Open::Proxy).await {
        Ok(mut host) => {
            tokio::io::copy_bidirectional_with_sizes(&mut client, &mut host, BUFFER, BUFFER)
                .await
                .map(drop)
        }
        Err(_) => client.write_all(NO_HOST).await,
    }
}

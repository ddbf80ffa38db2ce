//! A WebSocket of the controller's as a byte stream, which remembers how it was closed.
use anyhow::{Context, Result};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    net::TcpStream,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::WebSocketConfig},
};

/// Bytes on the way between the socket and its reader.
const BUFFER: usize = 256 << 10;

/// An open WebSocket.
#[derive(Debug)]
pub struct Socket(WebSocketStream<TcpStream>);

/// How a WebSocket was closed, once it was.
#[derive(Clone, Debug, Default)]
pub struct Closed(Arc<Mutex<Option<(u16, String)>>>);

impl Closed {
    /// Code and reason of the close frame, if it has come.
    pub fn now(&self) -> Option<(u16, String)> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, code: u16, reason: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((code, reason));
    }
}

impl Socket {
    pub(super) async fn open(address: SocketAddr, url: &str) -> Result<Self> {
        let tcp = TcpStream::connect(address)
            .await
            .context("connect to the controller")?;
        // The library's own 128 KiB are much for thousands of sockets.
        let config = WebSocketConfig::default().read_buffer_size(BUFFER / 16);
        let (socket, _) = tokio_tungstenite::client_async_with_config(url, tcp, Some(config))
            .await
            .context("open the WebSocket")?;
        Ok(Self(socket))
    }

    /// The next binary frame; none: the socket was closed as it should.
    ///
    /// # Errors
    /// When the connection breaks without a close frame.
    pub async fn receive(&mut self) -> Result<Option<Bytes>> {
        loop {
            let next = self.0.next().await;
            match next.context("the connection ended without a close frame")?? {
                Message::Binary(bytes) => return Ok(Some(bytes)),
                Message::Close(_) => return Ok(None),
                Message::Text(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
    }

    /// Sends a binary frame.
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn send(&mut self, bytes: &'static [u8]) -> Result<()> {
        Ok(self
            .0
            .send(Message::Binary(Bytes::from_static(bytes)))
            .await?)
    }

    /// Reads until the close frame, and gives its code and reason.
    ///
    /// # Errors
    /// When the connection breaks without one.
    pub async fn closed(mut self) -> Result<(u16, String)> {
        loop {
            match self
                .0
                .next()
                .await
                .context("the connection ended without a close frame")??
            {
                Message::Close(Some(frame)) => {
                    return Ok((frame.code.into(), frame.reason.to_string()));
                }
                Message::Close(None) => return Ok((1005, String::new())),
                Message::Text(_)
                | Message::Binary(_)
                | Message::Ping(_)
                | Message::Pong(_)
                | Message::Frame(_) => {}
            }
        }
    }

    /// The binary frames as bytes, both ways.
    pub fn into_stream(self) -> (DuplexStream, Closed) {
        let (near, far) = tokio::io::duplex(BUFFER);
        let closed = Closed::default();
        let (mut sink, mut stream) = self.0.split();
        let (mut read, mut write) = tokio::io::split(far);
        let seen = closed.clone();
        tokio::spawn(async move {
            while let Some(Ok(message)) = stream.next().await {
                match message {
                    Message::Binary(bytes) => {
                        if write.write_all(&bytes).await.is_err() {
                            break;
                        }
                    }
                    Message::Close(frame) => {
                        let (code, reason) = frame.map_or((1005, String::new()), |f| {
                            (f.code.into(), f.reason.to_string())
                        });
                        seen.set(code, reason);
                        break;
                    }
                    Message::Text(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
                }
            }
            write.shutdown().await.ok();
        });
        tokio::spawn(async move {
            let mut buffer = vec![0; 16 << 10];
            while let Ok(count) = read.read(&mut buffer).await {
                let ended = count == 0;
                let message = if ended {
                    Message::Close(None)
                } else {
                    Message::binary(buffer[..count].to_vec())
                };
                if sink.send(message).await.is_err() || ended {
                    break;
                }
            }
        });
        (near, closed)
    }
}

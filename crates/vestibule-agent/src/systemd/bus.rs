//! A connection to PID 1's private socket: calls one after another, and the signals that come between.
use super::wire::{self, FIXED, Head, Malformed, Reader, Writer};
use std::{future::Future, io, path::Path, time::Duration};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};

/// A message of more bytes is not one of PID 1's.
const MESSAGE_LIMIT: usize = 4 << 20;
/// PID 1 answers in milliseconds, or it is stuck.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why PID 1 could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BusError {
    #[error("{what}: connect to systemd")]
    Connect {
        what: &'static str,
        #[source]
        err: io::Error,
    },
    #[error("{what}: systemd does not take this user")]
    Refused { what: &'static str },
    #[error("{what}: talk to systemd")]
    Talk {
        what: &'static str,
        #[source]
        err: io::Error,
    },
    #[error("{what}: systemd answered `{error}`")]
    Answer { what: &'static str, error: String },
    #[error("{what}: understand systemd's answer")]
    Malformed {
        what: &'static str,
        #[source]
        err: Malformed,
    },
    #[error("{what}: systemd's answer has the types `{found}`")]
    Types { what: &'static str, found: String },
    #[error("{what}: systemd did not answer within {PATIENCE:?}")]
    Silent { what: &'static str },
}

/// One call: where it goes, and the types of what comes back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Method {
    /// For people: what the call is for.
    pub(super) what: &'static str,
    pub(super) interface: &'static str,
    pub(super) name: &'static str,
    /// Types of the arguments, and of the answer.
    pub(super) takes: &'static str,
    pub(super) gives: &'static str,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Bus {
    stream: BufReader<UnixStream>,
    serial: u32,
    /// Whether a signal came while an answer was waited for.
    signalled: bool,
}

impl Bus {
    /// Connects and authenticates as the user that we are (D-Bus Specification, "EXTERNAL").
    pub(super) async fn connect(socket: &Path) -> Result<Self, BusError> {
        let what = "connect";
        let greet = async {
            let stream = UnixStream::connect(socket)
                .await
                .map_err(|err| BusError::Connect { what, err })?;
            let mut stream = BufReader::new(stream);
            let talk = |err| BusError::Talk { what, err };
            let user = rustix::process::geteuid().as_raw().to_string();
            let hex: String = user.bytes().map(|digit| format!("{digit:02x}")).collect();
            // In one write, as sd-bus does: PID 1 has then read BEGIN before it says OK. A BEGIN that it reads together with
            // the first call makes it forget the call until more bytes come (systemd 252, 2 of 8 times under emulation).
            stream
                .write_all(format!("\0AUTH EXTERNAL {hex}\r\nBEGIN\r\n").as_bytes())
                .await
                .map_err(talk)?;
            let mut answer = String::new();
            (&mut stream)
                .take(256)
                .read_line(&mut answer)
                .await
                .map_err(talk)?;
            if !answer.starts_with("OK") {
                return Err(BusError::Refused { what });
            }
            Ok(Self {
                stream,
                serial: 0,
                signalled: false,
            })
        };
        within(what, greet).await
    }

    /// Calls `method` of the object at `path`; `read` takes the answer apart.
    pub(super) async fn call<T>(
        &mut self,
        method: Method,
        path: &str,
        arguments: &Writer,
        read: impl FnOnce(&mut Reader<'_>) -> Result<T, Malformed>,
    ) -> Result<T, BusError> {
        let Method {
            what,
            interface,
            name,
            takes,
            gives,
        } = method;
        self.serial += 1;
        let (serial, bytes) = (
            self.serial,
            wire::call(self.serial, path, interface, name, takes, arguments),
        );
        let exchange = async {
            self.stream
                .write_all(&bytes)
                .await
                .map_err(|err| BusError::Talk { what, err })?;
            loop {
                let (head, body) = self.receive(what).await?;
                match head.kind {
                    wire::REPLY if head.answers == serial => return Ok((head, body)),
                    wire::ERROR if head.answers == serial => {
                        return Err(BusError::Answer {
                            what,
                            error: head.error,
                        });
                    }
                    wire::SIGNAL => self.signalled = true,
                    _ => {}
                }
            }
        };
        let (head, body) = within(what, exchange).await?;
        if head.signature != gives {
            return Err(BusError::Types {
                what,
                found: head.signature,
            });
        }
        read(&mut Reader::new(&body)).map_err(|err| BusError::Malformed { what, err })
    }

    /// Waits for a signal, or for none if one came meanwhile.
    pub(super) async fn signal(&mut self) -> Result<(), BusError> {
        while !self.signalled {
            let (head, _) = self.receive("wait for changes").await?;
            self.signalled = head.kind == wire::SIGNAL;
        }
        self.signalled = false;
        Ok(())
    }

    async fn receive(&mut self, what: &'static str) -> Result<(Head, Vec<u8>), BusError> {
        let talk = |err| BusError::Talk { what, err };
        let wrong = |err| BusError::Malformed { what, err };
        let mut fixed = [0; FIXED];
        self.stream.read_exact(&mut fixed).await.map_err(talk)?;
        let (fields, body) = wire::lengths(&fixed).map_err(wrong)?;
        if fields.saturating_add(body) > MESSAGE_LIMIT {
            return Err(talk(io::ErrorKind::FileTooLarge.into()));
        }
        let mut bytes = fixed.to_vec();
        bytes.resize(FIXED + fields + body, 0);
        self.stream
            .read_exact(&mut bytes[FIXED..])
            .await
            .map_err(talk)?;
        let body = bytes.split_off(FIXED + fields);
        Ok((wire::head(&bytes).map_err(wrong)?, body))
    }
}

async fn within<T>(
    what: &'static str,
    work: impl Future<Output = Result<T, BusError>>,
) -> Result<T, BusError> {
    tokio::time::timeout(PATIENCE, work)
        .await
        .unwrap_or(Err(BusError::Silent { what }))
}

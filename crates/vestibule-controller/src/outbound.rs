//! Requests of the controller's own to servers that an operator names: which authorities are trusted, and how much is read.
use camino::{Utf8Path, Utf8PathBuf};
use reqwest::{Certificate, Client, ClientBuilder, Response, StatusCode};
use std::io;

/// A reply of more bytes is refused.
const LIMIT: usize = 1 << 20;

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("read `{path}`")]
    Read {
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("set up an HTTP client")]
    Set(#[from] reqwest::Error),
}

/// Why a reply was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    #[error("no answer")]
    Http(#[from] reqwest::Error),
    #[error("the answer is larger than {LIMIT} bytes")]
    TooLarge,
}

/// A client that trusts the authorities of `ca` (PEM) besides the public ones.
pub(crate) fn client(
    mut builder: ClientBuilder,
    ca: Option<&Utf8Path>,
) -> Result<Client, ClientError> {
    if let Some(path) = ca {
        let pem = std::fs::read(path).map_err(|err| ClientError::Read {
            path: path.to_owned(),
            err,
        })?;
        for authority in Certificate::from_pem_bundle(&pem)? {
            builder = builder.add_root_certificate(authority);
        }
    }
    Ok(builder.build()?)
}

/// A reply whole, if it is not too large. Where it came from is left out of errors: the address may hold a code.
pub(crate) async fn read(mut reply: Response) -> Result<(StatusCode, Vec<u8>), ReplyError> {
    let mut body = Vec::new();
    while let Some(part) = reply.chunk().await.map_err(reqwest::Error::without_url)? {
        if body.len() + part.len() > LIMIT {
            return Err(ReplyError::TooLarge);
        }
        body.extend_from_slice(&part);
    }
    Ok((reply.status(), body))
}

//! Connections to other controllers.
use super::KeyError;
use camino::Utf8Path;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use std::{io, sync::Arc};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use url::{Host, Url};

pub(super) enum Dialled {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What is trusted: the public authorities, and those of a file.
pub(super) fn tls(ca: Option<&Utf8Path>) -> Result<ClientConfig, KeyError> {
    let mut roots = RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    if let Some(path) = ca {
        let wrong = |what: String| KeyError::Ca {
            path: path.to_owned(),
            what,
        };
        let pem = std::fs::read(path).map_err(|err| KeyError::Read {
            path: path.to_owned(),
            err,
        })?;
        let known = roots.len();
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|err| wrong(err.to_string()))?;
            roots
                .add(certificate)
                .map_err(|err| wrong(err.to_string()))?;
        }
        if roots.len() == known {
            return Err(wrong("there is none in it".to_owned()));
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(KeyError::Tls)?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// Connects to `https://name:port` or `http://address:port`.
pub(super) async fn dial(address: &str, tls: &Arc<ClientConfig>) -> io::Result<Dialled> {
    let url = Url::parse(address).map_err(io::Error::other)?;
    let (Some(host), Some(port)) = (url.host(), url.port_or_known_default()) else {
        return Err(io::Error::other("the address has no host and port"));
    };
    let tcp = match host {
        Host::Domain(name) => TcpStream::connect((name, port)).await?,
        Host::Ipv4(address) => TcpStream::connect((address, port)).await?,
        Host::Ipv6(address) => TcpStream::connect((address, port)).await?,
    };
    // What a person types is not to wait for more.
    tcp.set_nodelay(true)?;
    if url.scheme() == "http" {
        return Ok(Dialled::Plain(tcp));
    }
    let name = match host {
        Host::Domain(name) => ServerName::try_from(name.to_owned()).map_err(io::Error::other)?,
        Host::Ipv4(address) => ServerName::from(std::net::IpAddr::V4(address)),
        Host::Ipv6(address) => ServerName::from(std::net::IpAddr::V6(address)),
    };
    let connector = TlsConnector::from(Arc::clone(tls));
    let stream = connector.connect(name, tcp).await?;
    Ok(Dialled::Tls(Box::new(stream)))
}

/// The Host header for an address.
pub(super) fn authority(address: &str) -> String {
    let host = address.split_once("://").map_or(address, |(_, host)| host);
    host.trim_end_matches('/').to_owned()
}

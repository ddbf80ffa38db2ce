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

/// Why another controller is not reached.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("connect to it")]
    Tcp(#[from] io::Error),
    /// It is no host of the cluster, or has a certificate that this one was not told of.
    #[error("its certificate is not trusted")]
    Certificate(#[source] io::Error),
    #[error("shake hands with it by TLS")]
    Tls(#[source] io::Error),
    #[error("speak HTTP with it")]
    Http(#[source] hyper::Error),
}

impl DialError {
    fn of_tls(err: io::Error) -> Self {
        let refused = err.get_ref().and_then(|err| err.downcast_ref());
        match refused {
            Some(rustls::Error::InvalidCertificate(_)) => Self::Certificate(err),
            Some(_) | None => Self::Tls(err),
        }
    }
}

/// Connects to `https://name:port` or `http://address:port`.
pub(super) async fn dial(address: &str, tls: &Arc<ClientConfig>) -> Result<Dialled, DialError> {
    let url = Url::parse(address).map_err(io::Error::other)?;
    let (Some(host), Some(port)) = (url.host(), url.port_or_known_default()) else {
        return Err(io::Error::other("the address has no host and port").into());
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
    let stream = connector.connect(name, tcp).await;
    Ok(Dialled::Tls(Box::new(stream.map_err(DialError::of_tls)?)))
}

/// The Host header for an address, without the scheme's own port, as the other controller knows itself.
pub(super) fn authority(address: &str) -> String {
    Url::parse(address).map_or_else(|_| String::new(), |url| url.authority().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_header_is_as_the_other_side_has_it() {
        for (address, host) in [
            ("https://a.test:8443", "a.test:8443"),
            ("https://a.test:443/", "a.test"),
            ("https://a.test", "a.test"),
            ("http://[::1]:80", "[::1]"),
            ("http://127.0.0.1:4000", "127.0.0.1:4000"),
        ] {
            assert_eq!(authority(address), host, "{address}");
        }
    }
}

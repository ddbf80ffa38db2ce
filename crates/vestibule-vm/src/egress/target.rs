//! What a client of the proxy asks for: a host and a port, in the one spelling that policies are compared with.
//!
//! The host is parsed as browsers do (WHATWG URL, section 3.5), so that `0x7f.1`, `2130706433` and `127.1` are seen as
//! the address that any client would make of them.
use hyper::{Method, Uri};
use std::{fmt, net::IpAddr};
use url::Host;

/// Where a connection shall go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub host: HostName,
    pub port: u16,
}

/// A host, normalised: lower case, punycode, no trailing dot; addresses in their canonical form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostName {
    Domain(String),
    Address(IpAddr),
}

impl HostName {
    /// Parses a host as it stands in a URL, IPv6 addresses in brackets. A trailing dot is taken away.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_suffix('.').unwrap_or(text);
        match Host::parse(text).ok()? {
            Host::Domain(name) => {
                let name = name.strip_suffix('.').unwrap_or(&name).to_owned();
                (!name.is_empty() && name.len() <= 253).then_some(Self::Domain(name))
            }
            Host::Ipv4(v4) => Some(Self::Address(v4.into())),
            Host::Ipv6(v6) => Some(Self::Address(v6.into())),
        }
    }

    /// Whether this is `localhost` or below it (RFC 6761 section 6.3): loopback whatever a resolver says.
    pub fn is_localhost(&self) -> bool {
        match self {
            Self::Domain(name) => name == "localhost" || name.ends_with(".localhost"),
            Self::Address(_) => false,
        }
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Domain(name) => f.write_str(name),
            Self::Address(address) => address.fmt(f),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host {
            HostName::Address(IpAddr::V6(v6)) => write!(f, "[{v6}]:{}", self.port),
            HostName::Address(IpAddr::V4(_)) | HostName::Domain(_) => {
                write!(f, "{}:{}", self.host, self.port)
            }
        }
    }
}

/// What is asked of the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `CONNECT host:port`.
    Tunnel,
    /// `GET http://host/…`.
    Http,
    /// `GET https://host/…`: the proxy itself speaks TLS.
    Https,
}

/// Reads method and request target (RFC 9112 section 3.2); `None` where they are not those of a proxy request.
pub fn read(method: &Method, uri: &Uri) -> Option<(Form, Target)> {
    let authority = uri.authority()?;
    let (form, default) = match (method == Method::CONNECT, uri.scheme_str()) {
        (true, None) => (Form::Tunnel, None),
        (false, Some("http")) => (Form::Http, Some(80)),
        (false, Some("https")) => (Form::Https, Some(443)),
        _ => return None,
    };
    let port = match authority.port() {
        Some(port) => port.as_str().parse().ok()?,
        None => default?,
    };
    let host = HostName::parse(authority.host())?;
    (port != 0).then_some((form, Target { host, port }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_spelling_of_loopback_is_loopback() {
        for text in [
            "127.0.0.1",
            "127.1",
            "127.0.1",
            "0x7f.1",
            "0x7f000001",
            "2130706433",
            "017700000001",
            "0177.0.0.1",
            "127.0.0.1.",
            "0x7f.0x0.0x0.0x1",
            "%31%32%37.0.0.1",
            "１２７.0.0.1",
        ] {
            assert_eq!(
                HostName::parse(text),
                Some(HostName::Address([127, 0, 0, 1].into())),
                "{text}"
            );
        }
        for text in [
            "[::1]",
            "[0:0:0:0:0:0:0:1]",
            "[::ffff:127.0.0.1]",
            "[::FFFF:7f00:1]",
        ] {
            assert!(
                matches!(
                    HostName::parse(text),
                    Some(HostName::Address(IpAddr::V6(_)))
                ),
                "{text}"
            );
        }
        for text in [
            "localhost",
            "LOCALHOST",
            "localhost.",
            "a.b.localhost",
            "ⓛocalhost",
        ] {
            assert!(HostName::parse(text).unwrap().is_localhost(), "{text}");
        }
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for text in [
            "",
            ".",
            "..",
            "a b",
            "a/b",
            "a@b",
            "[::1",
            "::1",
            "[fe80::1%25eth0]",
            "a:80",
            "1.2.3.4.5",
            "256.1.1.1",
            "a\0b",
            "a%00b",
        ] {
            assert_eq!(HostName::parse(text), None, "{text}");
        }
    }

    #[test]
    fn forms() {
        let read = |method: Method, uri: &str| uri.parse().ok().and_then(|uri| read(&method, &uri));
        let (form, target) = read(Method::CONNECT, "Example.COM.:443").unwrap();
        assert_eq!(
            (form, target.to_string().as_str()),
            (Form::Tunnel, "example.com:443")
        );
        let (form, target) = read(Method::GET, "http://user:pass@[2606:4700::1]/x").unwrap();
        assert_eq!(
            (form, target.to_string().as_str()),
            (Form::Http, "[2606:4700::1]:80")
        );
        assert_eq!(read(Method::POST, "https://a/").unwrap().1.port, 443);
        assert_eq!(read(Method::GET, "/index.html"), None);
        assert_eq!(read(Method::CONNECT, "example.com"), None);
        assert_eq!(read(Method::CONNECT, "example.com:0"), None);
        assert_eq!(read(Method::CONNECT, "http://example.com:80/"), None);
        assert_eq!(read(Method::GET, "ftp://example.com/"), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,80}") {
            if let Some(host) = HostName::parse(&text) {
                // The canonical form is a fixed point.
                let again = match &host {
                    HostName::Address(IpAddr::V6(v6)) => format!("[{v6}]"),
                    HostName::Address(IpAddr::V4(_)) | HostName::Domain(_) => host.to_string(),
                };
                prop_assert_eq!(HostName::parse(&again), Some(host));
            }
        }
    }
}

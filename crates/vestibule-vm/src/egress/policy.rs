//! A session's policy, made ready for use, and the decision about one target.
//!
//! The name is resolved here and nowhere else; the addresses that were checked are the ones that are dialled, so a name
//! that answers differently the second time (DNS rebinding) gains nothing.
use super::{
    address,
    target::{HostName, Target},
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use std::{
    fmt,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};
use vestibule_api::egress::{EgressMode, EgressPolicy, EgressReason};

/// A resolver that has not answered by then will not.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A name with more addresses than this has enough.
const ADDRESS_LIMIT: usize = 16;

/// Why a policy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("`{0}` in the egress policy is not a host name")]
    Host(String),
    #[error("certificate authority {0} of the egress policy is not a certificate in PEM")]
    Certificate(usize),
    #[error(
        "the upstream proxy of the egress policy is not of the form `http://host:port` without user and path"
    )]
    Upstream,
    #[error("prepare TLS for the egress proxy")]
    Tls(#[source] rustls::Error),
}

/// Why a target is refused or not reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reason: EgressReason,
    /// For people: what was seen.
    pub why: String,
    /// Whether time ran out.
    pub late: bool,
}

impl Refusal {
    pub fn new(reason: EgressReason, why: impl Into<String>) -> Self {
        Self {
            reason,
            why: why.into(),
            late: false,
        }
    }

    pub fn late(reason: EgressReason, why: impl Into<String>) -> Self {
        Self {
            late: true,
            ..Self::new(reason, why)
        }
    }
}

/// See the module.
pub struct Policy {
    mode: EgressMode,
    allowed: Vec<Pattern>,
    pins: Vec<(HostName, Option<u16>, SocketAddr)>,
    pub upstream: Option<Target>,
    pub tls: Arc<ClientConfig>,
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("mode", &self.mode)
            .field("allowed", &self.allowed)
            .field("pins", &self.pins)
            .field("upstream", &self.upstream)
            .finish_non_exhaustive()
    }
}

/// One entry of an allow-list.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    Exact(HostName),
    /// Every name below this one, and not the name itself.
    Below(String),
}

impl Pattern {
    fn parse(text: &str) -> Result<Self, PolicyError> {
        let wrong = || PolicyError::Host(text.chars().take(100).collect());
        match text.strip_prefix("*.") {
            Some(parent) => match HostName::parse(parent) {
                Some(HostName::Domain(parent)) if !parent.contains('*') => Ok(Self::Below(parent)),
                _ => Err(wrong()),
            },
            None if text.contains('*') => Err(wrong()),
            None => HostName::parse(text).map(Self::Exact).ok_or_else(wrong),
        }
    }

    fn matches(&self, host: &HostName) -> bool {
        match (self, host) {
            (Self::Exact(own), host) => own == host,
            (Self::Below(parent), HostName::Domain(name)) => name
                .strip_suffix(parent.as_str())
                .is_some_and(|below| below.len() > 1 && below.ends_with('.')),
            (Self::Below(_), HostName::Address(_)) => false,
        }
    }
}

impl Policy {
    /// Checks a policy and makes it ready.
    ///
    /// # Errors
    /// When a host, a certificate or the upstream proxy in it is none.
    pub fn new(policy: &EgressPolicy) -> Result<Self, PolicyError> {
        let pins = policy.pins.iter().map(|pin| {
            let host =
                HostName::parse(&pin.host).ok_or_else(|| PolicyError::Host(pin.host.clone()))?;
            Ok((host, pin.port, pin.to))
        });
        Ok(Self {
            mode: policy.mode,
            allowed: policy
                .hosts
                .iter()
                .map(|host| Pattern::parse(host))
                .collect::<Result<_, _>>()?,
            pins: pins.collect::<Result<_, PolicyError>>()?,
            upstream: policy.upstream.as_deref().map(upstream).transpose()?,
            tls: tls(&policy.extra_ca_pem)?,
        })
    }

    /// Whether nothing leaves.
    pub fn is_closed(&self) -> bool {
        self.mode == EgressMode::Closed
    }

    /// The addresses that `target` may be dialled at, each of them checked.
    ///
    /// # Errors
    /// Why it is refused, or that its name has no address.
    pub async fn resolve(&self, target: &Target) -> Result<Vec<SocketAddr>, Refusal> {
        self.permits(&target.host)?;
        let pinned = self.pins.iter().find(|(host, port, _)| {
            *host == target.host && port.is_none_or(|port| port == target.port)
        });
        if let Some((_, _, to)) = pinned {
            return Ok(vec![*to]);
        }
        if target.host.is_localhost() {
            return Err(Refusal::new(
                EgressReason::Loopback,
                "the name means this computer",
            ));
        }
        let addresses = match &target.host {
            HostName::Address(address) => vec![SocketAddr::new(*address, target.port)],
            HostName::Domain(name) => lookup(name, target.port).await?,
        };
        for address in &addresses {
            check(address.ip(), &target.host)?;
        }
        Ok(addresses)
    }

    fn permits(&self, host: &HostName) -> Result<(), Refusal> {
        match self.mode {
            EgressMode::Open => Ok(()),
            EgressMode::Closed => Err(Refusal::new(
                EgressReason::Policy,
                "this virtual machine belongs to no session yet, and nothing leaves it",
            )),
            EgressMode::AllowList if self.allowed.iter().any(|pattern| pattern.matches(host)) => {
                Ok(())
            }
            EgressMode::AllowList => Err(Refusal::new(
                EgressReason::Policy,
                "the host is not on this session's list of allowed hosts",
            )),
        }
    }
}

async fn lookup(name: &str, port: u16) -> Result<Vec<SocketAddr>, Refusal> {
    #[expect(
        clippy::disallowed_methods,
        reason = "the egress proxy is where names are resolved"
    )]
    let looking = tokio::net::lookup_host((name, port));
    let found: Vec<_> = match tokio::time::timeout(RESOLVE_TIMEOUT, looking).await {
        Ok(Ok(found)) => found.take(ADDRESS_LIMIT).collect(),
        Ok(Err(err)) => return Err(Refusal::new(EgressReason::NameNotFound, err.to_string())),
        Err(_) => {
            let why = "the name was not resolved in time";
            return Err(Refusal::late(EgressReason::NameNotFound, why));
        }
    };
    if found.is_empty() {
        return Err(Refusal::new(
            EgressReason::NameNotFound,
            "the name has no address",
        ));
    }
    Ok(found)
}

/// One address that is refused refuses the name: a name with a public and a private address is a trick or a mistake.
fn check(address: IpAddr, host: &HostName) -> Result<(), Refusal> {
    let what = match host {
        HostName::Domain(_) => format!("the name resolves to {address}"),
        HostName::Address(_) => format!("the address is {address}"),
    };
    if let Some(reason) = address::refuse(address) {
        let kind = kind(reason);
        return Err(Refusal::new(reason, format!("{what}, {kind}")));
    }
    if is_own(address) {
        return Err(Refusal::new(
            EgressReason::Loopback,
            format!("{what}, which is this computer itself"),
        ));
    }
    Ok(())
}

/// What a refused address is, in words.
const fn kind(reason: EgressReason) -> &'static str {
    match reason {
        EgressReason::Loopback => "which is this computer itself",
        EgressReason::Private => "which is in a private network",
        EgressReason::LinkLocal => "which is link-local or a cloud's metadata service",
        EgressReason::NotGlobal
        | EgressReason::Policy
        | EgressReason::BadRequest
        | EgressReason::NameNotFound
        | EgressReason::Unreachable
        | EgressReason::Tls
        | EgressReason::TooMany => "which is not a public address",
    }
}

/// Whether the host itself has this address: then the kernel would send from it to it. Connecting a UDP socket asks the
/// routing table and sends nothing.
fn is_own(address: IpAddr) -> bool {
    let any = if address.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let route = UdpSocket::bind(any).and_then(|socket| {
        socket.connect((address, 9))?;
        socket.local_addr()
    });
    route.is_ok_and(|from| from.ip() == address)
}

fn upstream(text: &str) -> Result<Target, PolicyError> {
    let url = url::Url::parse(text).map_err(|_| PolicyError::Upstream)?;
    let plain = url.scheme() == "http"
        && url.username().is_empty()
        && url.password().is_none()
        && url.path() == "/"
        && url.query().is_none();
    let host = url.host_str().and_then(HostName::parse);
    match (plain, host, url.port_or_known_default()) {
        (true, Some(host), Some(port)) => Ok(Target { host, port }),
        _ => Err(PolicyError::Upstream),
    }
}

/// TLS for absolute `https://` requests: the public authorities, and the operator's.
fn tls(extra: &[String]) -> Result<Arc<ClientConfig>, PolicyError> {
    let mut roots = RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    for (n, pem) in extra.iter().enumerate() {
        let wrong = || PolicyError::Certificate(n + 1);
        let mut any = false;
        for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            roots
                .add(certificate.map_err(|_| wrong())?)
                .map_err(|_| wrong())?;
            any = true;
        }
        if !any {
            return Err(wrong());
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(PolicyError::Tls)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vestibule_api::egress::Pin;

    fn policy(mode: EgressMode, hosts: &[&str]) -> EgressPolicy {
        EgressPolicy {
            mode,
            hosts: hosts.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }
    }

    async fn reason(
        policy: &EgressPolicy,
        host: &str,
        port: u16,
    ) -> Result<Vec<SocketAddr>, EgressReason> {
        let target = Target {
            host: HostName::parse(host).unwrap(),
            port,
        };
        Policy::new(policy)
            .unwrap()
            .resolve(&target)
            .await
            .map_err(|r| r.reason)
    }

    #[tokio::test]
    async fn closed_is_closed_even_for_pins() {
        let mut closed = policy(EgressMode::Closed, &["1.1.1.1"]);
        closed.pins = vec![Pin {
            host: "a.test".into(),
            port: None,
            to: "127.0.0.1:1".parse().unwrap(),
        }];
        assert_eq!(
            reason(&closed, "1.1.1.1", 443).await,
            Err(EgressReason::Policy)
        );
        assert_eq!(
            reason(&closed, "a.test", 443).await,
            Err(EgressReason::Policy)
        );
    }

    #[tokio::test]
    async fn an_allow_list_means_exactly_what_it_says() {
        let list = policy(EgressMode::AllowList, &["1.1.1.1", "*.Example.com"]);
        assert!(reason(&list, "1.1.1.1", 443).await.is_ok());
        assert_eq!(
            reason(&list, "8.8.8.8", 443).await,
            Err(EgressReason::Policy)
        );
        let compiled = Policy::new(&list).unwrap();
        let permits = |host| compiled.permits(&HostName::parse(host).unwrap()).is_ok();
        assert!(permits("a.example.com") && permits("a.b.example.com."));
        assert!(
            !permits("example.com")
                && !permits("badexample.com")
                && !permits("example.com.evil.test")
        );
    }

    #[tokio::test]
    async fn a_pin_reaches_what_is_refused_otherwise_and_only_on_its_port() {
        let to: SocketAddr = "127.0.0.1:8443".parse().unwrap();
        let mut open = policy(EgressMode::Open, &[]);
        open.pins = vec![Pin {
            host: "IdP.test".into(),
            port: Some(443),
            to,
        }];
        assert_eq!(reason(&open, "idp.test.", 443).await, Ok(vec![to]));
        assert_eq!(
            reason(&open, "idp.test", 80).await,
            Err(EgressReason::NameNotFound)
        );
        assert_eq!(
            reason(&open, "127.0.0.1", 8443).await,
            Err(EgressReason::Loopback)
        );
    }

    #[tokio::test]
    async fn names_are_judged_by_their_addresses() {
        let open = policy(EgressMode::Open, &[]);
        assert_eq!(
            reason(&open, "localhost", 80).await,
            Err(EgressReason::Loopback)
        );
        let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
        for name in ["ip6-localhost", "ip6-loopback"]
            .iter()
            .filter(|name| hosts.contains(**name))
        {
            assert_eq!(
                reason(&open, name, 80).await,
                Err(EgressReason::Loopback),
                "{name}"
            );
        }
    }

    #[test]
    fn what_is_no_policy_is_said() {
        let mut bad = policy(EgressMode::AllowList, &["a b"]);
        assert!(matches!(Policy::new(&bad), Err(PolicyError::Host(_))));
        bad.hosts = vec!["*.*.com".into()];
        assert!(matches!(Policy::new(&bad), Err(PolicyError::Host(_))));
        bad.hosts.clear();
        bad.extra_ca_pem = vec!["nonsense".into()];
        assert!(matches!(
            Policy::new(&bad),
            Err(PolicyError::Certificate(1))
        ));
        bad.extra_ca_pem.clear();
        for text in [
            "socks5://a:1",
            "http://user:secret@proxy:8080",
            "http://proxy:8080/path",
            "proxy:8080",
        ] {
            bad.upstream = Some(text.into());
            let err = Policy::new(&bad).unwrap_err();
            assert!(matches!(err, PolicyError::Upstream) && !err.to_string().contains("secret"));
        }
        bad.upstream = Some("http://proxy.test:8080".into());
        assert!(Policy::new(&bad).is_ok());
    }

    #[test]
    fn the_hosts_own_addresses_are_known() {
        assert!(is_own("127.0.0.1".parse().unwrap()));
        assert!(!is_own("203.0.113.7".parse().unwrap()));
    }
}

//! Where people reach the dashboard, and which pages may show it.
use super::Config;
use camino::Utf8PathBuf;
use serde::Deserialize;
use std::net::SocketAddr;
use url::Url;

/// `[tls]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The server's certificate and those that lead to a known authority, in PEM. Read again when it changes.
    pub certificate: Utf8PathBuf,
    /// Its private key, in PEM. Read again when it changes.
    pub key: Utf8PathBuf,
}

impl Config {
    /// The first of these keys with a value that can't be, and what was expected there.
    pub(super) fn check_origins(&self) -> Result<(), (String, String)> {
        let wrong = |key: &str, what: String| Err((key.to_owned(), what));
        if let Some(url) = &self.public_url
            && origin(url).is_none()
        {
            let what = format!(
                "`{url}`; expected `https://name` or `http://name`, with a port if need be, and no path"
            );
            return wrong("public_url", what);
        }
        for (i, ancestor) in self.frame_ancestors.iter().enumerate() {
            if origin(ancestor).as_deref() != Some(ancestor) {
                let what =
                    format!("`{ancestor}`; expected an origin such as `https://app.example.com`");
                return wrong(&format!("frame_ancestors[{i}]"), what);
            }
        }
        Ok(())
    }

    /// Whether people come by TLS, here or at a reverse proxy.
    pub(crate) fn is_secure(&self) -> bool {
        let proxied = self.public_url.as_deref();
        self.tls.is_some() || proxied.is_some_and(|url| url.starts_with("https:"))
    }

    /// Where a link to the dashboard leads: the scheme, the name, and the port if it is not the scheme's.
    pub(crate) fn base(&self, address: SocketAddr) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let public = self.public_url.as_deref().and_then(origin);
        public.unwrap_or_else(|| format!("{scheme}://{address}"))
    }

    /// Values of the Host header that are served besides loopback's.
    pub(crate) fn hosts(&self) -> Vec<String> {
        let public = self.public_url.as_deref().and_then(origin);
        let public = public.and_then(|url| url.split_once("://").map(|(_, host)| host.to_owned()));
        let peer = self.cluster.as_ref().and_then(|cluster| {
            let url = origin(cluster.address.as_deref()?)?;
            url.split_once("://").map(|(_, host)| host.to_owned())
        });
        let allowed = self.allowed_hosts.iter().cloned();
        allowed.chain(public).chain(peer).collect()
    }
}

/// An origin as browsers write it (RFC 6454 section 6.2); none: the text is no bare one.
fn origin(text: &str) -> Option<String> {
    let url = Url::parse(text).ok()?;
    let bare = matches!(url.scheme(), "http" | "https")
        && url.username().is_empty()
        && url.password().is_none()
        && url.path() == "/"
        && url.query().is_none()
        && url.fragment().is_none();
    bare.then(|| url.origin().ascii_serialization())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Config {
        let home = camino_tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("vestibule.toml"), text).unwrap();
        Config::load(None, home.path()).unwrap()
    }

    #[test]
    fn links_lead_where_people_come_from() {
        let address = SocketAddr::from(([127, 0, 0, 1], 4000));
        let plain = load("");
        assert_eq!(
            (plain.base(address).as_str(), plain.is_secure()),
            ("http://127.0.0.1:4000", false)
        );
        let proxied = load("public_url = 'https://id.example.com:8443/'");
        assert_eq!(proxied.base(address), "https://id.example.com:8443");
        assert!(proxied.is_secure());
        assert_eq!(proxied.hosts(), ["id.example.com:8443"]);
        let tls = load("[tls]\ncertificate = '/x'\nkey = '/y'");
        assert_eq!(tls.base(address), "https://127.0.0.1:4000");
    }
}

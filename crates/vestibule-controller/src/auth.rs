//! Who may ask: the token of this home directory, or a dashboard's cookie; and from where: only this host's own names.
use crate::{file, live::Hash};
use axum::http::{HeaderMap, Method, header};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt as _,
    time::Duration,
};

/// A dashboard stays signed in for so long.
pub(crate) const LOGIN_LIFE: Duration = Duration::from_secs(7 * 86_400);

/// A person may take so long at the identity provider.
const ATTEMPT_LIFE: Duration = Duration::from_secs(900);

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("read the token `{path}`")]
    Read {
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("make the token `{path}`")]
    Make {
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("the token `{path}` may be read by others (mode {mode:o}): make it 0600")]
    Open { path: Utf8PathBuf, mode: u32 },
    #[error("the token `{path}` has fewer than 32 characters: remove it, a new one is made")]
    Short { path: Utf8PathBuf },
}

/// Reads `home/token`, or makes it: 256 random bits, mode 0600. Only its hash stays in memory.
pub(crate) fn token(home: &Utf8Path) -> Result<Hash, TokenError> {
    let path = home.join("token");
    match std::fs::read_to_string(&path) {
        Ok(text) => check(&path, text.trim()),
        Err(err) if err.kind() == io::ErrorKind::NotFound => make(&path),
        Err(err) => Err(TokenError::Read { path, err }),
    }
}

fn check(path: &Utf8Path, token: &str) -> Result<Hash, TokenError> {
    let exposed = file::exposed(path).map_err(|err| TokenError::Read {
        path: path.to_owned(),
        err,
    })?;
    if let Some(mode) = exposed {
        return Err(TokenError::Open {
            path: path.to_owned(),
            mode,
        });
    }
    if token.len() < 32 {
        return Err(TokenError::Short {
            path: path.to_owned(),
        });
    }
    Ok(Hash::of(token))
}

fn make(path: &Utf8Path) -> Result<Hash, TokenError> {
    let (token, hash) = crate::live::random_token();
    let staged = Utf8PathBuf::from(format!("{path}.new"));
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&staged)?;
        writeln!(file, "{token}")?;
        file.sync_all()?;
        std::fs::rename(&staged, path)
    };
    write().map_err(|err| TokenError::Make {
        path: path.to_owned(),
        err,
    })?;
    Ok(hash)
}

/// What a request is checked against.
#[derive(Debug)]
pub(crate) struct Access {
    token: Hash,
    /// Values of the Host header that are this server's.
    hosts: Vec<String>,
    /// Cookies are not bound to a port, so the name is.
    cookie: String,
    /// The cookie of an attempt at the identity provider.
    attempt: String,
    /// Whether people come by TLS: then the cookie goes nowhere else.
    secure: bool,
}

impl Access {
    /// For a server on `address`, and without TLS on the port of `local`; people come by TLS where it is `secure`.
    pub(crate) fn new(
        token: Hash,
        address: SocketAddr,
        local: SocketAddr,
        allowed: &[String],
        secure: bool,
    ) -> Self {
        let own = [address.port(), local.port()].into_iter().flat_map(|port| {
            ["localhost", "127.0.0.1", "[::1]"].map(|name| format!("{name}:{port}"))
        });
        let hosts = own
            .chain([address.to_string(), local.to_string()])
            .chain(allowed.iter().cloned());
        let port = address.port();
        // RFC 6265bis section 4.1.3.2: with this prefix no other host name and no plain connection can set it.
        let prefix = if secure { "__Host-" } else { "" };
        Self {
            token,
            hosts: hosts.collect(),
            cookie: format!("{prefix}vestibule-{port}"),
            attempt: format!("{prefix}vestibule-oidc-{port}"),
            secure,
        }
    }

    /// Whether the request was sent to a name of this server's: a page that rebinds its own name to loopback is not.
    pub(crate) fn is_own_host(&self, headers: &HeaderMap) -> bool {
        text(headers, &header::HOST)
            .is_some_and(|host| self.hosts.iter().any(|own| own.eq_ignore_ascii_case(host)))
    }

    /// Whether a request that changes something, or opens a WebSocket, comes from this server's own pages or from no page.
    pub(crate) fn is_own_origin(&self, method: &Method, headers: &HeaderMap) -> bool {
        let upgrade = headers.contains_key(header::UPGRADE);
        if method.is_safe() && !upgrade {
            return true;
        }
        match text(headers, &header::ORIGIN) {
            Some(origin) => {
                let host = origin
                    .strip_prefix("http://")
                    .or_else(|| origin.strip_prefix("https://"));
                host.is_some_and(|host| self.hosts.iter().any(|own| own.eq_ignore_ascii_case(host)))
            }
            // No browser leaves it out of these; a program has to show the token, not a cookie.
            None => self.cookie_hash(headers).is_none(),
        }
    }

    /// Whether the request carries the home's token.
    pub(crate) fn has_token(&self, headers: &HeaderMap) -> bool {
        Self::bearer(headers).is_some_and(|hash| hash.is(&self.token))
    }

    /// The hash of the token that the request carries (RFC 6750).
    pub(crate) fn bearer(headers: &HeaderMap) -> Option<Hash> {
        let value = text(headers, &header::AUTHORIZATION)?;
        let (scheme, token) = value.split_once(' ')?;
        let bearer = scheme.eq_ignore_ascii_case("bearer");
        bearer.then(|| Hash::of(token.trim()))
    }

    /// The hash of the dashboard's cookie.
    pub(crate) fn cookie_hash(&self, headers: &HeaderMap) -> Option<Hash> {
        cookie(headers, &self.cookie).map(Hash::of)
    }

    /// What a browser keeps of its attempt at the identity provider.
    pub(crate) fn attempt<'a>(&self, headers: &'a HeaderMap) -> Option<&'a str> {
        cookie(headers, &self.attempt)
    }

    /// `Set-Cookie` of a browser that is sent to the identity provider; without a value: that is back. The redirect comes
    /// from another site, so it is not `Strict`.
    pub(crate) fn set_attempt(&self, value: Option<&str>) -> String {
        let age = value.map_or(0, |_| ATTEMPT_LIFE.as_secs());
        format!(
            "{}={}; Path=/; HttpOnly; SameSite=Lax; Max-Age={age}{}",
            self.attempt,
            value.unwrap_or_default(),
            self.only_by_tls()
        )
    }

    fn only_by_tls(&self) -> &'static str {
        if self.secure { "; Secure" } else { "" }
    }

    /// `Set-Cookie` of a dashboard that signs in; without a token: that signs out.
    pub(crate) fn set_cookie(&self, token: Option<&str>) -> String {
        let (value, age) = match token {
            Some(token) => (token, LOGIN_LIFE.as_secs()),
            None => ("", 0),
        };
        format!(
            "{}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={age}{}",
            self.cookie,
            self.only_by_tls()
        )
    }
}

/// The value of a cookie.
fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(found, _)| *found == name)
        .map(|(_, value)| value)
}

fn text<'a>(headers: &'a HeaderMap, name: &header::HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    fn access() -> Access {
        let address = SocketAddr::from(([127, 0, 0, 1], 4000));
        Access::new(
            Hash::of("secret"),
            address,
            address,
            &["vestibule.internal:4000".to_owned()],
            false,
        )
    }

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.clone(), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn a_rebound_name_is_not_ours() {
        let access = access();
        for own in [
            "127.0.0.1:4000",
            "localhost:4000",
            "LOCALHOST:4000",
            "[::1]:4000",
            "vestibule.internal:4000",
        ] {
            assert!(
                access.is_own_host(&headers(&[(header::HOST, own)])),
                "{own}"
            );
        }
        for other in [
            "evil.example:4000",
            "127.0.0.1",
            "127.0.0.1:4001",
            "localhost.evil.example:4000",
            "",
        ] {
            assert!(
                !access.is_own_host(&headers(&[(header::HOST, other)])),
                "{other}"
            );
        }
        assert!(!access.is_own_host(&HeaderMap::new()));
    }

    #[test]
    fn with_tls_the_cookie_goes_nowhere_else() {
        let address = SocketAddr::from(([10, 0, 0, 1], 443));
        let local = SocketAddr::from(([127, 0, 0, 1], 4001));
        let access = Access::new(Hash::of("secret"), address, local, &[], true);
        let cookie = access.set_cookie(Some("x"));
        assert!(
            cookie.starts_with("__Host-vestibule-443=x; Path=/;"),
            "{cookie}"
        );
        assert!(
            cookie.contains("; Secure") && cookie.contains("; HttpOnly"),
            "{cookie}"
        );
        for own in ["10.0.0.1:443", "localhost:443", "127.0.0.1:4001"] {
            assert!(
                access.is_own_host(&headers(&[(header::HOST, own)])),
                "{own}"
            );
        }
    }

    #[test]
    fn a_foreign_page_changes_nothing() {
        let access = access();
        let cookie = (header::COOKIE, "a=b; vestibule-4000=x");
        let ours = (header::ORIGIN, "http://localhost:4000");
        let theirs = (header::ORIGIN, "http://evil.example");
        let post = Method::POST;
        assert!(access.is_own_origin(&post, &headers(&[cookie.clone(), ours])));
        for bad in [
            theirs.clone(),
            (header::ORIGIN, "null"),
            (header::ORIGIN, "localhost:4000"),
        ] {
            assert!(!access.is_own_origin(&post, &headers(&[bad])));
        }
        assert!(
            !access.is_own_origin(&post, &headers(&[cookie])),
            "a cookie without an origin"
        );
        assert!(access.is_own_origin(&post, &HeaderMap::new()), "a program");
        assert!(access.is_own_origin(&Method::GET, &headers(std::slice::from_ref(&theirs))));
        let upgrade = headers(&[theirs, (header::UPGRADE, "websocket")]);
        assert!(!access.is_own_origin(&Method::GET, &upgrade));
    }

    #[test]
    fn only_the_token_is_the_token() {
        let access = access();
        for (value, good) in [
            ("Bearer secret", true),
            ("bearer secret", true),
            ("Bearer Secret", false),
            ("secret", false),
            ("Basic secret", false),
        ] {
            assert_eq!(
                access.has_token(&headers(&[(header::AUTHORIZATION, value)])),
                good,
                "{value}"
            );
        }
    }

    #[test]
    fn the_token_is_made_once_and_kept_private() {
        let home = camino_tempfile::tempdir().unwrap();
        let first = token(home.path()).unwrap();
        assert!(token(home.path()).unwrap().is(&first));
        let path = home.path().join("token");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        std::fs::write(&path, "short").unwrap();
        assert!(matches!(token(home.path()), Err(TokenError::Short { .. })));
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "x".repeat(40)).unwrap();
        assert!(matches!(
            token(home.path()),
            Err(TokenError::Open { mode: 0o644, .. })
        ));
    }
}

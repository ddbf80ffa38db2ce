//! Where people of an organisation sign in instead of typing a password here.
use camino::Utf8PathBuf;
use serde::Deserialize;
use url::Url;
use vestibule_api::{ids::OrganisationName, people::Role};

/// `[oidc]`: an `OpenID` Provider at which people sign in to the dashboard.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OidcConfig {
    /// The issuer, `https://login.example.com`: its `/.well-known/openid-configuration` names the rest. `http` on loopback
    /// only.
    pub issuer: String,
    /// What this installation is registered as, with the redirect URI `<public_url>/api/login/oidc/callback`.
    pub client_id: String,
    /// A file, 0600, with the client's secret; none: a public client, which PKCE protects alone.
    pub client_secret_file: Option<Utf8PathBuf>,
    /// What the button of the dashboard says: *Sign in with …*.
    #[serde(default = "name")]
    pub name: String,
    #[serde(default = "scopes")]
    pub scopes: Vec<String>,
    /// The claim that is a user's name here. `email` counts only where `email_verified` is true.
    #[serde(default = "name_claim")]
    pub name_claim: String,
    /// Role of people who come for the first time; none: only users whom an admin has made without a password.
    pub role: Option<Role>,
    /// Organisation of people who come for the first time.
    pub organisation: Option<OrganisationName>,
    /// A file of further certificate authorities, PEM, for an issuer inside.
    pub ca_file: Option<Utf8PathBuf>,
}

fn name() -> String {
    "your organisation".to_owned()
}

fn scopes() -> Vec<String> {
    ["openid", "profile", "email"].map(str::to_owned).into()
}

fn name_claim() -> String {
    "email".to_owned()
}

impl OidcConfig {
    /// The first key with a value that can't be, and what was expected there.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let wrong = |key: &str, what: String| Err((format!("oidc.{key}"), what));
        if !is_endpoint(&self.issuer) || self.issuer.contains(['?', '#']) {
            let what = format!(
                "`{}`; expected an `https://` URL without query (`http://` on loopback)",
                self.issuer
            );
            return wrong("issuer", what);
        }
        if self.client_id.is_empty() {
            return wrong(
                "client_id",
                "empty; expected what the issuer gave".to_owned(),
            );
        }
        if self.name.is_empty() || self.name.chars().count() > 60 {
            return wrong("name", "expected 1 to 60 characters".to_owned());
        }
        if self.name_claim.is_empty() {
            return wrong("name_claim", "empty; expected a claim's name".to_owned());
        }
        if !self.scopes.iter().any(|scope| scope == "openid") {
            return wrong("scopes", "without `openid` there is no identity".to_owned());
        }
        match (self.role, &self.organisation) {
            (Some(Role::Admin), _) => wrong(
                "role",
                "whoever comes for the first time can't be an admin; make the user with `vestibule user add --oidc`"
                    .to_owned(),
            ),
            (None, Some(_)) => wrong("organisation", "is of no use without `role`".to_owned()),
            (_, _) => Ok(()),
        }
    }
}

/// Whether secrets may be sent there: TLS, or this very host.
pub(crate) fn is_endpoint(text: &str) -> bool {
    Url::parse(text).is_ok_and(|url| {
        let local = match url.host() {
            Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
            Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
            Some(url::Host::Domain(name)) => name == "localhost",
            None => return false,
        };
        let bare = url.username().is_empty() && url.password().is_none();
        bare && (url.scheme() == "https" || (url.scheme() == "http" && local))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_secrets_go_by_tls_or_nowhere_else() {
        for good in [
            "https://a.example",
            "https://a.example:8443/realms/x",
            "http://127.0.0.1:1",
            "http://[::1]/",
        ] {
            assert!(is_endpoint(good), "{good}");
        }
        for bad in [
            "http://a.example",
            "https://a:b@a.example",
            "ftp://127.0.0.1",
            "a.example",
            "http://127.0.0.1.example",
        ] {
            assert!(!is_endpoint(bad), "{bad}");
        }
    }
}

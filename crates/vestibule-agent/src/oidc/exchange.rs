//! The protocol itself: what is asked of the issuer, what comes back, and each check that it has to pass.
use super::{
    REDIRECT,
    http::{self, HttpError},
};
use crate::{agent::Agent, capture::claims, home::HomeError, login::url::host_of};
use oauth2::{
    AuthUrl, AuthorizationCode, Client, ClientId, CsrfToken, ExtraTokenFields, PkceCodeChallenge,
    PkceCodeVerifier, RedirectUrl, RequestTokenError, Scope, StandardRevocableToken,
    StandardTokenResponse, TokenResponse as _, TokenUrl,
    basic::{
        BasicErrorResponse, BasicErrorResponseType, BasicRevocationErrorResponse,
        BasicTokenIntrospectionResponse, BasicTokenType,
    },
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use url::Url;
use vestibule_api::{cause::Cause, pack::Oidc, time::Timestamp};
use zeroize::Zeroizing;

/// A clock that lags behind the issuer's by so many seconds is forgiven.
const CLOCK_SKEW_S: i64 = 60;

/// Why the agent did not get a credential. Texts hold no code, token or state.
#[derive(Debug, thiserror::Error)]
pub(super) enum OidcError {
    #[error("use the issuer `{0}`: it is not an https URL without query")]
    Issuer(String),
    #[error("ask the issuer for its endpoints")]
    Discovery(#[source] HttpError),
    #[error("ask the issuer for its endpoints: it answered {status}")]
    DiscoveryStatus { status: u16 },
    #[error("understand the issuer's endpoints")]
    Metadata(#[source] serde_json::Error),
    #[error("trust the issuer's endpoints: they are those of `{found}`, not of `{asked}`")]
    OtherIssuer { asked: String, found: String },
    #[error("use the issuer's {0}: it is not an https URL")]
    Endpoint(&'static str),
    #[error(
        "use the issuer's {what}: its host `{host}` is neither the issuer's own nor one that pack or configuration names"
    )]
    Host { what: &'static str, host: String },
    #[error("the redirect carries another state than the one sent")]
    State,
    #[error("the redirect comes from `{0}`, not from the issuer that was asked (RFC 9207)")]
    RedirectIssuer(String),
    #[error("the provider said `access_denied`")]
    Denied,
    #[error("the provider said `{0}`")]
    Refused(String),
    #[error("redeem the code: no answer from the {what} within {seconds} s")]
    Silent { what: &'static str, seconds: u64 },
    #[error("redeem the code")]
    TokenRequest(#[source] HttpError),
    #[error("redeem the code: the token endpoint's reply is not one ({0})")]
    TokenReply(String),
    #[error("redeem the code: the token endpoint said `{code}`: {text}")]
    Token {
        code: String,
        text: String,
        cause: Cause,
    },
    #[error("accept the id_token: {0}")]
    IdToken(&'static str),
    #[error("encode the credential")]
    Encode(#[source] serde_json::Error),
    #[error("write the credential")]
    Write(#[source] HomeError),
}

impl OidcError {
    pub(super) fn cause(&self) -> Cause {
        match self {
            Self::Issuer(_)
            | Self::Metadata(_)
            | Self::OtherIssuer { .. }
            | Self::Endpoint(_)
            | Self::Host { .. } => Cause::PackIncompatible,
            Self::Discovery(_) | Self::DiscoveryStatus { .. } => Cause::EgressUnreachable,
            Self::State | Self::RedirectIssuer(_) => Cause::StateMismatch,
            Self::Denied => Cause::ConsentDenied,
            Self::Silent {
                what: "discovery", ..
            } => Cause::EgressUnreachable,
            Self::Token { cause, .. } => *cause,
            Self::Refused(_)
            | Self::Silent { .. }
            | Self::TokenRequest(_)
            | Self::TokenReply(_) => Cause::TokenEndpointFailed,
            Self::IdToken(_) | Self::Encode(_) | Self::Write(_) => Cause::CredentialInvalid,
        }
    }

    /// What the person is told.
    pub(super) fn advice(&self) -> &'static str {
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "the person needs three answers, not one for each cause"
        )]
        match self.cause() {
            Cause::ConsentDenied => {
                "The access was not allowed. Nothing was stored. You can start again from the dashboard."
            }
            Cause::StateMismatch => {
                "This redirect belongs to another attempt. Start again from the dashboard, in one window."
            }
            _ => {
                "The provider did not give what was asked for. The dashboard says why; you can start again from there."
            }
        }
    }
}

/// OpenID Connect Discovery 1.0 section 3; what else stands there is not needed.
#[derive(Debug, Deserialize)]
struct Metadata {
    issuer: String,
    authorization_endpoint: String,
    token_endpoint: String,
}

/// Every member of a token response besides OAuth's own: `id_token` and whatever the provider adds.
#[derive(Debug, Serialize, Deserialize)]
struct Extra {
    #[serde(flatten)]
    members: Map<String, Value>,
}

impl ExtraTokenFields for Extra {}

type Tokens = StandardTokenResponse<Extra, BasicTokenType>;
type OauthClient = Client<
    BasicErrorResponse,
    Tokens,
    BasicTokenIntrospectionResponse,
    StandardRevocableToken,
    BasicRevocationErrorResponse,
>;

/// One attempt, between its page and its redirect.
pub(super) struct Pending {
    /// The page for the person.
    pub(super) page: Url,
    token_endpoint: TokenUrl,
    state: CsrfToken,
    nonce: String,
    verifier: PkceCodeVerifier,
}

/// The client of one issuer.
pub(super) struct Exchange {
    agent: Arc<Agent>,
    oidc: Oidc,
    allow_http: bool,
    /// Hosts that endpoints may have besides the issuer's own, compared exactly.
    hosts: Vec<String>,
}

/// Whether a query string is an authorization response (RFC 6749 section 4.1.2): it has a code or an error.
pub(super) fn is_answer(query: &str) -> bool {
    url::form_urlencoded::parse(query.as_bytes()).any(|(key, _)| key == "code" || key == "error")
}

impl Exchange {
    pub(super) fn new(agent: Arc<Agent>, oidc: Oidc, allow_http: bool, hosts: Vec<String>) -> Self {
        Self {
            agent,
            oidc,
            allow_http,
            hosts,
        }
    }

    /// Asks the issuer for its endpoints and makes the page's URL.
    pub(super) async fn begin(&self) -> Result<Pending, OidcError> {
        let metadata = self.discover().await?;
        let authorization =
            self.endpoint(&metadata.authorization_endpoint, "authorization endpoint")?;
        let token_endpoint =
            TokenUrl::from_url(self.endpoint(&metadata.token_endpoint, "token endpoint")?);
        let (challenge, verifier) = PkceCodeChallenge::new_random_sha256();
        let nonce = CsrfToken::new_random().secret().clone();
        let client = self
            .client()?
            .set_auth_uri(AuthUrl::from_url(authorization));
        let (page, state) = client
            .authorize_url(CsrfToken::new_random)
            .add_scopes(self.oidc.scopes.iter().cloned().map(Scope::new))
            .add_extra_param("nonce", nonce.clone())
            .set_pkce_challenge(challenge)
            .url();
        Ok(Pending {
            page,
            token_endpoint,
            state,
            nonce,
            verifier,
        })
    }

    /// Checks the redirect's `query`, redeems its code, and returns the credential file's bytes.
    pub(super) async fn redeem(
        &self,
        pending: Pending,
        query: &str,
    ) -> Result<Zeroizing<Vec<u8>>, OidcError> {
        let code = self.answer(&pending, query)?;
        let client = self.client()?.set_token_uri(pending.token_endpoint);
        let send = |request| http::send(Arc::clone(&self.agent), request);
        let request = client
            .exchange_code(AuthorizationCode::new(code))
            .set_pkce_verifier(pending.verifier);
        let tokens = request.request_async(&send).await.map_err(token_error)?;
        self.check_id_token(&tokens, &pending.nonce, Timestamp::now())?;
        self.encode(&tokens, Timestamp::now())
    }

    async fn discover(&self) -> Result<Metadata, OidcError> {
        let issuer = &self.oidc.issuer;
        let parsed = self
            .secure(issuer)
            .map_err(|()| OidcError::Issuer(issuer.clone()))?;
        if parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(OidcError::Issuer(issuer.clone()));
        }
        let address = format!(
            "{}/.well-known/openid-configuration",
            issuer.trim_end_matches('/')
        );
        let request = hyper::Request::get(address)
            .body(Vec::new())
            .map_err(|_| OidcError::Issuer(issuer.clone()))?;
        let reply = http::send(Arc::clone(&self.agent), request)
            .await
            .map_err(OidcError::Discovery)?;
        if !reply.status().is_success() {
            return Err(OidcError::DiscoveryStatus {
                status: reply.status().as_u16(),
            });
        }
        let metadata: Metadata =
            serde_json::from_slice(reply.body()).map_err(OidcError::Metadata)?;
        // Section 4.3: exactly the issuer that was asked, or somebody could put endpoints of theirs in its place.
        if metadata.issuer != *issuer {
            return Err(OidcError::OtherIssuer {
                asked: issuer.clone(),
                found: metadata.issuer,
            });
        }
        Ok(metadata)
    }

    /// An endpoint that the issuer named. The document comes from a server, so it does not decide where the person is
    /// sent, nor where the code goes: the host is the issuer's, at the issuer's port, or one that pack or configuration
    /// names.
    fn endpoint(&self, text: &str, what: &'static str) -> Result<Url, OidcError> {
        let url = self
            .secure(text)
            .ok()
            .filter(|url| url.username().is_empty() && url.password().is_none())
            .ok_or(OidcError::Endpoint(what))?;
        let host = host_of(&url);
        let issuers = Url::parse(&self.oidc.issuer).is_ok_and(|issuer| {
            host_of(&issuer) == host
                && issuer.port_or_known_default() == url.port_or_known_default()
        });
        // As for a tool's page: a test server has the port that it got, others the scheme's own.
        let port_fits = self.allow_http || url.port().is_none();
        let named = self
            .hosts
            .iter()
            .any(|named| named.eq_ignore_ascii_case(&host));
        if issuers || (named && port_fits) {
            return Ok(url);
        }
        let host = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host,
        };
        Err(OidcError::Host { what, host })
    }

    fn secure(&self, text: &str) -> Result<Url, ()> {
        let url = Url::parse(text).map_err(drop)?;
        let good = url.scheme() == "https" || (url.scheme() == "http" && self.allow_http);
        if good && url.has_host() {
            Ok(url)
        } else {
            Err(())
        }
    }

    fn client(&self) -> Result<OauthClient, OidcError> {
        let redirect =
            RedirectUrl::new(REDIRECT.to_owned()).map_err(|_| OidcError::Endpoint("redirect"))?;
        Ok(OauthClient::new(ClientId::new(self.oidc.client_id.clone())).set_redirect_uri(redirect))
    }

    /// The code in the redirect. The state is looked at first: an error without it is somebody else's.
    fn answer(&self, pending: &Pending, query: &str) -> Result<String, OidcError> {
        let find = |name: &str| {
            url::form_urlencoded::parse(query.as_bytes())
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.into_owned())
        };
        if find("state").as_deref() != Some(pending.state.secret()) {
            return Err(OidcError::State);
        }
        if let Some(other) = find("iss").filter(|iss| *iss != self.oidc.issuer) {
            return Err(OidcError::RedirectIssuer(other));
        }
        match find("error").as_deref() {
            Some("access_denied") => Err(OidcError::Denied),
            Some(other) => Err(OidcError::Refused(other.chars().take(64).collect())),
            None => {
                find("code").ok_or_else(|| OidcError::Refused("neither code nor error".to_owned()))
            }
        }
    }

    /// OpenID Connect Core 1.0 section 3.1.3.7: issuer, audience, expiry and nonce. The signature is not checked: item 6
    /// allows TLS to vouch for the issuer where the token came from its token endpoint directly, as it did (with an `http`
    /// issuer, which only an operator's override allows, nothing vouches for anything).
    fn check_id_token(
        &self,
        tokens: &Tokens,
        nonce: &str,
        now: Timestamp,
    ) -> Result<(), OidcError> {
        let token = tokens
            .extra_fields()
            .members
            .get("id_token")
            .and_then(Value::as_str);
        let Some(token) = token else {
            let asked = self.oidc.scopes.iter().any(|scope| scope == "openid");
            return if asked {
                Err(OidcError::IdToken("there is none"))
            } else {
                Ok(())
            };
        };
        let claims = claims(token).ok_or(OidcError::IdToken("it is not a JWT"))?;
        if claims["iss"] != self.oidc.issuer.as_str() {
            return Err(OidcError::IdToken("it is another issuer's"));
        }
        let client = self.oidc.client_id.as_str();
        let audience = match &claims["aud"] {
            Value::Array(many) => {
                many.iter().any(|one| one == client) && (many.len() == 1 || claims["azp"] == client)
            }
            Value::String(one) => one == client,
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => false,
        };
        if !audience {
            return Err(OidcError::IdToken("it is for another client"));
        }
        let expires = claims["exp"]
            .as_i64()
            .ok_or(OidcError::IdToken("it has no expiry"))?;
        if expires + CLOCK_SKEW_S < now.as_micros() / 1_000_000 {
            return Err(OidcError::IdToken("it has expired"));
        }
        if claims["nonce"] == nonce {
            Ok(())
        } else {
            Err(OidcError::IdToken("its nonce is not the one sent"))
        }
    }

    /// The token response as it came, and what a consumer needs to use it.
    fn encode(&self, tokens: &Tokens, now: Timestamp) -> Result<Zeroizing<Vec<u8>>, OidcError> {
        let mut file = serde_json::to_value(tokens).map_err(OidcError::Encode)?;
        file["issuer"] = json!(self.oidc.issuer);
        file["client_id"] = json!(self.oidc.client_id);
        if let Some(lifetime) = tokens.expires_in() {
            file["expires_at"] = json!(now.plus(lifetime).as_micros() / 1_000_000);
        }
        let mut bytes =
            Zeroizing::new(serde_json::to_vec_pretty(&file).map_err(OidcError::Encode)?);
        bytes.push(b'\n');
        Ok(bytes)
    }
}

/// RFC 6749 section 5.2 has one code, `invalid_grant`, for a code that is used or too old and (RFC 7636 section 4.6) for a
/// wrong verifier; the description tells them apart where the provider writes one.
fn token_error(err: RequestTokenError<HttpError, BasicErrorResponse>) -> OidcError {
    match err {
        RequestTokenError::ServerResponse(said) => {
            let text: String = said
                .error_description()
                .cloned()
                .unwrap_or_default()
                .chars()
                .take(200)
                .collect();
            let lower = text.to_ascii_lowercase();
            let verifier = ["verifier", "pkce", "challenge"]
                .iter()
                .any(|word| lower.contains(word));
            let cause = match said.error() {
                BasicErrorResponseType::InvalidGrant if verifier => Cause::VerifierRefused,
                BasicErrorResponseType::InvalidGrant => Cause::CodeExpired,
                BasicErrorResponseType::InvalidClient
                | BasicErrorResponseType::InvalidRequest
                | BasicErrorResponseType::InvalidScope
                | BasicErrorResponseType::UnauthorizedClient
                | BasicErrorResponseType::UnsupportedGrantType
                | BasicErrorResponseType::Extension(_) => Cause::TokenEndpointFailed,
            };
            OidcError::Token {
                code: said.error().as_ref().to_owned(),
                text,
                cause,
            }
        }
        RequestTokenError::Request(err) => OidcError::TokenRequest(err),
        // Neither text nor bytes of the reply: it may be half a token.
        RequestTokenError::Parse(err, _) => OidcError::TokenReply(format!("at `{}`", err.path())),
        RequestTokenError::Other(_) => {
            OidcError::TokenReply("it is empty or of another kind".to_owned())
        }
    }
}

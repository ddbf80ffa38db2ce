//! Who somebody is at the identity provider of their organisation: authorization code with PKCE (RFC 6749, RFC 7636), and an
//! ID token that is checked, its signature included (`OpenID` Connect Core 1.0, section 3.1.3.7).
//!
//! What an attempt needs between its page and its redirect is in a cookie of the browser that makes it: nothing is kept
//! here, and the redirect may reach another controller.
use crate::{
    config::{OidcConfig, is_endpoint},
    file,
    outbound::{self, ClientError, ReplyError},
};
use camino::Utf8PathBuf;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, jwk::JwkSet};
use oauth2::{
    AuthUrl, AuthorizationCode, Client, ClientId, ClientSecret, CsrfToken, ExtraTokenFields,
    HttpRequest, HttpResponse, PkceCodeChallenge, PkceCodeVerifier, RedirectUrl, RequestTokenError,
    Scope, StandardRevocableToken, StandardTokenResponse, TokenResponse as _, TokenUrl,
    basic::{
        BasicErrorResponse, BasicRevocationErrorResponse, BasicTokenIntrospectionResponse,
        BasicTokenType,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use std::{io, time::Duration};
use url::Url;
use vestibule_api::ids::LoginName;

/// The path of the redirect URI.
pub(crate) const CALLBACK: &str = "/api/login/oidc/callback";
/// An issuer that answers later than this does not answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Signatures that are taken: only a private key makes them.
const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// Why nobody can sign in at the identity provider.
#[derive(Debug, thiserror::Error)]
pub enum OidcSetupError {
    #[error("read `{path}`")]
    File {
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error(
        "`{path}` holds the client's secret and may be read by others (mode {mode:o}): make it 0600"
    )]
    Readable { path: Utf8PathBuf, mode: u32 },
    #[error("`{0}` is empty; expected the client's secret")]
    Empty(Utf8PathBuf),
    #[error("set up the client of the identity provider")]
    Client(#[from] ClientError),
    #[error("use `{0}` as a redirect URI")]
    Redirect(String),
}

/// Why an attempt to sign in there came to nothing. Texts hold no code, token or state.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OidcError {
    #[error(
        "the browser has no attempt under way, or another one: its cookie does not fit the redirect"
    )]
    State,
    #[error("the redirect comes from another issuer than the one that was asked (RFC 9207)")]
    RedirectIssuer,
    #[error("the provider said `{0}`")]
    Refused(String),
    #[error("ask the provider for its {what}")]
    Ask {
        what: &'static str,
        #[source]
        err: AskError,
    },
    #[error("trust the provider's endpoints: they are those of `{0}`")]
    OtherIssuer(String),
    #[error("use the provider's {0}: it is not an https URL")]
    Endpoint(&'static str),
    #[error("redeem the code: {0}")]
    Token(String),
    #[error("accept the ID token: {0}")]
    IdToken(&'static str),
    #[error("accept the ID token")]
    Jwt(#[source] jsonwebtoken::errors::Error),
    #[error("the identity has no claim `{0}` that could be a name here")]
    Name(String),
    #[error("the identity's e-mail address is not verified")]
    Unverified,
}

/// Why the provider gave nothing of use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error("no answer")]
    Http(#[from] reqwest::Error),
    #[error(transparent)]
    Read(#[from] ReplyError),
    #[error("it answered {0}")]
    Status(u16),
    #[error("its answer can't be understood")]
    Json(#[from] serde_json::Error),
    #[error("its answer can't be handed on")]
    Reply(#[from] oauth2::http::Error),
}

/// Somebody, as the provider knows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) issuer: String,
    /// Never given to another person by this issuer.
    pub(crate) subject: String,
    pub(crate) name: LoginName,
}

/// `OpenID` Connect Discovery 1.0, section 3.
#[derive(Debug, Deserialize)]
struct Metadata {
    issuer: String,
    authorization_endpoint: String,
    token_endpoint: String,
    jwks_uri: String,
    userinfo_endpoint: Option<String>,
}

/// What a token response holds besides OAuth's own.
#[derive(Debug, Serialize, Deserialize)]
struct Extra {
    id_token: Option<String>,
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

/// An attempt: where the person is sent, and what their browser keeps meanwhile.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) page: Url,
    pub(crate) cookie: String,
}

/// What [`Begun::cookie`] holds.
struct Attempt<'a> {
    state: &'a str,
    nonce: &'a str,
    verifier: &'a str,
}

impl<'a> Attempt<'a> {
    fn read(cookie: &'a str) -> Option<Self> {
        let mut parts = cookie.split('.');
        let attempt = Self {
            state: parts.next()?,
            nonce: parts.next()?,
            verifier: parts.next()?,
        };
        let whole = parts.next().is_none() && !attempt.state.is_empty();
        whole.then_some(attempt)
    }
}

/// The client of the one provider.
#[derive(Debug)]
pub(crate) struct Oidc {
    pub(crate) config: OidcConfig,
    secret: Option<ClientSecret>,
    redirect: RedirectUrl,
    http: reqwest::Client,
}

impl Oidc {
    /// The provider of the configuration, for a dashboard at `base`. Reads files.
    pub(crate) fn new(config: OidcConfig, base: &str) -> Result<Self, OidcSetupError> {
        let secret = match &config.client_secret_file {
            Some(path) => Some(read_secret(path)?),
            None => None,
        };
        let redirect = format!("{base}{CALLBACK}");
        let redirect =
            RedirectUrl::new(redirect.clone()).map_err(|_| OidcSetupError::Redirect(redirect))?;
        let http = reqwest::Client::builder()
            .timeout(PATIENCE)
            .redirect(reqwest::redirect::Policy::none());
        let http = outbound::client(http, config.ca_file.as_deref())?;
        Ok(Self {
            config,
            secret,
            redirect,
            http,
        })
    }

    /// Begins an attempt.
    pub(crate) async fn begin(&self) -> Result<Begun, OidcError> {
        let metadata = self.discover().await?;
        let page = endpoint(&metadata.authorization_endpoint, "authorization endpoint")?;
        let (challenge, verifier) = PkceCodeChallenge::new_random_sha256();
        let nonce = CsrfToken::new_random();
        let (page, state) = self
            .client()
            .set_auth_uri(AuthUrl::from_url(page))
            .authorize_url(CsrfToken::new_random)
            .add_scopes(self.config.scopes.iter().cloned().map(Scope::new))
            .add_extra_param("nonce", nonce.secret())
            .set_pkce_challenge(challenge)
            .url();
        let cookie = format!(
            "{}.{}.{}",
            state.secret(),
            nonce.secret(),
            verifier.secret()
        );
        Ok(Begun { page, cookie })
    }

    /// Who came back with the redirect's `query`, in the browser that has this cookie.
    pub(crate) async fn finish(&self, cookie: &str, query: &str) -> Result<Identity, OidcError> {
        let attempt = Attempt::read(cookie).ok_or(OidcError::State)?;
        let code = self.answer(&attempt, query)?;
        let metadata = self.discover().await?;
        let token = endpoint(&metadata.token_endpoint, "token endpoint")?;
        let client = self.client().set_token_uri(TokenUrl::from_url(token));
        let http = self.http.clone();
        let send = move |request| send(http.clone(), request);
        let tokens: Tokens = client
            .exchange_code(AuthorizationCode::new(code))
            .set_pkce_verifier(PkceCodeVerifier::new(attempt.verifier.to_owned()))
            .request_async(&send)
            .await
            .map_err(token_error)?;
        let id_token = tokens.extra_fields().id_token.as_deref();
        let id_token = id_token.ok_or(OidcError::IdToken("there is none"))?;
        let mut claims = self.check(&metadata, id_token, attempt.nonce).await?;
        let subject = text(&claims, "sub").ok_or(OidcError::IdToken("it has no subject"))?;
        if !claims.contains_key(&self.config.name_claim)
            && let Some(address) = &metadata.userinfo_endpoint
        {
            let address = endpoint(address, "userinfo endpoint")?;
            let request = self.http.get(address);
            let request = request.bearer_auth(tokens.access_token().secret());
            let more: Map<String, Value> = self.ask("userinfo", request).await?;
            // Section 5.3.2: or it is about somebody else.
            if text(&more, "sub").as_ref() != Some(&subject) {
                return Err(OidcError::IdToken("the userinfo is about another subject"));
            }
            claims.extend(more);
        }
        Ok(Identity {
            issuer: metadata.issuer,
            subject,
            name: self.name(&claims)?,
        })
    }

    fn client(&self) -> OauthClient {
        let client = OauthClient::new(ClientId::new(self.config.client_id.clone()));
        let client = client.set_redirect_uri(self.redirect.clone());
        match &self.secret {
            Some(secret) => client.set_client_secret(secret.clone()),
            None => client,
        }
    }

    /// The code in the redirect. The state is looked at first: a redirect without it is somebody else's.
    fn answer(&self, attempt: &Attempt<'_>, query: &str) -> Result<String, OidcError> {
        let find = |name: &str| {
            url::form_urlencoded::parse(query.as_bytes())
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.into_owned())
        };
        if find("state").as_deref() != Some(attempt.state) {
            return Err(OidcError::State);
        }
        if find("iss").is_some_and(|issuer| issuer != self.config.issuer) {
            return Err(OidcError::RedirectIssuer);
        }
        match (find("error"), find("code")) {
            (Some(error), _) => Err(OidcError::Refused(printable(&error, 64))),
            (None, Some(code)) => Ok(code),
            (None, None) => Err(OidcError::Refused("neither code nor error".to_owned())),
        }
    }

    async fn discover(&self) -> Result<Metadata, OidcError> {
        let issuer = self.config.issuer.trim_end_matches('/');
        let address = format!("{issuer}/.well-known/openid-configuration");
        let metadata: Metadata = self.ask("endpoints", self.http.get(address)).await?;
        // Section 4.3: exactly the issuer that was asked, or somebody could put endpoints of theirs in its place.
        if metadata.issuer == self.config.issuer {
            Ok(metadata)
        } else {
            Err(OidcError::OtherIssuer(printable(&metadata.issuer, 200)))
        }
    }

    /// The claims of an ID token that is this issuer's, for this client and this attempt, and not too old.
    async fn check(
        &self,
        metadata: &Metadata,
        token: &str,
        nonce: &str,
    ) -> Result<Map<String, Value>, OidcError> {
        let header = jsonwebtoken::decode_header(token).map_err(OidcError::Jwt)?;
        if !ALGORITHMS.contains(&header.alg) {
            return Err(OidcError::IdToken("no private key has signed it"));
        }
        let keys = endpoint(&metadata.jwks_uri, "keys")?;
        let keys: JwkSet = self.ask("keys", self.http.get(keys)).await?;
        let key = match (&header.kid, &keys.keys[..]) {
            (Some(kid), _) => keys.find(kid),
            (None, [only]) => Some(only),
            (None, _) => None,
        };
        let key = key.ok_or(OidcError::IdToken("the provider has no such key"))?;
        let key = DecodingKey::from_jwk(key).map_err(OidcError::Jwt)?;
        let mut validation = Validation::new(header.alg);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.set_issuer(&[&self.config.issuer]);
        validation.set_audience(&[&self.config.client_id]);
        validation.validate_nbf = true;
        let claims = jsonwebtoken::decode::<Map<String, Value>>(token, &key, &validation)
            .map_err(OidcError::Jwt)?
            .claims;
        // Items 4 and 5: of several audiences, the one that the token was issued to.
        let several = claims.get("aud").and_then(Value::as_array);
        let several = several.is_some_and(|all| all.len() > 1);
        let party = text(&claims, "azp");
        if (several || party.is_some()) && party.as_ref() != Some(&self.config.client_id) {
            return Err(OidcError::IdToken("it was issued to another client"));
        }
        if text(&claims, "nonce").as_deref() == Some(nonce) {
            Ok(claims)
        } else {
            Err(OidcError::IdToken("its nonce is another attempt's"))
        }
    }

    /// What somebody is called here.
    fn name(&self, claims: &Map<String, Value>) -> Result<LoginName, OidcError> {
        let claim = &self.config.name_claim;
        if claim == "email" && claims.get("email_verified") != Some(&Value::Bool(true)) {
            return Err(OidcError::Unverified);
        }
        text(claims, claim)
            .and_then(|name| name.to_lowercase().parse().ok())
            .ok_or_else(|| OidcError::Name(claim.clone()))
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        what: &'static str,
        request: reqwest::RequestBuilder,
    ) -> Result<T, OidcError> {
        let asked = async {
            let (status, body) = outbound::read(request.send().await?).await?;
            if !status.is_success() {
                return Err(AskError::Status(status.as_u16()));
            }
            Ok(serde_json::from_slice(&body)?)
        };
        asked.await.map_err(|err| OidcError::Ask { what, err })
    }
}

async fn send(http: reqwest::Client, request: HttpRequest) -> Result<HttpResponse, AskError> {
    let reply = http.execute(request.try_into()?).await?;
    let (status, body) = outbound::read(reply).await?;
    Ok(oauth2::http::Response::builder()
        .status(status)
        .body(body)?)
}

fn read_secret(path: &Utf8PathBuf) -> Result<ClientSecret, OidcSetupError> {
    let failed = |err| OidcSetupError::File {
        path: path.clone(),
        err,
    };
    if let Some(mode) = file::exposed(path).map_err(failed)? {
        let path = path.clone();
        return Err(OidcSetupError::Readable { path, mode });
    }
    let secret = std::fs::read_to_string(path).map_err(failed)?;
    match secret.trim() {
        "" => Err(OidcSetupError::Empty(path.clone())),
        secret => Ok(ClientSecret::new(secret.to_owned())),
    }
}

fn endpoint(text: &str, what: &'static str) -> Result<Url, OidcError> {
    let url = Url::parse(text).ok().filter(|_| is_endpoint(text));
    url.ok_or(OidcError::Endpoint(what))
}

fn text(claims: &Map<String, Value>, name: &str) -> Option<String> {
    claims.get(name)?.as_str().map(str::to_owned)
}

/// The beginning of a server's text, fit for a log.
fn printable(text: &str, most: usize) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .take(most)
        .collect()
}

fn token_error(err: RequestTokenError<AskError, BasicErrorResponse>) -> OidcError {
    match err {
        RequestTokenError::ServerResponse(said) => OidcError::Token(format!(
            "the provider said `{}`",
            printable(said.error().as_ref(), 64)
        )),
        RequestTokenError::Request(err) => OidcError::Ask {
            what: "tokens",
            err,
        },
        RequestTokenError::Parse(..) | RequestTokenError::Other(_) => {
            OidcError::Token("the provider's reply is none".to_owned())
        }
    }
}

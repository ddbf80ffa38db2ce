//! Who may ask for what: roles, users, service tokens, organisations.
use crate::{
    ids::{LoginName, OrganisationName, TokenId, UserId},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What somebody is there for. `docs/security.md` has the table of what each may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Signs in: own sessions and own credentials' metadata.
    Signer,
    /// Runs a platform: every session, VM and credential's metadata of the organisation.
    Operator,
    /// Builds images: images, and sessions of their own to try them.
    ImageEngineer,
    /// Reads the content of the organisation's credentials, and sees nothing else.
    Consumer,
    /// Everything, and people. Of the whole installation.
    Admin,
}

impl Role {
    /// Every role, in the order of the table of rights.
    pub const ALL: [Self; 5] = [
        Self::Signer,
        Self::Operator,
        Self::ImageEngineer,
        Self::Consumer,
        Self::Admin,
    ];

    /// The id on the wire, in the database and on the command line.
    pub const fn id(self) -> &'static str {
        match self {
            Self::Signer => "signer",
            Self::Operator => "operator",
            Self::ImageEngineer => "image-engineer",
            Self::Consumer => "consumer",
            Self::Admin => "admin",
        }
    }

    /// The role with this id.
    pub fn from_id(id: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.id() == id)
    }
}

impl std::str::FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ids = Self::ALL.map(Self::id).join(", ");
        Self::from_id(text).ok_or_else(|| format!("`{text}` is not a role; expected one of {ids}"))
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())
    }
}

/// How whoever asks has shown who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PrincipalKind {
    /// By `$VESTIBULE_HOME/token`, or a dashboard that was opened with a one-time link.
    Local,
    /// By name and password.
    User,
    /// By a service token.
    Token,
}

/// `GET /api/me`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MeView {
    pub kind: PrincipalKind,
    /// The user's or token's name; `local` for the local admin.
    pub name: String,
    pub role: Role,
    /// What they are confined to; none: the whole installation.
    #[serde(default)]
    pub organisation: Option<OrganisationName>,
    /// Operation ids of this API that the role may use.
    pub operations: Vec<String>,
}

/// A user.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UserView {
    pub user_id: UserId,
    pub name: LoginName,
    pub role: Role,
    #[serde(default)]
    pub organisation: Option<OrganisationName>,
    pub created_at: Timestamp,
    #[serde(default)]
    pub last_login_at: Option<Timestamp>,
}

/// A password on its way to be hashed. Never printed, and zeroed when it is dropped.
#[derive(Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, format = Password, min_length = 12, max_length = 1024)]
pub struct Password(String);

impl Password {
    /// A password of so many characters and more is taken.
    pub const MIN_CHARS: usize = 12;
    /// And none with more bytes.
    pub const MAX_BYTES: usize = 1024;

    /// What was typed.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The characters.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What is wrong with it as a new password, if anything (NIST SP 800-63B section 3.1.1: length, and no rules of composition).
    pub fn unfit(&self) -> Option<String> {
        if self.0.chars().count() < Self::MIN_CHARS {
            return Some(format!("fewer than {} characters", Self::MIN_CHARS));
        }
        if self.0.len() > Self::MAX_BYTES {
            return Some(format!("more than {} bytes", Self::MAX_BYTES));
        }
        None
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

impl Drop for Password {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.0);
    }
}

/// `POST /api/users`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NewUserRequest {
    pub name: LoginName,
    pub role: Role,
    /// None: the whole installation. An admin has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organisation: Option<OrganisationName>,
    /// None: they sign in at the identity provider, and nowhere else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<Password>,
}

/// `PUT /api/users/{name}/password`. Every dashboard of the user is signed out.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PasswordRequest {
    pub password: Password,
}

/// `PUT /api/me/password`. Every other dashboard of the user is signed out.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OwnPasswordRequest {
    /// The password until now.
    pub current: Password,
    pub password: Password,
}

/// `POST /api/login/password`: signs a dashboard in.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PasswordLoginRequest {
    pub name: String,
    pub password: Password,
}

/// `GET /api/login/methods`: how somebody can sign in to the dashboard besides by name and password.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoginMethods {
    /// At an identity provider: open `/api/login/oidc`.
    #[serde(default)]
    pub oidc: Option<OidcMethod>,
}

/// An identity provider, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct OidcMethod {
    /// *Sign in with …*
    pub name: String,
}

/// Why a sign-in at the identity provider came to nothing, as `signIn` in the address that the browser is sent back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignInProblem {
    /// The person said no there.
    Denied,
    /// The browser has no attempt under way: it took too long, or was another one's.
    Expired,
    /// The provider does not answer, or answers what can't be trusted.
    Provider,
    /// What the provider says of the person is no name here, or not verified.
    Name,
    /// There is no such user.
    Unknown,
    /// The name is somebody else's here.
    Taken,
}

impl SignInProblem {
    /// The word in the address.
    pub const fn id(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Expired => "expired",
            Self::Provider => "provider",
            Self::Name => "name",
            Self::Unknown => "unknown",
            Self::Taken => "taken",
        }
    }
}

/// A service token, without the token itself.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenView {
    pub token_id: TokenId,
    pub name: LoginName,
    pub role: Role,
    #[serde(default)]
    pub organisation: Option<OrganisationName>,
    /// Who made it.
    pub created_by: String,
    pub created_at: Timestamp,
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// To the minute.
    #[serde(default)]
    pub last_used_at: Option<Timestamp>,
}

/// `POST /api/tokens`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NewTokenRequest {
    /// Which program it is for.
    pub name: LoginName,
    pub role: Role,
    /// None: the whole installation. An admin has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organisation: Option<OrganisationName>,
    /// Seconds until it is worth nothing, 60 to 315,360,000 (ten years); none: until it is revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 60, maximum = 315_360_000)]
    pub expires_in_s: Option<u64>,
}

/// `201` of `POST /api/tokens`: the only time that the token is shown.
#[derive(Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct NewTokenReply {
    /// For `Authorization: Bearer`.
    pub token: String,
    pub details: TokenView,
}

impl fmt::Debug for NewTokenReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewTokenReply")
            .field("details", &self.details)
            .finish_non_exhaustive()
    }
}

/// An organisation: users, tokens, sessions and credentials of one see nothing of another's.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct OrganisationView {
    pub name: OrganisationName,
    /// Sessions at a time; none: `limits.live_per_organisation` of the configuration.
    #[serde(default)]
    pub max_live: Option<u32>,
    pub created_at: Timestamp,
    /// Sessions that have not ended.
    pub live: u32,
}

/// `POST /api/organisations`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NewOrganisationRequest {
    pub name: OrganisationName,
    /// Sessions at a time; none: `limits.live_per_organisation` of the configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 1_000_000)]
    pub max_live: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_have_one_id() {
        for role in Role::ALL {
            assert_eq!(role.id().parse(), Ok(role));
            assert_eq!(serde_json::to_value(role).unwrap(), role.id());
        }
        assert!("root".parse::<Role>().is_err());
    }

    #[test]
    fn a_password_is_long_enough_and_never_printed() {
        let password = |text: &str| Password::new(text.to_owned());
        assert_eq!(password("correct horse").unfit(), None);
        assert!(password("short").unfit().is_some());
        assert!(password(&"x".repeat(1025)).unfit().is_some());
        assert!(!format!("{:?}", password("correct horse")).contains("horse"));
    }
}

//! Identifiers. Each is a type of its own, so that a session is never passed where a machine is meant.
//! Names of host resources (directories, sockets) derive from the whole id, never from a prefix.
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Why a text is not an identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct InvalidId {
    text: String,
    expected: &'static str,
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(transparent)]
        #[schema(value_type = String, format = "uuid")]
        pub struct $name(uuid::Uuid);

        impl $name {
            /// A new UUIDv7 (RFC 9562 section 5.7): unique, and sorted by time of creation.
            #[must_use]
            pub fn generate() -> Self {
                Self(uuid::Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                uuid::Uuid::try_parse(text)
                    .map(Self)
                    .map_err(|_| InvalidId { text: text.chars().take(64).collect(), expected: $what })
            }
        }
    };
}

uuid_id!(
    /// What somebody asked for: one sign-in. Owned by the controller.
    SessionId, "a session id (a UUID)");
uuid_id!(
    /// One life of a VM. Owned by its runner.
    MachineId, "a VM id (a UUID)");
uuid_id!(
    /// One home directory with the VMs of its machine, among those that share a database.
    HostId, "a host id (a UUID)");
uuid_id!(
    /// One sealed credential in the vault.
    CredentialId, "a credential id (a UUID)");

uuid_id!(
    /// Somebody who signs in to the dashboard by name and password.
    UserId, "a user id (a UUID)");
uuid_id!(
    /// A program that asks with a token of its own.
    TokenId, "a token id (a UUID)");
uuid_id!(
    /// Users, tokens, sessions and credentials that belong together.
    OrganisationId, "an organisation id (a UUID)");

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $pattern:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schema(value_type = String, pattern = $pattern)]
        pub struct $name(String);

        impl $name {
            /// The identifier as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                let valid: fn(&str) -> bool = $valid;
                if valid(&text) {
                    Ok(Self(text))
                } else {
                    Err(InvalidId { text: text.chars().take(96).collect(), expected: $what })
                }
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

fn is_slug(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
        && text.bytes().next().is_some_and(|b| b.is_ascii_lowercase())
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn is_login_name(text: &str) -> bool {
    let inner = |b: u8| {
        b.is_ascii_lowercase()
            || b.is_ascii_digit()
            || matches!(b, b'-' | b'_' | b'.' | b'@' | b'+')
    };
    (1..=128).contains(&text.len())
        && text.bytes().all(inner)
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        // What the local admin is called.
        && text != "local"
}

text_id!(
    /// The name of a user or of a service token: `alice`, `bob@example.com`. Lower-case letters, digits and `-_.@+`, at most
    /// 128, and not `local`.
    LoginName, "a name (lower-case letters, digits, `-_.@+`; it begins with a letter or digit and is not `local`)",
    r"^(?!local$)[a-z0-9][a-z0-9_.@+-]{0,127}$", is_login_name);
text_id!(
    /// The name of an organisation. Same alphabet as [`ProviderId`].
    OrganisationName, "an organisation's name (lower-case letters, digits, `-`, `_`; it begins with a letter)",
    r"^[a-z][a-z0-9_-]{0,63}$", is_slug);
text_id!(
    /// The id of a provider pack: `codex`, `gh`. Lower-case letters, digits, `-` and `_`, at most 64.
    ProviderId, "a provider id (lower-case letters, digits, `-`, `_`; it begins with a letter)",
    r"^[a-z][a-z0-9_-]{0,63}$", is_slug);
text_id!(
    /// The name that points to an image: `browser`. Same alphabet as [`ProviderId`].
    AliasName, "an image alias (lower-case letters, digits, `-`, `_`; it begins with a letter)",
    r"^[a-z][a-z0-9_-]{0,63}$", is_slug);
text_id!(
    /// An image's identity: SHA-256, in lower-case hex, of its manifest's bytes (which name every artifact's digest).
    ImageDigest, "an image digest (64 lower-case hex digits)", "^[0-9a-f]{64}$", is_sha256);

text_id!(
    /// A memory snapshot's identity: SHA-256, in lower-case hex, of its manifest's bytes (which name each file's digest).
    SnapshotId, "a snapshot id (64 lower-case hex digits)", "^[0-9a-f]{64}$", is_sha256);

impl SnapshotId {
    /// The first twelve digits, for people. Never a key.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl ImageDigest {
    /// The first twelve digits, for people. Never a key.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_refuse_what_they_are_not() {
        for bad in ["", "Codex", "-x", "1x", "a/b", "a b", "../x"] {
            assert!(ProviderId::from_str(bad).is_err(), "{bad}");
        }
        assert!(ImageDigest::from_str(&"a".repeat(63)).is_err());
        assert!(ImageDigest::from_str(&"A".repeat(64)).is_err());
        assert!(SessionId::from_str("not-a-uuid").is_err());
    }

    #[test]
    fn ids_survive_the_wire() {
        let id = SessionId::generate();
        let text = serde_json::to_string(&id).unwrap();
        assert_eq!(serde_json::from_str::<SessionId>(&text).unwrap(), id);
        assert_eq!(SessionId::from_str(&id.to_string()).unwrap(), id);
    }
}

//! Who asks, whose an object is, and passwords.
pub(crate) mod limits;
pub(crate) mod password;

use serde::{Deserialize, Serialize};
use vestibule_api::{
    ids::{OrganisationId, OrganisationName},
    people::{PrincipalKind, Role},
};

/// The id and the name of the local admin.
pub(crate) const LOCAL: &str = "local";

/// Whoever asks, once they have shown who they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Principal {
    pub(crate) kind: PrincipalKind,
    /// The user's or token's id, or [`LOCAL`].
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) role: Role,
    /// What they are confined to; none: the whole installation.
    pub(crate) organisation: Option<Organisation>,
}

/// An organisation, by what it is known under.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Organisation {
    pub(crate) id: OrganisationId,
    pub(crate) name: OrganisationName,
}

impl Principal {
    /// Whoever has the home's token, or the dashboard that it opened.
    pub(crate) fn local() -> Self {
        Self {
            kind: PrincipalKind::Local,
            id: LOCAL.to_owned(),
            name: LOCAL.to_owned(),
            role: Role::Admin,
            organisation: None,
        }
    }

    /// The owner of what they make.
    pub(crate) fn owner(&self) -> Owner {
        let organisation = self.organisation.as_ref();
        Owner {
            id: self.id.clone(),
            organisation: organisation.map_or_else(String::new, |of| of.id.to_string()),
        }
    }

    /// As they stand in the audit log.
    pub(crate) fn actor(&self) -> String {
        match self.kind {
            PrincipalKind::Local => "api:local".to_owned(),
            PrincipalKind::User => format!("user:{}", self.name),
            PrincipalKind::Token => format!("token:{}", self.name),
        }
    }
}

/// Whose an object is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    /// A user's or token's id, or [`LOCAL`].
    pub(crate) id: String,
    /// The organisation's id; empty: none.
    pub(crate) organisation: String,
}

impl Owner {
    /// The local admin's.
    pub(crate) fn local() -> Self {
        Self {
            id: LOCAL.to_owned(),
            organisation: String::new(),
        }
    }
}

//! The one table of rights: which role may use which operation, on whose objects. The guard asks it before a handler runs;
//! an operation that is not in it can't be used. `docs/security.md` shows it.
mod table;

use crate::{
    people::{Owner, Principal},
    store::Scope,
};
use std::fmt::Write as _;
use table::RULES;
use vestibule_api::people::Role;

/// What an operation is about: where in its path the id of an object stands, and of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Object {
    /// Nothing that belongs to somebody, or a list of what does.
    None,
    Session,
    Machine,
    Credential,
}

/// How far a right goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Not at all: status 403.
    None,
    /// What whoever asks owns. Everything else is not there: status 404.
    Own,
    /// What belongs to the organisation of whoever asks; to whoever is of none, everything.
    Organisation,
    /// Everything of the installation; nothing to whoever is confined to an organisation.
    All,
    /// What is nobody's in particular.
    Yes,
}

impl Reach {
    const fn word(self) -> &'static str {
        match self {
            Self::None => "–",
            Self::Own => "own",
            Self::Organisation => "organisation",
            Self::All => "all",
            Self::Yes => "yes",
        }
    }
}

/// What has to be shown before an operation is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// Nothing.
    Open,
    /// A ticket, which says what it is for. Without an upgrade to a WebSocket: what the ticket itself needs.
    Ticket([Reach; Role::ALL.len()]),
    /// The home's token itself, not a dashboard that it opened.
    HomeToken,
    /// One of these roles, in the order of [`Role::ALL`].
    Roles([Reach; Role::ALL.len()]),
}

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    method: &'static str,
    path: &'static str,
    pub(crate) operation: &'static str,
    pub(crate) object: Object,
    pub(crate) gate: Gate,
}

/// The rule of an operation: method (a `HEAD` is a `GET`) and the route's template.
pub(crate) fn find(method: &str, path: &str) -> Option<&'static Rule> {
    let method = if method == "HEAD" { "GET" } else { method };
    RULES
        .iter()
        .find(|rule| rule.method == method && rule.path == path)
}

/// How far the right of `role` goes where these are granted.
pub(crate) fn reach(granted: &[Reach; Role::ALL.len()], role: Role) -> Reach {
    Role::ALL
        .iter()
        .zip(granted)
        .find_map(|(known, reach)| (*known == role).then_some(*reach))
        .unwrap_or(Reach::None)
}

impl Reach {
    /// How far it goes for this one: to somebody who is confined to an organisation, *all* is nothing.
    pub(crate) fn of(self, principal: &Principal) -> Self {
        let confined = principal.organisation.is_some();
        if self == Self::All && confined {
            Self::None
        } else {
            self
        }
    }

    /// The objects that it reaches; none: no object at all.
    pub(crate) fn scope(self, principal: &Principal) -> Option<Scope> {
        match (self, &principal.organisation) {
            (Self::None, _) => None,
            (Self::Own, _) => Some(Scope::Own(principal.id.clone())),
            (Self::Organisation, Some(of)) => Some(Scope::Organisation(of.id.to_string())),
            (Self::All, Some(_)) => None,
            (Self::Organisation | Self::All, None) | (Self::Yes, _) => Some(Scope::All),
        }
    }

    /// Whether it reaches an object of this owner's.
    pub(crate) fn has(self, principal: &Principal, owner: &Owner) -> bool {
        self.scope(principal).is_some_and(|scope| scope.has(owner))
    }
}

/// Ids of the operations that somebody may use on anything at all.
pub(crate) fn operations(principal: &Principal) -> Vec<String> {
    let may = |rule: &&Rule| match &rule.gate {
        Gate::Open => true,
        Gate::HomeToken => false,
        Gate::Ticket(granted) | Gate::Roles(granted) => {
            reach(granted, principal.role).of(principal) != Reach::None
        }
    };
    let ids = RULES
        .iter()
        .filter(may)
        .map(|rule| rule.operation.to_owned());
    ids.collect()
}

/// What the table says of one operation, for tests and documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Right {
    pub operation: &'static str,
    pub method: &'static str,
    pub path: &'static str,
    /// `session`, `machine` or `credential`, where an id of one stands in the path.
    pub object: Option<&'static str>,
    pub access: Access,
}

/// Who may use an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anybody, without showing anything.
    Open,
    /// Whoever has the home's token.
    HomeToken,
    /// These roles; with `ticket`, whoever has a ticket that one of them got.
    Roles {
        reach: Vec<(Role, Reach)>,
        ticket: bool,
    },
}

/// The table, a line for each operation.
pub fn rights() -> Vec<Right> {
    let roles = |granted: &[Reach; Role::ALL.len()], ticket| Access::Roles {
        reach: Role::ALL.into_iter().zip(*granted).collect(),
        ticket,
    };
    let line = |rule: &Rule| Right {
        operation: rule.operation,
        method: rule.method,
        path: rule.path,
        object: match rule.object {
            Object::None => None,
            Object::Session => Some("session"),
            Object::Machine => Some("machine"),
            Object::Credential => Some("credential"),
        },
        access: match &rule.gate {
            Gate::Open => Access::Open,
            Gate::HomeToken => Access::HomeToken,
            Gate::Ticket(granted) => roles(granted, true),
            Gate::Roles(granted) => roles(granted, false),
        },
    };
    RULES.iter().map(line).collect()
}

/// The table in Markdown, as `docs/security.md` holds it.
pub fn rights_table() -> String {
    let names = Role::ALL.map(Role::id).join(" | ");
    let mut text = format!(
        "| operation | {names} |\n|---|{}\n",
        "---|".repeat(Role::ALL.len())
    );
    for rule in RULES {
        let cells = match &rule.gate {
            Gate::Open => "open | ".repeat(Role::ALL.len()),
            Gate::HomeToken => format!("{}home token | ", "– | ".repeat(Role::ALL.len() - 1)),
            Gate::Ticket(granted) | Gate::Roles(granted) => granted
                .iter()
                .map(|reach| format!("{} | ", reach.word()))
                .collect(),
        };
        let ticket = if matches!(rule.gate, Gate::Ticket(_)) {
            " (by ticket)"
        } else {
            ""
        };
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "| `{} {}`{ticket} | {}",
            rule.method,
            rule.path,
            cells.trim_end()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::people::Organisation;
    use vestibule_api::{ids::OrganisationId, people::PrincipalKind};

    fn somebody(organisation: Option<OrganisationId>) -> Principal {
        let named = |id| Organisation {
            id,
            name: "acme".parse().unwrap(),
        };
        Principal {
            kind: PrincipalKind::User,
            id: "1".to_owned(),
            name: "ada".to_owned(),
            role: Role::Operator,
            organisation: organisation.map(named),
        }
    }

    #[test]
    fn reaches_mean_what_they_say() {
        let (here, there) = (OrganisationId::generate(), OrganisationId::generate());
        let owner = |id: &str, of: Option<OrganisationId>| Owner {
            id: id.to_owned(),
            organisation: of.map_or_else(String::new, |of| of.to_string()),
        };
        let (own, near, far) = (
            owner("1", Some(here)),
            owner("2", Some(here)),
            owner("2", Some(there)),
        );
        let (confined, free) = (somebody(Some(here)), somebody(None));
        for (reach, principal, expected) in [
            (Reach::None, &free, [false, false, false]),
            (Reach::Own, &confined, [true, false, false]),
            (Reach::Own, &free, [true, false, false]),
            (Reach::Organisation, &confined, [true, true, false]),
            (Reach::Organisation, &free, [true, true, true]),
            (Reach::All, &confined, [false, false, false]),
            (Reach::All, &free, [true, true, true]),
        ] {
            let has = [&own, &near, &far].map(|owner| reach.has(principal, owner));
            assert_eq!(has, expected, "{reach:?} {:?}", principal.organisation);
        }
        // What is of no organisation is foreign to whoever is of one, the local admin's as well.
        assert!(!Reach::Organisation.has(&confined, &Owner::local()));
        assert!(!Reach::Own.has(&confined, &Owner::local()));
    }

    #[test]
    fn an_operation_stands_there_once() {
        for (i, rule) in RULES.iter().enumerate() {
            let same = |other: &Rule| {
                other.operation == rule.operation
                    || (other.method, other.path) == (rule.method, rule.path)
            };
            assert!(!RULES[i + 1..].iter().any(same), "{}", rule.operation);
        }
        assert_eq!(find("HEAD", "/health").unwrap().operation, "health");
        assert!(find("PATCH", "/health").is_none());
    }
}

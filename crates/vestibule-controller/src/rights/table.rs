//! The lines of the table.
use super::{
    Gate::{self, HomeToken, Open, Roles, Ticket},
    Object::{self, Credential, Machine, None as Nothing, Session},
    Reach::{self, All, None as No, Organisation as Org, Own, Yes},
    Rule,
};
use vestibule_api::people::Role;

const fn rule(
    method: &'static str,
    path: &'static str,
    operation: &'static str,
    object: Object,
    gate: Gate,
) -> Rule {
    Rule {
        method,
        path,
        operation,
        object,
        gate,
    }
}

// Signer, operator, image engineer, consumer, admin.
const EVERYBODY: Gate = Roles([Yes, Yes, Yes, Yes, Yes]);
const SESSIONS: Gate = Roles([Own, Org, Own, No, All]);
/// What only the person does for whom the session is.
const OWNER: [Reach; Role::ALL.len()] = [Own, Own, Own, No, Own];
const MACHINES: Gate = Roles([No, Org, Own, No, All]);
const CREDENTIALS: Gate = Roles([Own, Org, No, No, All]);
const INSTALLATION: Gate = Roles([No, All, No, No, All]);
const PEOPLE: Gate = Roles([No, No, No, No, All]);

#[rustfmt::skip]
pub(super) const RULES: &[Rule] = &[
    rule("POST", "/api/auth/start", "start", Nothing, SESSIONS),
    rule("GET", "/api/auth/session/{id}", "session", Session, SESSIONS),
    rule("GET", "/api/auth/session/{id}/events", "events", Session, SESSIONS),
    rule("POST", "/api/auth/session/{id}/tickets", "ticket", Session, Roles(OWNER)),
    rule("DELETE", "/api/auth/session/{id}/tickets", "revokeTickets", Session, SESSIONS),
    rule("POST", "/api/auth/session/{id}/confirm", "confirm", Session, Roles(OWNER)),
    rule("POST", "/api/auth/session/{id}/cancel", "cancel", Session, SESSIONS),
    rule("DELETE", "/api/vm/auth/{sessionId}", "endSession", Session, SESSIONS),
    rule("GET", "/api/sessions", "sessions", Nothing, SESSIONS),
    rule("GET", "/api/auth/session/{id}/view", "view", Session, Ticket(OWNER)),
    rule("GET", "/api/auth/session/{id}/terminal", "terminal", Session, Ticket(OWNER)),
    rule("GET", "/api/vms", "vms", Nothing, MACHINES),
    rule("GET", "/api/vms/{id}", "vm", Machine, MACHINES),
    rule("DELETE", "/api/vms/{id}", "endVm", Machine, MACHINES),
    rule("GET", "/api/vms/{id}/console", "console", Machine, MACHINES),
    rule("GET", "/api/vms/{id}/report", "report", Machine, MACHINES),
    rule("GET", "/api/vms/{id}/verdict", "verdict", Machine, MACHINES),
    rule("GET", "/api/vms/{id}/evidence", "evidence", Machine, MACHINES),
    rule("GET", "/api/vms/{id}/evidence/{file}", "evidenceFile", Machine, MACHINES),
    rule("GET", "/api/credentials", "credentials", Nothing, CREDENTIALS),
    rule("GET", "/api/credentials/{id}", "credential", Credential, CREDENTIALS),
    rule("DELETE", "/api/credentials/{id}", "removeCredential", Credential, CREDENTIALS),
    rule("POST", "/api/credentials/{id}/content", "credentialContent", Credential, Roles([No, No, No, Org, All])),
    rule("GET", "/api/images", "images", Nothing, Roles([No, Yes, Yes, No, Yes])),
    rule("GET", "/api/providers", "providers", Nothing, Roles([Yes, Yes, Yes, No, Yes])),
    rule("GET", "/api/users", "users", Nothing, PEOPLE),
    rule("POST", "/api/users", "addUser", Nothing, PEOPLE),
    rule("DELETE", "/api/users/{name}", "removeUser", Nothing, PEOPLE),
    rule("PUT", "/api/users/{name}/password", "setPassword", Nothing, PEOPLE),
    rule("GET", "/api/tokens", "tokens", Nothing, PEOPLE),
    rule("POST", "/api/tokens", "addToken", Nothing, PEOPLE),
    rule("DELETE", "/api/tokens/{id}", "revokeToken", Nothing, PEOPLE),
    rule("GET", "/api/organisations", "organisations", Nothing, PEOPLE),
    rule("POST", "/api/organisations", "addOrganisation", Nothing, PEOPLE),
    rule("DELETE", "/api/organisations/{name}", "removeOrganisation", Nothing, PEOPLE),
    rule("GET", "/api/me", "me", Nothing, EVERYBODY),
    rule("PUT", "/api/me/password", "setOwnPassword", Nothing, EVERYBODY),
    rule("POST", "/api/login-codes", "loginCode", Nothing, HomeToken),
    rule("POST", "/api/login", "login", Nothing, Open),
    rule("POST", "/api/login/password", "passwordLogin", Nothing, Open),
    rule("GET", "/api/login/methods", "loginMethods", Nothing, Open),
    rule("GET", "/api/login/oidc", "oidcLogin", Nothing, Open),
    rule("GET", "/api/login/oidc/callback", "oidcCallback", Nothing, Open),
    rule("POST", "/api/logout", "logout", Nothing, EVERYBODY),
    rule("GET", "/api/hosts", "hosts", Nothing, INSTALLATION),
    rule("DELETE", "/api/hosts/{id}", "forgetHost", Nothing, PEOPLE),
    rule("GET", "/api/reconcilers", "reconcilers", Nothing, INSTALLATION),
    rule("GET", "/health", "health", Nothing, Open),
    rule("GET", "/ready", "ready", Nothing, Roles([No, Yes, Yes, No, Yes])),
    rule("GET", "/metrics", "metrics", Nothing, INSTALLATION),
    rule("GET", "/api/openapi.json", "openapi", Nothing, Roles([Yes, Yes, Yes, No, Yes])),
    rule("GET", "/docs", "docs", Nothing, Roles([Yes, Yes, Yes, No, Yes])),
];

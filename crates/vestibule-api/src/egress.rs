//! The way out of a VM: what a session may reach, and what was refused.
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// What one session may reach. Loopback, private, link-local, multicast and metadata addresses are refused whatever
/// the policy says, after the name was resolved; only a [`Pin`] of the operator's reaches one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressPolicy {
    pub mode: EgressMode,
    /// For [`EgressMode::AllowList`]: exact host names; `*.example.com` stands for every name below `example.com`.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// Names that the operator maps to an address, exempt from the refusal of private addresses: an identity provider
    /// inside the operator's network, or a test's own servers.
    #[serde(default)]
    pub pins: Vec<Pin>,
    /// PEM of certificate authorities trusted, besides the public ones, when the proxy itself speaks TLS for the
    /// agent (an absolute `https://` request).
    #[serde(default)]
    pub extra_ca_pem: Vec<String>,
    /// The user's own upstream HTTP proxy, `http://host:port`; none: dial directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
}

/// Whether the policy lists what is allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EgressMode {
    /// Nothing leaves: the state before a session claims the VM.
    #[default]
    Closed,
    /// Every public address.
    Open,
    /// The hosts of [`EgressPolicy::hosts`] only.
    AllowList,
}

/// One name with the address that the operator gives it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pin {
    /// Exact host name, without a port.
    pub host: String,
    /// The port that the guest names; none: every port.
    #[serde(default)]
    pub port: Option<u16>,
    /// Where the connection goes.
    #[schema(value_type = String)]
    pub to: SocketAddr,
}

/// Why a destination was refused or not reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EgressReason {
    /// The name or address is, or resolves to, the host's own loopback.
    Loopback,
    /// Private, shared or unique-local address space (RFC 1918, RFC 6598, RFC 4193).
    Private,
    /// Link-local (RFC 3927, RFC 4291), which includes cloud metadata services.
    LinkLocal,
    /// Any other address that is not global unicast: unspecified, multicast, documentation, reserved.
    NotGlobal,
    /// The session's policy does not list the host, or is closed.
    Policy,
    /// The request is not one that the proxy understands.
    BadRequest,
    /// The name has no address.
    NameNotFound,
    /// Connecting failed or timed out.
    Unreachable,
    /// TLS to the destination failed (only where the proxy itself speaks TLS).
    Tls,
    /// As many connections are open as one VM may have.
    TooMany,
}

//! Provider packs: what a sign-in with one provider's tool looks like, as data. One TOML file each, in `providers/`.
//!
//! A pack is a security boundary: URL hosts are exact allow-lists, the program is an absolute path, and no command ever
//! comes from a server. Packs hold no secrets.
use crate::{cause::Cause, ids::ProviderId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

mod check;
mod overrides;
mod parameters;
mod parse;
mod problem;
mod rules;

pub use check::{PACK_SCHEMA, not_host};
pub use parse::PACK_LIMIT;
pub use problem::{PackErrors, Problem};
pub use rules::is_host;

/// One pack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProviderPack {
    /// Version of this schema: 1.
    pub schema: u32,
    pub provider: Provider,
    pub terms: Terms,
    #[serde(default)]
    pub install: Option<Install>,
    #[serde(default)]
    pub detect: Option<Detect>,
    /// Values that the operator's configuration must give (`[providers.<id>.parameters]`); `${param.NAME}` stands for
    /// one, and `${param.NAME.host}` for the host of one that is a URL, in `oidc`, `url.hosts`, `browser.allow_hosts`,
    /// `env.set` and `argv`.
    #[serde(default)]
    pub parameter: Vec<Parameter>,
    /// In order of preference; the first is the default.
    pub flow: Vec<Flow>,
    pub credential: Vec<CredentialRule>,
    #[serde(default)]
    pub verify: Option<Verify>,
    #[serde(default)]
    pub cleanup: Cleanup,
    #[serde(default)]
    pub test: Option<TestOverride>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    pub id: ProviderId,
    pub name: String,
    pub vendor: String,
    pub homepage: String,
}

/// What the provider's terms say, and which hand-off of the credential they allow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Terms {
    pub url: String,
    pub note: String,
    pub handoff: Handoff,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Handoff {
    /// Only to the same person's own machines and tools.
    SamePerson,
    /// To whatever the person's organisation runs.
    Organisation,
}

/// The tool that the pack was written for. Whether an image has a tool for the pack decides whether the provider is
/// available; the rest is compared with the image by `vestibule provider check --image` only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Install {
    pub kind: InstallKind,
    pub package: String,
    /// Exact version.
    pub version: String,
    /// Absolute path of the program in the guest.
    pub bin: String,
    /// For readers: nothing compares it.
    #[serde(default)]
    pub node_min: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstallKind {
    Npm,
    Deb,
    Pip,
    Binary,
    Preinstalled,
}

/// How the tool says its version. For readers: nothing runs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Detect {
    pub version_argv: Vec<String>,
    /// Its first group is the version.
    pub version_regex: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parameter {
    pub name: String,
    pub title: String,
    /// A regular expression that the whole value matches.
    pub pattern: String,
    #[serde(default)]
    pub default: Option<String>,
}

/// One way to sign in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flow {
    pub id: String,
    pub title: String,
    pub kind: FlowKind,
    /// The program (absolute path) and its arguments; empty for [`FlowKind::Oidc`].
    #[serde(default)]
    pub argv: Vec<String>,
    #[serde(default)]
    pub cols: Option<u16>,
    #[serde(default)]
    pub rows: Option<u16>,
    #[serde(default)]
    pub term: Option<String>,
    pub timeout_s: u32,
    /// Whether the tool ends by itself after a sign-in.
    #[serde(default = "yes")]
    pub exits: bool,
    #[serde(default)]
    pub env: FlowEnv,
    /// Files, path below the home directory → content, that must exist before the tool starts.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    #[serde(default)]
    pub prompt: Vec<Prompt>,
    #[serde(default)]
    pub url: Option<UrlRule>,
    #[serde(default)]
    pub callback: Option<Callback>,
    #[serde(default)]
    pub code: Option<CodeRule>,
    #[serde(default)]
    pub browser: BrowserRule,
    #[serde(default)]
    pub done: Done,
    /// Texts on the terminal that name a cause, tried in order.
    #[serde(default)]
    pub fail: Vec<FailRule>,
    #[serde(default)]
    pub oidc: Option<Oidc>,
}

fn yes() -> bool {
    true
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FlowKind {
    /// The tool listens on the guest's loopback for the redirect.
    Loopback,
    /// RFC 8628: the person compares or types a code, the tool polls.
    Device,
    /// The page shows a code, the person pastes it into the terminal.
    PasteCode,
    /// The tool polls its vendor.
    Poll,
    /// A full-screen program with a menu.
    Tui,
    /// No tool: the agent is the OAuth client (authorization code with PKCE, RFC 7636).
    Oidc,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FlowEnv {
    pub set: BTreeMap<String, String>,
    pub unset: Vec<String>,
}

/// An answer that the person need not type: a menu's default, "press Enter".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// A regular expression on the screen's text.
    pub when: String,
    pub send: String,
    #[serde(default = "yes")]
    pub once: bool,
}

/// Where the authorization URL comes from, and which one is allowed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UrlRule {
    /// In order of preference; a later source is used only when no earlier one gave a URL within `fallback_after_s`.
    pub sources: Vec<UrlFrom>,
    /// Exact host names.
    pub hosts: Vec<String>,
    #[serde(default)]
    pub path_prefix: Option<String>,
    /// Query parameters that must be there.
    #[serde(default)]
    pub must_have: Vec<String>,
    #[serde(default)]
    pub must_not_have: Vec<String>,
    /// `http:` is accepted (only ever with an operator's override, for tests and internal servers).
    #[serde(default)]
    pub allow_http: bool,
    #[serde(default = "fallback_after")]
    pub fallback_after_s: u32,
}

fn fallback_after() -> u32 {
    10
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UrlFrom {
    Shim,
    Osc8,
    Screen,
}

/// Where the redirect goes. For readers: the tool's own listener decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Callback {
    /// `127.0.0.1` or `localhost`.
    pub host: String,
    /// Empty: ephemeral.
    #[serde(default)]
    pub ports: Vec<u16>,
    pub path: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodeRule {
    /// On the screen's text; its first group is the code shown to the person.
    pub cli_regex: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BrowserRule {
    /// What browser and tool may reach when the session's egress is an allow-list; exact, or `*.example.com`.
    pub allow_hosts: Vec<String>,
    /// URLs that mean "done" to the person. For readers: nothing acts on them.
    pub done_prefixes: Vec<String>,
    /// Origins whose pages may fetch from the guest's loopback during the sign-in: the agent writes Chromium's managed
    /// policy `LoopbackNetworkAllowedForUrls`.
    pub loopback_fetch_origins: Vec<String>,
}

/// What ends a sign-in well: always that every required credential is complete; these besides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Done {
    /// Wait for the tool to end with this status before the credential is read.
    pub exit: Option<i32>,
    pub screen_regex: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailRule {
    /// A regular expression on the terminal's screen text, or on the text of `file`.
    pub when: String,
    pub cause: Cause,
    /// A log of the tool's, path below the home directory, for what it does not say on the terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Seconds for which the expression must match without a pause: for a tool that says what it waits for, and waits
    /// for ever.
    #[serde(default)]
    pub for_s: u32,
}

/// For [`FlowKind::Oidc`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Oidc {
    /// Its `/.well-known/openid-configuration` (OpenID Connect Discovery 1.0) names the endpoints.
    pub issuer: String,
    pub client_id: String,
    pub scopes: Vec<String>,
}

/// Where the tool leaves what it got, and when that is complete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CredentialRule {
    pub id: String,
    /// Relative to the home directory.
    pub path: String,
    pub format: CredentialFormat,
    /// JSON pointers (RFC 6901) into the parsed file that must lead to a non-empty value; `*` matches any one key.
    #[serde(default)]
    pub required: Vec<String>,
    #[serde(default)]
    pub optional: bool,
    #[serde(default)]
    pub expires_at: Option<ExpiresAt>,
    /// Pointer to a name of the account that may be shown; `jwt:/pointer#/claim` looks into a JWT's claims.
    #[serde(default)]
    pub account: Option<String>,
    /// For `text`: the whole trimmed content matches.
    #[serde(default)]
    pub pattern: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CredentialFormat {
    Json,
    Jsonc,
    Toml,
    Yaml,
    Netrc,
    Text,
    Opaque,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpiresAt {
    pub pointer: String,
    pub unit: ExpiryUnit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExpiryUnit {
    Ms,
    S,
    Rfc3339,
    /// The pointer leads to a JWT; its `exp` claim counts.
    Jwt,
}

/// Asks the tool itself, after capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verify {
    pub argv: Vec<String>,
    pub offline: bool,
    #[serde(default)]
    pub ok_exit: i32,
}

/// What is left besides the credential. For readers: the VM is destroyed with all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cleanup {
    pub logout_argv: Vec<String>,
    pub leftovers: Vec<String>,
}

/// What an operator's configuration changes of a pack: `[providers.<id>]`. Applied by [`ProviderPack::apply`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Override {
    /// Further environment of the tool, in every flow.
    pub env: BTreeMap<String, String>,
    /// Further hosts, exact names, that an authorization URL may have and that the browser may reach.
    pub hosts: Vec<String>,
    /// Arguments appended to every flow's `argv`.
    pub args: Vec<String>,
    /// Files, path below the home directory → content, laid before the tool starts.
    pub files: BTreeMap<String, String>,
    /// Authorization URLs and the issuer may be `http:`.
    pub allow_http: bool,
    /// Values of the pack's parameters.
    pub parameters: BTreeMap<String, String>,
}

/// How the unmodified tool is pointed at a test server. For readers: tests set the operator's override accordingly.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TestOverride {
    /// Environment for the tool; `${TEST_BASE}` is the test server's base URL.
    pub env: BTreeMap<String, String>,
    pub files: BTreeMap<String, String>,
    /// Vendor host names that a test maps to its server.
    pub hosts: Vec<String>,
    /// Variables that name a file of certificate authorities.
    pub ca_env: Vec<String>,
    /// Arguments appended to the flow's.
    pub args: Vec<String>,
}

//! Real fakes that speak the protocol. Each is a server or client that the real parts cannot tell from the real thing:
//! tests of Vestibule use no mock of our own code.
//!
//! | module | what |
//! |---|---|
//! | [`ca`] | a certificate authority of a test's own |
//! | [`vendor`] | the servers of OpenAI, Anthropic, Google and GitHub, as far as their tools need them to sign in |
//! | [`idp`] | starts the real identity provider (`tests/idp`, npm `oidc-provider`) |
//! | [`nested`] | a machine whose KVM runs Linux, on a host that has none |
//! | [`postgres`] | a PostgreSQL server of a test process's own |
//! | [`rfb`] | an RFB client (RFC 6143) that sees and types like a person |
//! | [`person`] | what a person does in front of a screen |
//! | [`api`] | a client of the controller's API |
//! | [`runner`] | a runner without a VM, as a process |
//! | [`scan`] | looks for secrets in files and memory |
//! | [`stage`] | a controller with a home of its own, and what it must not leave behind |
//! | [`clock`] | what a guest's clock says, beside the host's |
//! | [`conformance`] | what a VM is, whatever runs it |
//! | [`bench`] | what Vestibule costs and how long a person waits, in figures |
//! | [`wait`] | bounded waits on conditions |
pub mod api;
pub mod bench;
pub mod ca;
pub mod clock;
pub mod conformance;
pub mod idp;
pub mod nested;
pub mod person;
pub mod postgres;
pub mod process;
pub mod rfb;
pub mod runner;
pub mod scan;
pub mod stage;
pub mod vendor;
pub mod wait;

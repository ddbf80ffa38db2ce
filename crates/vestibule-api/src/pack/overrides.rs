//! What an operator changes of a pack in the configuration (`[providers.<id>]`): an internal issuer, a company's extra
//! sign-in host, a tool's environment. Tests point unmodified tools at their own servers with the same means.
use super::{
    Override, ProviderPack,
    check::{self, not_host},
    problem::{PackErrors, Problems, show},
    rules::is_host,
};

impl ProviderPack {
    /// The pack as a session uses it: the override applied to every flow, parameters filled in, checked again.
    ///
    /// # Errors
    /// When the override is not well-formed, or pack and override together are not. Keys in the messages begin where
    /// `[providers.<id>]` does.
    pub fn apply(&self, change: &Override) -> Result<Self, PackErrors> {
        let mut problems = Problems::default();
        check_override(change, &mut problems);
        if !problems.is_empty() {
            return Err(problems.of(&format!("providers.{}", self.provider.id)));
        }
        let mut pack = self.clone();
        for flow in &mut pack.flow {
            for (name, value) in &change.env {
                flow.env.unset.retain(|unset| unset != name);
                flow.env.set.insert(name.clone(), value.clone());
            }
            flow.files.extend(change.files.clone());
            if !flow.argv.is_empty() {
                flow.argv.extend(change.args.iter().cloned());
            }
            if let Some(url) = &mut flow.url {
                url.hosts.extend(change.hosts.iter().cloned());
                url.allow_http |= change.allow_http;
            }
            flow.browser
                .allow_hosts
                .extend(change.hosts.iter().cloned());
        }
        pack.resolve(&change.parameters)
    }
}

fn check_override(change: &Override, problems: &mut Problems) {
    check::env_values("env", &change.env, problems);
    check::files("files", &change.files, problems);
    check::list("hosts", change.hosts.len(), problems);
    check::list("args", change.args.len(), problems);
    for (i, host) in change.hosts.iter().enumerate() {
        problems.unless(is_host(host), &format!("hosts[{i}]"), || not_host(host));
    }
    for (i, argument) in change.args.iter().enumerate() {
        problems.unless(!argument.contains('\0'), &format!("args[{i}]"), || {
            format!("{} contains a NUL byte", show(argument))
        });
    }
}

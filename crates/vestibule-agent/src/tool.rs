//! The environment that the person's programs get. What a tool finds there decides which sign-in it chooses
//! (reference/providers.md §0.3), so nothing is inherited.
use crate::guest::Guest;
use std::collections::BTreeMap;
use vestibule_api::{agent::PROXY_PORT, pack::Flow};

/// What tools and the browser have in common.
pub(crate) fn base_environment(guest: &Guest) -> BTreeMap<String, String> {
    let proxy = format!("http://127.0.0.1:{PROXY_PORT}");
    let own = "localhost,127.0.0.1,::1".to_owned();
    let user = guest
        .person
        .as_ref()
        .map_or("person", |person| person.name.as_str());
    let shell = guest
        .person
        .as_ref()
        .map_or_else(|| "/bin/sh".into(), |person| person.shell.to_string_lossy());
    let mut env = BTreeMap::new();
    let mut set = |name: &str, value: &str| drop(env.insert(name.to_owned(), value.to_owned()));
    set("HOME", &guest.home.to_string_lossy());
    set("USER", user);
    set("LOGNAME", user);
    set("SHELL", &shell);
    set(
        "PATH",
        &format!("{}:/usr/local/bin:/usr/bin:/bin", guest.shims.display()),
    );
    set("LANG", "C.UTF-8");
    set("DISPLAY", &guest.display);
    set("XAUTHORITY", &guest.xauthority.to_string_lossy());
    // One path of one program: some tools run it without a shell.
    set("BROWSER", &guest.shims.join("open-url").to_string_lossy());
    for name in [
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ] {
        set(name, &proxy);
    }
    set("NO_PROXY", &own);
    set("no_proxy", &own);
    // Node looks at the variables above only when told to.
    set("NODE_USE_ENV_PROXY", "1");
    env
}

/// What the flow's tool gets: the common part, then what the pack sets, less what it takes away.
pub(crate) fn environment(guest: &Guest, flow: &Flow) -> BTreeMap<String, String> {
    let mut env = base_environment(guest);
    env.insert(
        "TERM".to_owned(),
        flow.term
            .clone()
            .unwrap_or_else(|| "xterm-256color".to_owned()),
    );
    env.extend(flow.env.set.clone());
    for name in &flow.env.unset {
        env.remove(name);
    }
    env
}

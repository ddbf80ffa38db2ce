//! The rules of one `[[flow]]`: what runs, what it may open, and how its end is told.
use super::{argv, env_values, files, list, not_env, not_host, not_path, regex, text};
use crate::{
    cause::Stage,
    pack::{
        Callback, FailRule, Flow, FlowKind, Oidc, Prompt, UrlRule,
        parameters::has_reference,
        problem::{Problems, show},
        rules::{self, is_env_name, is_host, is_host_pattern, is_relative_path, is_slug},
    },
};

/// Seconds that a flow may take.
const TIMEOUT_S: std::ops::RangeInclusive<u32> = 10..=3600;

/// One `flow`.
pub(super) fn check_flow(key: &str, flow: &Flow, problems: &mut Problems) {
    let at = |name: &str| format!("{key}.{name}");
    problems.unless(is_slug(&flow.id), &at("id"), || {
        format!(
            "{}; expected lower-case letters, digits, `-` and `_`",
            show(&flow.id)
        )
    });
    text(&at("title"), &flow.title, 1, 200, problems);
    problems.unless(
        TIMEOUT_S.contains(&flow.timeout_s),
        &at("timeout_s"),
        || format!("{}; expected {TIMEOUT_S:?} seconds", flow.timeout_s),
    );
    terminal(key, flow, problems);
    match (flow.kind, &flow.oidc) {
        (FlowKind::Oidc, None) => {
            problems.add(at("oidc"), "missing; a flow of kind `oidc` needs it");
        }
        (FlowKind::Oidc, Some(oidc)) => {
            check_oidc(
                &at("oidc"),
                oidc,
                flow.url.as_ref().is_some_and(|u| u.allow_http),
                problems,
            );
            problems.unless(flow.argv.is_empty(), &at("argv"), || {
                "not empty; a flow of kind `oidc` runs no program".into()
            });
        }
        (_, Some(_)) => problems.add(at("oidc"), "only a flow of kind `oidc` has it"),
        (_, None) => argv(&at("argv"), &flow.argv, problems),
    }
    environment(key, flow, problems);
    files(&at("files"), &flow.files, problems);
    list(&at("prompt"), flow.prompt.len(), problems);
    for (i, prompt) in flow.prompt.iter().enumerate() {
        check_prompt(&at(&format!("prompt[{i}]")), prompt, problems);
    }
    match &flow.url {
        Some(url) => check_url(&at("url"), url, problems),
        None => problems.add(
            at("url"),
            "missing; a flow names the hosts its pages may have",
        ),
    }
    if let Some(callback) = &flow.callback {
        check_callback(&at("callback"), callback, problems);
    }
    if let Some(code) = &flow.code {
        regex(&at("code.cli_regex"), &code.cli_regex, 1, problems);
    }
    browser(key, flow, problems);
    outcome(key, flow, problems);
}

/// Size and name of a flow's terminal.
fn terminal(key: &str, flow: &Flow, problems: &mut Problems) {
    for (name, value, range) in [("cols", flow.cols, 20..=2000), ("rows", flow.rows, 5..=500)] {
        problems.unless(
            value.is_none_or(|v| range.contains(&v)),
            &format!("{key}.{name}"),
            || format!("{}; expected {range:?}", value.unwrap_or_default()),
        );
    }
    if let Some(term) = &flow.term {
        problems.unless(is_slug(term), &format!("{key}.term"), || {
            format!(
                "{}; expected a terminal's name such as `xterm-256color`",
                show(term)
            )
        });
    }
}

fn environment(key: &str, flow: &Flow, problems: &mut Problems) {
    env_values(&format!("{key}.env.set"), &flow.env.set, problems);
    list(&format!("{key}.env.unset"), flow.env.unset.len(), problems);
    for (i, name) in flow.env.unset.iter().enumerate() {
        let at = format!("{key}.env.unset[{i}]");
        problems.unless(is_env_name(name), &at, || not_env(name));
        problems.unless(!flow.env.set.contains_key(name), &at, || {
            format!(
                "{} is also in `env.set`; expected one of the two",
                show(name)
            )
        });
    }
}

fn check_prompt(key: &str, prompt: &Prompt, problems: &mut Problems) {
    regex(&format!("{key}.when"), &prompt.when, 0, problems);
    let length = prompt.send.len();
    problems.unless((1..=64).contains(&length), &format!("{key}.send"), || {
        format!("{length} bytes; expected 1 to 64")
    });
}

fn check_url(key: &str, url: &UrlRule, problems: &mut Problems) {
    let at = |name: &str| format!("{key}.{name}");
    problems.unless(!url.sources.is_empty(), &at("sources"), || {
        "empty; expected `shim`, `osc8` or `screen`".into()
    });
    for (i, source) in url.sources.iter().enumerate() {
        problems.unless(
            !url.sources[..i].contains(source),
            &at(&format!("sources[{i}]")),
            || "named twice".into(),
        );
    }
    problems.unless(!url.hosts.is_empty(), &at("hosts"), || {
        "empty; expected at least one host name".into()
    });
    list(&at("hosts"), url.hosts.len(), problems);
    for (i, host) in url.hosts.iter().enumerate() {
        let fine = has_reference(host) || is_host(host);
        problems.unless(fine, &at(&format!("hosts[{i}]")), || not_host(host));
    }
    if let Some(prefix) = &url.path_prefix {
        problems.unless(prefix.starts_with('/'), &at("path_prefix"), || {
            format!("{}; expected a path, with `/` first", show(prefix))
        });
    }
    for (name, words) in [
        ("must_have", &url.must_have),
        ("must_not_have", &url.must_not_have),
    ] {
        list(&at(name), words.len(), problems);
        for (i, word) in words.iter().enumerate() {
            text(&at(&format!("{name}[{i}]")), word, 1, 100, problems);
        }
    }
    problems.unless(
        (1..=600).contains(&url.fallback_after_s),
        &at("fallback_after_s"),
        || format!("{}; expected 1..=600 seconds", url.fallback_after_s),
    );
}

fn check_callback(key: &str, callback: &Callback, problems: &mut Problems) {
    let host = callback.host.as_str();
    problems.unless(
        matches!(host, "127.0.0.1" | "localhost"),
        &format!("{key}.host"),
        || format!("{}; expected `127.0.0.1` or `localhost`", show(host)),
    );
    list(&format!("{key}.ports"), callback.ports.len(), problems);
    for (i, port) in callback.ports.iter().enumerate() {
        problems.unless(*port >= 1024, &format!("{key}.ports[{i}]"), || {
            format!("{port}; expected 1024 to 65535")
        });
    }
    problems.unless(
        callback.path.starts_with('/'),
        &format!("{key}.path"),
        || format!("{}; expected a path, with `/` first", show(&callback.path)),
    );
}

fn browser(key: &str, flow: &Flow, problems: &mut Problems) {
    let rule = &flow.browser;
    let at = |name: &str, i: usize| format!("{key}.browser.{name}[{i}]");
    list(
        &format!("{key}.browser.allow_hosts"),
        rule.allow_hosts.len(),
        problems,
    );
    for (i, host) in rule.allow_hosts.iter().enumerate() {
        let fine = has_reference(host) || is_host_pattern(host);
        problems.unless(fine, &at("allow_hosts", i), || {
            format!("{}; expected a host name or `*.` and one", show(host))
        });
    }
    list(
        &format!("{key}.browser.done_prefixes"),
        rule.done_prefixes.len(),
        problems,
    );
    for (i, prefix) in rule.done_prefixes.iter().enumerate() {
        problems.unless(rules::is_page(prefix), &at("done_prefixes", i), || {
            format!(
                "{}; expected an https URL, or http on the guest's loopback",
                show(prefix)
            )
        });
    }
    list(
        &format!("{key}.browser.loopback_fetch_origins"),
        rule.loopback_fetch_origins.len(),
        problems,
    );
    for (i, origin) in rule.loopback_fetch_origins.iter().enumerate() {
        problems.unless(
            rules::is_https_origin(origin),
            &at("loopback_fetch_origins", i),
            || format!("{}; expected an https origin, without path", show(origin)),
        );
    }
}

/// `done` and `fail`.
fn outcome(key: &str, flow: &Flow, problems: &mut Problems) {
    problems.unless(
        flow.done.exit.is_none() || flow.exits,
        &format!("{key}.done.exit"),
        || "set, though `exits = false` says that the tool does not end by itself".into(),
    );
    if let Some(screen) = &flow.done.screen_regex {
        regex(&format!("{key}.done.screen_regex"), screen, 0, problems);
    }
    list(&format!("{key}.fail"), flow.fail.len(), problems);
    for (i, rule) in flow.fail.iter().enumerate() {
        check_fail(&format!("{key}.fail[{i}]"), flow.timeout_s, rule, problems);
    }
}

fn check_fail(key: &str, timeout_s: u32, rule: &FailRule, problems: &mut Problems) {
    regex(&format!("{key}.when"), &rule.when, 0, problems);
    let cause = rule.cause;
    let fits = matches!(cause.stage(), Stage::Provider | Stage::ContractMismatch);
    problems.unless(fits, &format!("{key}.cause"), || {
        format!(
            "`{cause}` is no cause that a tool's words can prove; expected one of stage `provider`"
        )
    });
    if let Some(path) = &rule.file {
        problems.unless(is_relative_path(path), &format!("{key}.file"), || {
            not_path(path)
        });
    }
    problems.unless(rule.for_s < timeout_s, &format!("{key}.for_s"), || {
        format!("{}; expected less than the flow's `timeout_s`", rule.for_s)
    });
}

fn check_oidc(key: &str, oidc: &Oidc, allow_http: bool, problems: &mut Problems) {
    let issuer = &oidc.issuer;
    let fine = has_reference(issuer) || rules::is_issuer(issuer, allow_http);
    problems.unless(fine, &format!("{key}.issuer"), || {
        format!(
            "{}; expected an https URL without query and fragment",
            show(issuer)
        )
    });
    text(
        &format!("{key}.client_id"),
        &oidc.client_id,
        1,
        200,
        problems,
    );
    problems.unless(!oidc.scopes.is_empty(), &format!("{key}.scopes"), || {
        "empty; expected at least `openid`".into()
    });
    list(&format!("{key}.scopes"), oidc.scopes.len(), problems);
    for (i, scope) in oidc.scopes.iter().enumerate() {
        let fine = has_reference(scope) || rules::is_scope(scope);
        problems.unless(fine, &format!("{key}.scopes[{i}]"), || {
            format!(
                "{}; expected one scope token (RFC 6749 section 3.3)",
                show(scope)
            )
        });
    }
}

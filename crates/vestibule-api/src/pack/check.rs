//! What a pack that can be read must also satisfy: its rules, section by section. A pack is a security boundary, so
//! everything that names a program, a file or a host is checked here, before anything acts on it.
use super::{
    Flow, ProviderPack, parameters,
    problem::{Problems, show},
    rules::{
        self, duplicates, is_env_name, is_host, is_https_url, is_param_name, is_program,
        is_relative_path, regex_problem,
    },
};

mod credential;
mod flow;

/// Version of the pack schema.
pub const PACK_SCHEMA: u32 = 1;

/// A list of more items than this is refused.
pub(super) const LIST_LIMIT: usize = 64;

/// A text of more bytes than this is refused.
const TEXT_LIMIT: usize = 4096;

/// A file of a flow of more bytes than this is refused.
const FILE_LIMIT: usize = 64 << 10;

/// A pack has at most so many regular expressions, of so many bytes together: what they cost to compile is paid by everybody
/// who reads the pack, and at each sign-in again.
const PATTERNS_LIMIT: usize = 64;
const PATTERNS_BYTES: usize = 8 << 10;

pub(super) fn check(pack: &ProviderPack, problems: &mut Problems) {
    let (count, bytes) = patterns(pack).fold((0, 0), |(count, bytes), pattern| {
        (count + 1, bytes + pattern.len())
    });
    if count > PATTERNS_LIMIT || bytes > PATTERNS_BYTES {
        // None is compiled.
        problems.add(
            "",
            format!("{count} regular expressions of {bytes} bytes; expected at most {PATTERNS_LIMIT} of {PATTERNS_BYTES}"),
        );
        return;
    }
    problems.unless(pack.schema == PACK_SCHEMA, "schema", || {
        format!("{}; expected {PACK_SCHEMA}", pack.schema)
    });
    about(pack, problems);
    program(pack, problems);
    declarations(pack, problems);
    list("flow", pack.flow.len(), problems);
    problems.unless(!pack.flow.is_empty(), "flow", || {
        "none; expected at least one `[[flow]]`".into()
    });
    unique(
        "flow",
        "id",
        pack.flow.iter().map(|f| f.id.as_str()),
        problems,
    );
    for (index, flow) in pack.flow.iter().enumerate() {
        flow::check_flow(&format!("flow[{index}]"), flow, problems);
    }
    credential::credentials(&pack.credential, problems);
    after(pack, problems);
}

/// Every regular expression of the pack.
fn patterns(pack: &ProviderPack) -> impl Iterator<Item = &String> {
    let detect = pack.detect.iter().map(|detect| &detect.version_regex);
    let parameters = pack.parameter.iter().map(|parameter| &parameter.pattern);
    let credentials = pack
        .credential
        .iter()
        .filter_map(|rule| rule.pattern.as_ref());
    let flows = pack.flow.iter().flat_map(patterns_of);
    detect.chain(parameters).chain(credentials).chain(flows)
}

fn patterns_of(flow: &Flow) -> impl Iterator<Item = &String> {
    let prompts = flow.prompt.iter().map(|prompt| &prompt.when);
    let fails = flow.fail.iter().map(|rule| &rule.when);
    let code = flow.code.iter().map(|code| &code.cli_regex);
    prompts
        .chain(fails)
        .chain(code)
        .chain(&flow.done.screen_regex)
}

/// `provider` and `terms`.
fn about(pack: &ProviderPack, problems: &mut Problems) {
    for (key, value) in [
        ("provider.name", &pack.provider.name),
        ("provider.vendor", &pack.provider.vendor),
        ("terms.note", &pack.terms.note),
    ] {
        text(key, value, 1, 1000, problems);
    }
    for (key, value) in [
        ("provider.homepage", &pack.provider.homepage),
        ("terms.url", &pack.terms.url),
    ] {
        problems.unless(is_https_url(value), key, || {
            format!("{}; expected an https URL", show(value))
        });
    }
}

/// `install` and `detect`.
fn program(pack: &ProviderPack, problems: &mut Problems) {
    if let Some(install) = &pack.install {
        text("install.package", &install.package, 1, 200, problems);
        let version = &install.version;
        problems.unless(rules::is_exact_version(version), "install.version", || {
            format!(
                "{}; expected one exact version, no range or tag",
                show(version)
            )
        });
        let bin = &install.bin;
        problems.unless(is_program(bin), "install.bin", || {
            format!("{}; expected an absolute path", show(bin))
        });
    }
    if let Some(detect) = &pack.detect {
        argv("detect.version_argv", &detect.version_argv, problems);
        regex("detect.version_regex", &detect.version_regex, 1, problems);
    }
}

/// `parameter`, and every reference to one.
fn declarations(pack: &ProviderPack, problems: &mut Problems) {
    list("parameter", pack.parameter.len(), problems);
    let names = || pack.parameter.iter().map(|p| p.name.as_str());
    unique("parameter", "name", names(), problems);
    for (index, parameter) in pack.parameter.iter().enumerate() {
        let key = format!("parameter[{index}]");
        problems.unless(
            is_param_name(&parameter.name),
            &format!("{key}.name"),
            || {
                format!(
                    "{}; expected lower-case letters, digits and `_`, a letter first",
                    show(&parameter.name)
                )
            },
        );
        text(&format!("{key}.title"), &parameter.title, 1, 200, problems);
        whole(&format!("{key}.pattern"), &parameter.pattern, problems);
        if let Some(default) = &parameter.default {
            let at = format!("{key}.default");
            text(&at, default, 0, TEXT_LIMIT, problems);
            let fits = rules::matches_whole(&parameter.pattern, default).unwrap_or(true);
            problems.unless(fits, &at, || {
                format!("{} does not match the parameter's `pattern`", show(default))
            });
        }
    }
    parameters::check_references(pack, problems);
}

/// Names and values of environment variables, as a pack or an override sets them.
pub(super) fn env_values(
    key: &str,
    values: &std::collections::BTreeMap<String, String>,
    problems: &mut Problems,
) {
    list(key, values.len(), problems);
    for (name, value) in values {
        let at = format!("{key}.{name}");
        problems.unless(is_env_name(name), &at, || not_env(name));
        problems.unless(!rules::is_reserved_env(name), &at, || {
            "the agent sets this variable itself; expected another".into()
        });
        text(&at, value, 0, TEXT_LIMIT, problems);
    }
}

fn not_env(name: &str) -> String {
    format!(
        "{}; expected a variable's name: letters, digits and `_`",
        show(name)
    )
}

/// Files below the home directory, as a pack or an override lays them.
pub(super) fn files(
    key: &str,
    files: &std::collections::BTreeMap<String, String>,
    problems: &mut Problems,
) {
    list(key, files.len(), problems);
    for (path, content) in files {
        let at = format!("{key}.{path}");
        problems.unless(is_relative_path(path), &at, || not_path(path));
        problems.unless(content.len() <= FILE_LIMIT, &at, || {
            format!("{} bytes; expected at most {FILE_LIMIT}", content.len())
        });
    }
}

fn not_path(path: &str) -> String {
    format!(
        "{}; expected a path below the home directory, without `..`, `.` and empty parts",
        show(path)
    )
}

/// What is said of a host that is not one.
pub fn not_host(host: &str) -> String {
    format!(
        "{}; expected one exact host name in lower case: no address, scheme, port, path or wildcard",
        show(host)
    )
}

/// `verify`, `cleanup` and `test`.
fn after(pack: &ProviderPack, problems: &mut Problems) {
    if let Some(verify) = &pack.verify {
        argv("verify.argv", &verify.argv, problems);
        problems.unless(
            (0..=255).contains(&verify.ok_exit),
            "verify.ok_exit",
            || format!("{}; expected 0 to 255", verify.ok_exit),
        );
    }
    if !pack.cleanup.logout_argv.is_empty() {
        argv("cleanup.logout_argv", &pack.cleanup.logout_argv, problems);
    }
    list("cleanup.leftovers", pack.cleanup.leftovers.len(), problems);
    for (i, path) in pack.cleanup.leftovers.iter().enumerate() {
        problems.unless(
            is_relative_path(path),
            &format!("cleanup.leftovers[{i}]"),
            || not_path(path),
        );
    }
    let Some(test) = &pack.test else { return };
    env_values("test.env", &test.env, problems);
    files("test.files", &test.files, problems);
    list("test.hosts", test.hosts.len(), problems);
    for (i, host) in test.hosts.iter().enumerate() {
        problems.unless(is_host(host), &format!("test.hosts[{i}]"), || {
            not_host(host)
        });
    }
    for (i, name) in test.ca_env.iter().enumerate() {
        problems.unless(is_env_name(name), &format!("test.ca_env[{i}]"), || {
            not_env(name)
        });
    }
}

/// A program with its arguments.
fn argv(key: &str, argv: &[String], problems: &mut Problems) {
    list(key, argv.len(), problems);
    let Some((program, arguments)) = argv.split_first() else {
        problems.add(
            key,
            "empty; expected a program's absolute path and its arguments",
        );
        return;
    };
    problems.unless(is_program(program), &format!("{key}[0]"), || {
        format!("{}; expected a program's absolute path", show(program))
    });
    for (i, argument) in arguments.iter().enumerate() {
        text(
            &format!("{key}[{}]", i + 1),
            argument,
            0,
            TEXT_LIMIT,
            problems,
        );
    }
}

pub(super) fn text(key: &str, value: &str, least: usize, most: usize, problems: &mut Problems) {
    problems.unless((least..=most).contains(&value.len()), key, || {
        format!("{} bytes; expected {least} to {most}", value.len())
    });
    problems.unless(!value.contains('\0'), key, || "contains a NUL byte".into());
}

fn regex(key: &str, pattern: &str, groups: usize, problems: &mut Problems) {
    if let Some(problem) = regex_problem(pattern, groups) {
        problems.add(key, problem);
    }
}

/// A regular expression that the whole of a text is compared with.
fn whole(key: &str, pattern: &str, problems: &mut Problems) {
    match regex_problem(pattern, 0) {
        Some(problem) => problems.add(key, problem),
        None => problems.unless(rules::matches_whole(pattern, "").is_some(), key, || {
            "can't be compared with a whole text: it ends in a comment, or is too large".into()
        }),
    }
}

pub(super) fn list(key: &str, length: usize, problems: &mut Problems) {
    problems.unless(length <= LIST_LIMIT, key, || {
        format!("{length} items; expected at most {LIST_LIMIT}")
    });
}

fn unique<'a>(
    list: &str,
    field: &str,
    values: impl Iterator<Item = &'a str>,
    problems: &mut Problems,
) {
    for (index, value) in duplicates(values) {
        problems.add(
            format!("{list}[{index}].{field}"),
            format!("{} stands twice; expected another", show(value)),
        );
    }
}

//! The packs that ship, and what is said about broken ones.
#[path = "property/packs.rs"]
mod property;

use proptest::prelude::*;
use std::collections::BTreeMap;
use vestibule_api::pack::{Override, ProviderPack};

const PACKS: [(&str, &str); 6] = [
    (
        "claude.toml",
        include_str!("../../../providers/claude.toml"),
    ),
    ("codex.toml", include_str!("../../../providers/codex.toml")),
    (
        "gemini.toml",
        include_str!("../../../providers/gemini.toml"),
    ),
    ("gh.toml", include_str!("../../../providers/gh.toml")),
    ("oidc.toml", include_str!("../../../providers/oidc.toml")),
    (
        "wrangler.toml",
        include_str!("../../../providers/wrangler.toml"),
    ),
];

fn pack(id: &str) -> ProviderPack {
    let (name, text) = PACKS
        .into_iter()
        .find(|(name, _)| name.strip_suffix(".toml") == Some(id))
        .expect("no such pack");
    ProviderPack::parse(name, text).unwrap_or_else(|err| panic!("{err}"))
}

/// The pack `id` with one text replaced by another, and everything said about it.
fn broken(id: &str, old: &str, new: &str) -> Vec<String> {
    let (name, text) = PACKS
        .into_iter()
        .find(|(name, _)| name.strip_suffix(".toml") == Some(id))
        .expect("no such pack");
    assert!(text.contains(old), "`{old}` stands in {name}");
    let errors = ProviderPack::parse(name, &text.replacen(old, new, 1)).expect_err("it is broken");
    errors.to_string().lines().map(str::to_owned).collect()
}

#[test]
fn every_pack_that_ships_is_valid_and_round_trips() {
    for (name, text) in PACKS {
        assert!(property::read(text).is_some(), "{name} can be used");
        let pack = ProviderPack::parse(name, text).unwrap_or_else(|err| panic!("{err}"));
        let again = ProviderPack::parse(name, &pack.to_toml().unwrap()).unwrap();
        assert_eq!(pack, again, "{name}");
        let wire = serde_json::to_string(&pack).unwrap();
        assert_eq!(serde_json::from_str::<ProviderPack>(&wire).unwrap(), pack);
    }
}

#[test]
fn errors_name_file_key_and_what_was_expected() {
    let cases = [
        (
            "codex",
            "hosts = [\"auth.openai.com\"]",
            "hosts = [\"*.openai.com\"]",
            "codex.toml: `flow[0].url.hosts[0]`: `*.openai.com`; expected one exact host name in lower case: no address, scheme, port, path or wildcard",
        ),
        (
            "codex",
            "path_prefix =",
            "path_perfix =",
            "codex.toml: `flow[0].url.path_perfix`: no such key; did you mean `path_prefix`?",
        ),
        (
            "codex",
            "kind = \"loopback\"",
            "kind = \"lopback\"",
            "codex.toml: `flow[0].kind`: `lopback`; expected one of loopback, device, paste_code, poll, tui, oidc (did you mean `loopback`?)",
        ),
        (
            "codex",
            "timeout_s = 900",
            "timeout_s = \"900\"",
            "codex.toml: `flow[0].timeout_s`: invalid type: string \"900\", expected u32",
        ),
        (
            "codex",
            "timeout_s = 900",
            "",
            "codex.toml: `flow[0]`: the key `timeout_s` is missing",
        ),
        (
            "codex",
            "\"/usr/local/bin/codex\", \"login\"]",
            "\"codex\", \"login\"]",
            "codex.toml: `flow[0].argv[0]`: `codex`; expected a program's absolute path",
        ),
        (
            "codex",
            ".codex/auth.json",
            "../.codex/auth.json",
            "codex.toml: `credential[0].path`: `../.codex/auth.json`; expected a path below the home directory, without `..`, `.` and empty parts",
        ),
        (
            "codex",
            "1455, 1457",
            "0, 1457",
            "codex.toml: `flow[0].callback.ports[0]`: 0; expected 1024 to 65535",
        ),
        (
            "codex",
            "id = \"device\"",
            "id = \"browser\"",
            "codex.toml: `flow[1].id`: `browser` stands twice; expected another",
        ),
        (
            "codex",
            "id = \"codex\"",
            "id = \"kodex\"",
            "codex.toml: `provider.id`: `kodex`; expected `codex`, the file's name",
        ),
        (
            "codex",
            "[provider]",
            "[povider]",
            "codex.toml: `povider`: no such key; did you mean `provider`?",
        ),
        (
            "codex",
            "schema = 1",
            "schema = ",
            "codex.toml: line 3 is not TOML: string values must be quoted, expected literal string",
        ),
        (
            "claude",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC = \"1\"",
            "LD_PRELOAD = \"x\"",
            "claude.toml: `flow[0].env.set.LD_PRELOAD`: the agent sets this variable itself; expected another",
        ),
        (
            "gh",
            "one-time code: ([A-Z0-9]{4}-[A-Z0-9]{4})",
            "one-time code: (",
            "gh.toml: `flow[0].code.cli_regex`: not a regular expression: unclosed group",
        ),
        (
            "gh",
            "one-time code: ([A-Z0-9]{4}-[A-Z0-9]{4})",
            "one-time code",
            "gh.toml: `flow[0].code.cli_regex`: has 0 groups; expected at least 1, the first is what is taken",
        ),
        (
            "oidc",
            "${param.client_id}",
            "${param.cliend_id}",
            "oidc.toml: `flow[0].oidc.client_id`: no `[[parameter]]` is named `cliend_id`; did you mean `client_id`?",
        ),
        (
            "oidc",
            "[flow.oidc]",
            "argv = [\"/bin/sh\"]\n[flow.oidc]",
            "oidc.toml: `flow[0].argv`: not empty; a flow of kind `oidc` runs no program",
        ),
        (
            "wrangler",
            "\"/oauth_token\"",
            "\"oauth_token\"",
            "wrangler.toml: `credential[0].required[0]`: `oauth_token`; expected a JSON pointer (RFC 6901), with `/` first",
        ),
        (
            "wrangler",
            "version = \"4.164.0\"",
            "version = \"^4\"",
            "wrangler.toml: `install.version`: `^4`; expected one exact version, no range or tag",
        ),
        (
            "wrangler",
            "sources = [\"shim\", \"screen\"]",
            "sources = [\"shim\"]\nallow_http = true",
            "wrangler.toml: `flow[0].url.allow_http`: only an operator's configuration may set it",
        ),
    ];
    for (id, old, new, expected) in cases {
        let said = broken(id, old, new);
        assert!(
            said.iter().any(|line| line == expected),
            "expected {expected}\nsaid {said:#?}"
        );
    }
}

#[test]
fn everything_wrong_is_said_at_once() {
    let text = PACKS[1]
        .1
        .replace("vendor =", "vendro =")
        .replace("kind = \"npm\"", "kind = \"cargo\"")
        .replace("path_prefix =", "prefix =")
        .replace("format = \"json\"", "format = \"ini\"");
    let said = ProviderPack::parse("codex.toml", &text).unwrap_err();
    let keys: Vec<&str> = said.problems.iter().map(|p| p.key.as_str()).collect();
    assert_eq!(
        keys,
        [
            "credential[0].format",
            "flow[0].url.prefix",
            "flow[1].url.prefix",
            "install.kind",
            "provider.vendro",
            "provider"
        ]
    );
}

fn oidc(parameters: &[(&str, &str)], change: Override) -> Result<ProviderPack, String> {
    let parameters = parameters
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    pack("oidc")
        .apply(&Override {
            parameters,
            ..change
        })
        .map_err(|err| err.to_string())
}

#[test]
fn parameters_are_filled_in_and_checked() {
    let given = [
        ("issuer", "https://id.example.test:8443/realm"),
        ("client_id", "vestibule"),
    ];
    let filled = oidc(&given, Override::default()).unwrap();
    let flow = &filled.flow[0];
    let client = flow.oidc.as_ref().unwrap();
    assert_eq!(client.issuer, "https://id.example.test:8443/realm");
    assert_eq!(
        client.scopes,
        ["openid", "profile", "email", "offline_access"]
    );
    assert_eq!(flow.url.as_ref().unwrap().hosts, ["id.example.test"]);
    assert!(filled.parameter.is_empty());

    let missing = oidc(
        &[("issuer", "https://id.example.test")],
        Override::default(),
    )
    .unwrap_err();
    assert!(
        missing.contains("`parameters.client_id`: missing: the id under which"),
        "{missing}"
    );
    let http = [("issuer", "http://id.example.test"), ("client_id", "v")];
    assert!(
        oidc(&http, Override::default())
            .unwrap_err()
            .contains("flow[0].oidc.issuer")
    );
    let allowed = Override {
        allow_http: true,
        ..Override::default()
    };
    assert_eq!(
        oidc(&http, allowed).unwrap().flow[0]
            .url
            .as_ref()
            .unwrap()
            .hosts,
        ["id.example.test"]
    );
    let typo = oidc(
        &[
            ("issuer", "https://i.test"),
            ("client_id", "v"),
            ("scope", "openid"),
        ],
        Override::default(),
    );
    assert!(typo.unwrap_err().contains("did you mean `scopes`?"));
    let trick = [
        ("issuer", "https://a.test"),
        ("client_id", "${param.issuer}"),
    ];
    assert!(
        oidc(&trick, Override::default())
            .unwrap_err()
            .contains("does not match")
    );
}

#[test]
fn an_override_changes_every_flow_and_is_checked() {
    let change = Override {
        env: BTreeMap::from([("CI".to_owned(), "1".to_owned())]),
        hosts: vec!["login.corp.example".to_owned()],
        args: vec!["--verbose".to_owned()],
        allow_http: true,
        ..Override::default()
    };
    let changed = pack("codex").apply(&change).unwrap();
    for flow in &changed.flow {
        assert_eq!(flow.env.set["CI"], "1");
        assert!(!flow.env.unset.contains(&"CI".to_owned()));
        assert_eq!(flow.argv.last().unwrap(), "--verbose");
        let url = flow.url.as_ref().unwrap();
        assert!(url.allow_http && url.hosts.contains(&"login.corp.example".to_owned()));
        assert!(
            flow.browser
                .allow_hosts
                .contains(&"login.corp.example".to_owned())
        );
    }
    let wrong = Override {
        env: BTreeMap::from([("PATH".to_owned(), "/tmp".to_owned())]),
        hosts: vec!["http://x".to_owned(), "127.0.0.1".to_owned()],
        files: BTreeMap::from([("/etc/passwd".to_owned(), String::new())]),
        ..Override::default()
    };
    let keys: Vec<String> = pack("codex")
        .apply(&wrong)
        .unwrap_err()
        .problems
        .into_iter()
        .map(|p| p.key)
        .collect();
    assert_eq!(
        keys,
        ["env.PATH", "files./etc/passwd", "hosts[0]", "hosts[1]"]
    );
}

proptest! {
    // A pack has some ten regular expressions, and is read four times a case.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_text_makes_the_reader_panic(text in "\\PC{0,400}") {
        property::read(&text);
    }

    /// Damage to a real pack: a span replaced by arbitrary text, often still TOML.
    #[test]
    fn no_damaged_pack_makes_the_reader_panic(
        which in 0..PACKS.len(), from in 0usize..8000, length in 0usize..40, junk in "[ -~\\n]{0,20}",
    ) {
        let (_, text) = PACKS[which];
        let from = from.min(text.len());
        let to = (from + length).min(text.len());
        property::read(&format!("{}{junk}{}", &text[..from], &text[to..]));
    }

    /// Every scalar of a real pack replaced by a value of another type or content.
    #[test]
    fn no_changed_value_makes_the_reader_panic(which in 0..PACKS.len(), line in 0usize..120, value in prop_oneof![
        Just("true".to_owned()), Just("-1".to_owned()), Just("[]".to_owned()), Just("{}".to_owned()),
        Just("[[1], {a = 2}]".to_owned()), "\"[ !#-\\[\\]-~]{0,30}\"".prop_map(|s| s),
    ]) {
        let (_, text) = PACKS[which];
        let changed: Vec<String> = text
            .lines()
            .enumerate()
            .map(|(i, l)| match l.split_once(" = ") {
                Some((key, _)) if i == line => format!("{key} = {value}"),
                _ => l.to_owned(),
            })
            .collect();
        property::read(&changed.join("\n"));
    }

    #[test]
    fn parameters_never_smuggle_a_host(issuer in "https://[ -~]{0,60}") {
        if let Ok(pack) = oidc(&[("issuer", &issuer), ("client_id", "v")], Override::default()) {
            for host in &pack.flow[0].url.as_ref().unwrap().hosts {
                prop_assert!(host.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b)), "{}", host);
            }
        }
    }
}

use super::*;
use vestibule_api::error::Chain;

fn load(text: &str) -> Result<Config, ConfigError> {
    let home = camino_tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("vestibule.toml"), text).unwrap();
    Config::load(None, home.path())
}

#[test]
fn nothing_is_required() {
    let config = load("").unwrap();
    assert!(config.listen.ip().is_loopback());
    assert_eq!(config.pool(), [("browser".to_owned(), 1)].into());
    assert_eq!(
        config.policy(vec!["a.example".to_owned()]).hosts,
        Vec::<String>::new()
    );
}

#[test]
fn what_tests_and_operators_set() {
    let config = load(
        "listen = '127.0.0.1:0'\n[egress]\nmode = 'allow-list'\n\
         pins = [{ host = 'idp.test', port = 443, to = '127.0.0.1:9443' }]\n\
         [providers.codex]\nenv = { A = 'b' }\nhosts = ['idp.test']\n[vm]\ndriver = 'qemu'\n",
    )
    .unwrap();
    let policy = config.policy(vec!["a.example".to_owned()]);
    assert_eq!((policy.hosts.len(), policy.pins.len()), (1, 1));
    assert_eq!(config.providers.len(), 1);
}

#[test]
fn a_typo_is_named_with_its_place() {
    let err = load("[limits]\nvmss = 3\n").unwrap_err();
    let text = Chain(&err).to_string();
    assert!(text.contains("vmss") && text.contains("line 2"), "{text}");
    for (text, key) in [
        ("[limits]\nvms = 0", "limits.vms"),
        ("[vm]\nvcpus = 0", "vm.vcpus"),
        ("[vm]\nvcpus = 33", "vm.vcpus"),
        ("image = 'A B'", "image"),
        ("database = 'x'", "database"),
        ("[deadlines]\npool_s = 0", "deadlines.pool_s"),
        ("[vm.jail]\nfirst_uid = 0", "vm.jail"),
        ("[deadlines]\nsign_in_s = 3601", "deadlines.sign_in_s"),
        ("[egress]\nmode = 'closed'", "egress.mode"),
        ("[egress]\nupstream = 'proxy:3128'", "egress.upstream"),
        (
            "[egress]\nupstream = 'http://a:secret@proxy:3128'",
            "egress.upstream",
        ),
        (
            "[egress]\nupstream = 'https://proxy:3128'",
            "egress.upstream",
        ),
        (
            "[egress]\npins = [{ host = '10.0.0.1', to = '127.0.0.1:1' }]",
            "egress.pins[0].host",
        ),
        (
            "[egress]\npins = [{ host = 'a.test', to = '127.0.0.1:0' }]",
            "egress.pins[0].to",
        ),
        ("[egress]\nextra_ca = ['/dev/null']", "egress.extra_ca[0]"),
        ("public_url = 'https://a.example/x'", "public_url"),
        ("frame_ancestors = ['*']", "frame_ancestors[0]"),
        (
            "frame_ancestors = [\"https://a.example; script-src *\"]",
            "frame_ancestors[0]",
        ),
        ("[deadlines]\nconfirm_s = 0", "deadlines.confirm_s"),
        ("[scheduler]\nengine = 'nomad'", "scheduler.template"),
        (
            "[scheduler]\nengine = 'nomad'\ntemplate = '/x'\naddress = 'nomad'",
            "scheduler.address",
        ),
        (
            "[oidc]\nissuer = 'http://a.example'\nclient_id = 'v'",
            "oidc.issuer",
        ),
        (
            "[oidc]\nissuer = 'https://a.example'\nclient_id = 'v'\nrole = 'admin'",
            "oidc.role",
        ),
        (
            "[oidc]\nissuer = 'https://a.example'\nclient_id = 'v'\nscopes = ['email']",
            "oidc.scopes",
        ),
        ("[cluster]\nkey_file = '/x'", "cluster"),
        ("database = 'postgres://x'\n[cluster]", "cluster.key_file"),
        (
            "database = 'postgres://x'\n[cluster]\nkey_file = '/x'\nlease_s = 0",
            "cluster.lease_s",
        ),
        (
            "database = 'postgres://x'\n[cluster]\nkey_file = '/x'\naddress = 'http://10.0.0.1:4000'",
            "cluster.address",
        ),
        (
            "database = 'postgres://x'\n[cluster]\nkey_file = '/x'\naddress = 'https://a.example/x'",
            "cluster.address",
        ),
    ] {
        let said = load(text).unwrap_err().to_string();
        assert!(
            said.contains(key) && said.contains("vestibule.toml"),
            "{text}: {said}"
        );
        assert!(!said.contains("secret"), "{said}");
    }
}

#[test]
fn the_pool_is_by_alias() {
    let config = load("image = 'tiny'\n[pool]\nbrowser = 3\n").unwrap();
    let expected = [("browser".to_owned(), 3), ("tiny".to_owned(), 1)].into();
    assert_eq!(config.pool(), expected);
    assert_eq!(load("[pool]\nbrowser = 0\n").unwrap().pool()["browser"], 0);
    assert!(load("[pool]\n'No Alias' = 1\n").is_err());
}

#[test]
fn a_sign_in_takes_no_longer_than_the_operator_allows() {
    let config = load("database = 'postgresql://db/x'\n[deadlines]\nsign_in_s = 60\n").unwrap();
    assert_eq!(config.sign_in(900), Duration::from_secs(60));
    assert_eq!(config.sign_in(30), Duration::from_secs(30));
    assert_eq!(load("").unwrap().sign_in(3600), Duration::from_secs(3600));
}

//! What holds of every text that is given as a provider pack: a pack, or what is wrong in words; and what is accepted can be
//! filled in, written and sent.
use std::collections::BTreeMap;
use vestibule_api::pack::{FlowKind, Override, PACK_LIMIT, ProviderPack};

/// What the agent reads of a request at most, less what stands around the pack.
const WIRE_LIMIT: usize = (1 << 20) - 4096;

/// Reads `text`, and does with a pack what an operator's configuration and a session do.
pub(crate) fn read(text: &str) -> Option<ProviderPack> {
    let pack = match ProviderPack::parse("pack", text) {
        Ok(pack) => pack,
        Err(err) => {
            assert!(!err.problems.is_empty());
            assert!(err.problems.iter().all(|problem| !problem.what.is_empty()));
            // A message may quote what it is about, and no more.
            let said: usize = err
                .problems
                .iter()
                .map(|p| p.key.len() + p.what.len())
                .sum();
            assert!(said <= 4 * text.len() + (1 << 18), "{said} bytes");
            return None;
        }
    };
    let written = pack.to_toml().expect("a pack that was read can be written");
    // Escapes make it longer than what was read.
    if written.len() <= PACK_LIMIT {
        let again = ProviderPack::parse("pack", &written).expect("what was written can be read");
        assert_eq!(again, pack);
    }
    let value = |name: &str| match name.contains("client") {
        true => "vestibule".to_owned(),
        false => "https://id.example.test".to_owned(),
    };
    let parameters: BTreeMap<_, _> = pack
        .parameter
        .iter()
        .filter(|parameter| parameter.default.is_none())
        .map(|parameter| (parameter.name.clone(), value(&parameter.name)))
        .collect();
    let change = Override {
        parameters,
        args: vec!["--verbose".to_owned()],
        ..Override::default()
    };
    match pack.apply(&change) {
        Ok(applied) => {
            used(&applied);
            Some(applied)
        }
        Err(err) => {
            assert!(!err.to_string().is_empty());
            None
        }
    }
}

/// What the other end relies on.
fn used(pack: &ProviderPack) {
    assert!(pack.parameter.is_empty());
    for flow in &pack.flow {
        let url = flow.url.as_ref().expect("every flow names its hosts");
        let plain = |host: &String| {
            host.bytes().all(|byte| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte)
            })
        };
        assert!(url.hosts.iter().all(plain), "{:?}", url.hosts);
        match (flow.kind, flow.argv.split_first()) {
            (FlowKind::Oidc, argv) => assert!(argv.is_none() && flow.oidc.is_some()),
            (_, Some((program, _))) => assert!(program.starts_with('/')),
            (_, None) => panic!("a flow without a program"),
        }
        assert!(!flow.argv.iter().any(|word| word.contains('\0')));
        let below_home = |path: &String| !path.split('/').any(|part| matches!(part, "" | ".."));
        assert!(flow.files.keys().all(below_home));
    }
    let wire = serde_json::to_vec(pack).expect("a pack can be sent");
    assert!(wire.len() <= WIRE_LIMIT, "{} bytes", wire.len());
    let got: ProviderPack = serde_json::from_slice(&wire).expect("and read where it arrives");
    assert_eq!(&got, pack);
}

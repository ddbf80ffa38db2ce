//! What in the profile of a guest's browser looks random. Two copies may have nothing of it in common, or somebody who sees both
//! knows that they are. `profile.js` looks for it in the guest.
use crate::{guest::run_in, support::Running};
use std::collections::BTreeSet;
use vestibule_api::agent::ExecUser;

const PROFILE: &str = "/home/person/.config/chromium";

/// What looks random, is the same in all copies, and tells nobody anything: how file, place in it and text begin.
const HARMLESS: [(&str, &str, &str); 14] = [
    // By it a second start knows the browser's socket in /tmp from another user's, and there is no other user in a VM.
    ("SingletonCookie", "", ""),
    // That socket's directory has six characters of mkdtemp(3) in its name, which by chance look random here or do not.
    ("SingletonSocket", "", ""),
    // The key of an extension that is part of Chromium.
    ("Default/Preferences", "/extensions/settings/", "MIGf"),
    // Authentication codes of settings, by a key that every Chromium has: the same for the same settings, and times are among
    // the settings, but no ids.
    ("Default/Preferences", "/protection/", ""),
    ("Default/Secure Preferences", "/protection/", ""),
    // A result and its time, as a protocol buffer.
    (
        "Default/Preferences",
        "/segmentation_platform/client_result_prefs",
        "",
    ),
    // The name of a network of unknown kind.
    (
        "Default/Network Persistent State",
        "/net/network_qualities",
        "",
    ),
    // Search engines and pages that are part of Chromium, numbered.
    ("Default/Web Data", "", "485bf7d3-0215-45af-87dc-538868"),
    ("Default/Web Data", "", "ec205736-edd7-4022-a9a3-b431fc"),
    // Hashes of the names of metrics.
    ("segmentation_platform/ukm_db", "", ""),
    ("Default/shared_proto_db/", "", ""),
    // Under what name a tab keeps its session storage; only the browser's own processes are told.
    ("Default/Sessions/", "", ""),
    // Counters, sizes and a time.
    ("Default/Shared Dictionary/cache/index", "", ""),
    // The same of the cache of what the GPU would draw.
    ("GPUPersistentCache/", "", ""),
];

/// What looks random in the profile of the guest's browser; a line each.
pub(crate) async fn randoms(runner: &Running) -> BTreeSet<String> {
    let script = include_str!("profile.js");
    let script = format!(
        "cat > /tmp/profile.js <<'END'\n{script}END\n/usr/local/bin/node --no-warnings /tmp/profile.js {PROFILE}"
    );
    let reply = run_in(runner, ExecUser::Root, &script, 120).await;
    let mut lines: Vec<_> = reply.stdout.lines().map(str::to_owned).collect();
    // The last line is the script's own: it came to its end.
    assert_eq!(lines.pop().as_deref(), Some("looked"), "{reply:?}");
    let lines: BTreeSet<_> = lines.into_iter().collect();
    // It looks where we think, and sees what there is to see: what is so long that by chance it never looks like a word.
    for known in [
        "/enterprise_profile_guid\t",
        "/google/services/signin_scoped_device_id\t",
        "/media_router/receiver_id_hash_token\t",
        "/user_experience_metrics/limited_entropy_randomization_source\t",
        "SingletonCookie\t",
    ] {
        assert!(
            lines.iter().any(|line| line.contains(known)),
            "no {known:?} in {lines:#?}"
        );
    }
    lines
}

/// What two copies have in common and should not have.
pub(crate) fn shared<'a>(a: &'a BTreeSet<String>, b: &BTreeSet<String>) -> Vec<&'a str> {
    let both = a.iter().filter(|line| b.contains(*line));
    both.map(String::as_str)
        .filter(|line| !is_harmless(line))
        .collect()
}

fn is_harmless(line: &str) -> bool {
    let mut parts = line.splitn(3, '\t');
    let (Some(file), Some(place), Some(text)) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    HARMLESS.iter().any(|begins| {
        file.starts_with(begins.0) && place.starts_with(begins.1) && text.starts_with(begins.2)
    })
}

#[test]
fn an_id_is_not_taken_for_harmless() {
    let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect();
    let a = lines(&[
        "Default/Preferences\t/enterprise_profile_guid\t4d2b60c7-92d9-4d9c-9bd0-53723e041c75",
        "Default/Preferences\t/protection/super_mac\tB613679A0814D9EC772F95D778C35FC5",
        "Local State\t/autofill/ablation_seed\tbFXwfysS4Hs=",
    ]);
    let b = lines(&[
        "Default/Preferences\t/enterprise_profile_guid\t4d2b60c7-92d9-4d9c-9bd0-53723e041c75",
        "Default/Preferences\t/protection/super_mac\tB613679A0814D9EC772F95D778C35FC5",
        "Local State\t/autofill/ablation_seed\tE/8KyIWpnrg=",
    ]);
    assert_eq!(
        shared(&a, &b),
        ["Default/Preferences\t/enterprise_profile_guid\t4d2b60c7-92d9-4d9c-9bd0-53723e041c75"]
    );
}

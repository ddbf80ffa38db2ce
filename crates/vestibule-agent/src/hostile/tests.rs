use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::{collections::BTreeMap, panic::resume_unwind, sync::LazyLock};
use vestibule_api::{pack::Override, secret::Opener};

const PACKS: [&str; 6] = [
    include_str!("../../../../providers/claude.toml"),
    include_str!("../../../../providers/codex.toml"),
    include_str!("../../../../providers/gemini.toml"),
    include_str!("../../../../providers/gh.toml"),
    include_str!("../../../../providers/oidc.toml"),
    include_str!("../../../../providers/wrangler.toml"),
];

const ROUTES: [&str; 16] = [
    "/health",
    "/report",
    "/events",
    "/login",
    "/login/cancel",
    "/login/credential",
    "/login/url",
    "/login/transcript",
    "/terminal",
    "/shell",
    "/exec",
    "/clock",
    "/prepare-snapshot",
    "/auth/callback",
    "/login/",
    "/%00",
];

/// Every pack as a session has it. To read one compiles its expressions, which is slow without optimisation.
static READ: LazyLock<Vec<ProviderPack>> = LazyLock::new(|| PACKS.map(pack).into());

fn pack(text: &str) -> ProviderPack {
    let issuer = "https://id.example.test".to_owned();
    let given = [("issuer", issuer), ("client_id", "vestibule".to_owned())];
    let pack = ProviderPack::parse("pack", text).unwrap();
    let known = given
        .into_iter()
        .filter(|(name, _)| pack.parameter.iter().any(|p| p.name == *name));
    let parameters: BTreeMap<_, _> = known
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    let change = Override {
        parameters,
        ..Override::default()
    };
    pack.apply(&change).unwrap()
}

/// On a thread of its own: the asker gives up what the thread may do.
fn ask(asker: Asker, bytes: Vec<u8>) -> String {
    let asked = std::thread::spawn(move || {
        let dir = camino_tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(answer(dir.path().as_std_path(), asker, &bytes))
    });
    let answer = asked.join().unwrap_or_else(|panic| resume_unwind(panic));
    String::from_utf8_lossy(&answer).into_owned()
}

/// A request that keeps to HTTP.
fn request(method: &str, target: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "{method} {target} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Status and body.
fn parts(answer: &str) -> (u16, &str) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.strip_prefix("HTTP/1.1 ").unwrap();
    (status[..3].parse().unwrap(), body)
}

/// What the host asks when nothing is wrong.
static BODIES: LazyLock<Vec<Value>> = LazyLock::new(|| {
    let id = SessionId::generate();
    vec![
        json!({"sessionId": id, "pack": READ[1], "flow": "browser", "deadlineS": 60}),
        json!({"sealTo": Opener::generate().key()}),
        json!({"url": "https://auth.openai.com/oauth?state=1"}),
        json!({"argv": ["/bin/true"], "user": "person", "stdin": "", "timeoutS": 1}),
        json!({"adjustMicros": 1, "adjusted": 0}),
        json!({"type": "resize", "cols": 0, "rows": 65_535}),
    ]
});

fn body() -> impl Strategy<Value = Vec<u8>> {
    let span = (
        0_usize..3000,
        0_usize..30,
        prop::collection::vec(any::<u8>(), 0..30),
    );
    let damaged = (any::<prop::sample::Index>(), span).prop_map(|(which, (from, length, junk))| {
        let text = which.get::<Value>(&BODIES).to_string().into_bytes();
        let from = from.min(text.len());
        let to = (from + length).min(text.len());
        [&text[..from], &junk, &text[to..]].concat()
    });
    prop_oneof![
        damaged,
        any::<prop::sample::Index>()
            .prop_map(|which| which.get::<Value>(&BODIES).to_string().into_bytes()),
        prop::collection::vec(any::<u8>(), 0..200),
    ]
}

fn headers() -> impl Strategy<Value = String> {
    let upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";
    let json = "content-type: application/json\r\n";
    prop_oneof![
        4 => Just(json.to_owned()),
        1 => Just(String::new()),
        1 => Just(upgrade.to_owned()),
        1 => "x-vestibule-session: [ -~]{0,40}\r\n".prop_map(move |line| format!("{json}{line}")),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Every route, asked well and badly: an answer, and where it is no, in words.
    #[test]
    fn every_route_answers_in_words(
        asker in prop_oneof![3 => Just(Asker::Host), 1 => Just(Asker::Guest)],
        method in prop_oneof![3 => Just("POST"), 2 => Just("GET"), 1 => Just("PUT"), 1 => Just("X")],
        route in prop::sample::select(&ROUTES[..]),
        query in prop_oneof![
            Just(String::new()), Just("?right=control".to_owned()), Just("?cols=0&rows=65535".to_owned()),
            Just("?after=18446744073709551615".to_owned()), "\\?[!$-;=?-~]{0,40}",
        ],
        headers in headers(),
        body in body(),
    ) {
        let answer = ask(asker, request(method, &format!("{route}{query}"), &headers, &body));
        let (status, said) = parts(&answer);
        // Nobody here may set a clock.
        prop_assert!(status != 500 || route == "/clock", "{}", answer);
        prop_assert!(status < 400 || !said.is_empty(), "{}", answer);
    }

    /// What is not HTTP, or only begins as such.
    #[test]
    fn any_bytes_are_answered_or_not(
        asker in prop_oneof![Just(Asker::Host), Just(Asker::Guest)],
        route in prop::sample::select(&ROUTES[..]),
        headers in headers(),
        begun in any::<bool>(),
        bytes in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let head = format!("GET {route}?right=control HTTP/1.1\r\nhost: x\r\n{headers}\r\n");
        let answer = ask(asker, [if begun { head.as_bytes() } else { b"" }, &bytes].concat());
        prop_assert!(answer.is_empty() || answer.starts_with("HTTP/1."), "{}", answer);
    }

    /// Whatever a tool says and writes, with every pack.
    #[test]
    fn any_text_may_come_of_a_tool(
        which in 0..PACKS.len(), from in 0_usize..400, length in 0_usize..10, junk in any::<String>(), said in prop::sample::select(&SAID[..]),
    ) {
        let cut = |at: usize| (0..=at.min(said.len())).rev().find(|at| said.is_char_boundary(*at)).unwrap_or(0);
        let (from, to) = (cut(from), cut(from + length));
        let dir = camino_tempfile::tempdir().unwrap();
        sign_in(dir.path().as_std_path(), &READ[which], &format!("{}{junk}{}", &said[..from], &said[to..]));
    }
}

/// What tools say and write.
const SAID: [&str; 7] = [
    "! First copy your one-time code: ABCD-1234\nPress Enter to open https://github.com/login/device in your browser...",
    "Couldn't log in: Request failed with status code 500\nhttps://auth.openai.com/oauth/authorize?client_id=a&state=b&code_challenge=c",
    r#"{"tokens":{"access_token":"a","refresh_token":"r","id_token":"e30.eyJlbWFpbCI6ImFAYi5jIiwiZXhwIjoxODAwMDAwMDAwfQ.s"},
        "claudeAiOauth":{"accessToken":"a","refreshToken":"r","expiresAt":9223372036854775807},"expiry_date":-1e300}"#,
    "oauth_token = \"a\"\nrefresh_token = \"b\"\nexpiration_time = \"2027-01-15T08:00:00Z\"\n",
    "github.com:\n    users:\n        me:\n            oauth_token: gho_x\n    oauth_token: gho_x\n    user: me\n",
    "machine github.com login me password gho_x",
    "- &a [*a, {b: ? c}]\n",
];

/// Nothing that was asked here could have set a clock, or started a program.
#[test]
fn nothing_is_done_for_strangers() {
    let json = "content-type: application/json\r\n";
    for (route, body) in [
        ("/login", 0),
        ("/exec", 3),
        ("/clock", 4),
        ("/prepare-snapshot", 4),
    ] {
        let asked = request("POST", route, json, BODIES[body].to_string().as_bytes());
        let answer = ask(Asker::Host, asked);
        let (status, said) = parts(&answer);
        let (expected, words) = match route {
            "/login" => (409, "the VM belongs to the session"),
            "/clock" => (500, "set the clock"),
            _ => (403, "commands and shells are for VMs without one"),
        };
        assert!(
            status == expected && said.contains(words),
            "{route}: {answer}"
        );
    }
}

#[test]
fn a_body_is_bounded() {
    let json = "content-type: application/json\r\n";
    let answer = ask(
        Asker::Host,
        request("POST", "/login", json, &vec![b' '; 2 << 20]),
    );
    assert_eq!(parts(&answer).0, 413, "{answer}");
}

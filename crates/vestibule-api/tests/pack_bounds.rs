//! Texts of a pack's size that are made to cost: each is answered in time, and what comes of it is no larger than it may be.
#[path = "property/packs.rs"]
mod property;

use rustix::time::{ClockId, clock_gettime};
use std::fmt::Write as _;
use vestibule_api::pack::{PACK_LIMIT, ProviderPack};

/// Without optimisation; the fuzzer, with it, allows one.
const LIMIT_S: i64 = 10;

/// A pack that would be accepted, with further keys of its flow and what follows.
fn pack(flow: &str, rest: &str) -> String {
    format!(
        "schema = 1\n[provider]\nid = \"x\"\nname = \"X\"\nvendor = \"V\"\nhomepage = \"https://x.test\"\n\
         [terms]\nurl = \"https://x.test\"\nnote = \"n\"\nhandoff = \"organisation\"\n\
         [[credential]]\nid = \"a\"\npath = \"a\"\nformat = \"opaque\"\n{rest}\n\
         [[flow]]\nid = \"f\"\ntitle = \"F\"\nkind = \"tui\"\ntimeout_s = 60\n\
         url = {{ sources = [\"shim\"], hosts = [\"x.test\"] }}\n{flow}\n"
    )
}

fn many(count: usize, text: impl Fn(usize) -> String) -> String {
    (0..count).fold(String::new(), |mut all, i| {
        let _ = write!(all, "{}", text(i));
        all
    })
}

/// What is said of a text, and that it was said in time, by the clock of this thread.
fn said(name: &str, text: &str) -> String {
    assert!(text.len() <= PACK_LIMIT, "{name}: {} bytes", text.len());
    let seconds = || clock_gettime(ClockId::ThreadCPUTime).tv_sec;
    let begun = seconds();
    let said = match ProviderPack::parse("x", text) {
        Ok(_) => property::read(text)
            .map_or_else(|| "not filled in".to_owned(), |_| "accepted".to_owned()),
        Err(err) => err.to_string(),
    };
    assert!(
        seconds() - begun < LIMIT_S,
        "{name}: {} s",
        seconds() - begun
    );
    said
}

#[test]
fn the_plain_one_is_accepted() {
    assert_eq!(said("plain", &pack("argv = [\"/bin/x\"]", "")), "accepted");
}

#[test]
fn no_text_costs_more_than_it_may() {
    let argv = "argv = [\"/bin/x\"]";
    let fail =
        |pattern: &str| format!("[[flow.fail]]\nwhen = '{pattern}'\ncause = \"tool-failed\"\n");
    let references = |count| many(count, |_| "${param.p}".to_owned());
    let parameter = |value: &str| {
        format!(
            "[[parameter]]\nname = \"p\"\ntitle = \"P\"\npattern = \".*x\"\ndefault = \"{value}\"\n"
        )
    };
    let long = "p".repeat(60);
    let cases = [
        (
            "patterns of many states",
            pack(argv, "") + &many(3000, |i| fail(&format!(r"\w{{{}}}{i}", 20 + i % 7))),
            "regular expressions of",
        ),
        (
            "one pattern of many states",
            pack(argv, "") + &fail(r"(?i)\w{900}"),
            "not a regular expression",
        ),
        (
            "long patterns",
            pack(argv, "") + &many(60, |_| fail(&format!("(?i){}x", r"\w".repeat(1000)))),
            "regular expressions of",
        ),
        (
            "nested lists",
            format!("a = {}", "[".repeat(100_000)),
            "is not TOML",
        ),
        (
            "nested tables",
            format!("a = {}", "{a = ".repeat(40_000)),
            "is not TOML",
        ),
        (
            "a long key of many parts",
            format!("a{} = 1", ".a".repeat(100_000)),
            "is not TOML",
        ),
        (
            "many sections with unknown keys",
            many(1500, |_| {
                format!("[[flow]]\n{}", many(16, |i| format!("k{i} = 1\n")))
            }),
            "items; expected at most 64",
        ),
        (
            "many tables with unknown keys",
            many(16, |i| format!("[t{i}]\n"))
                + &many(60, |_| {
                    format!(
                        "[[flow]]\n{}",
                        many(200, |i| format!("kkkkkkkkkkkk{i} = 1\n"))
                    )
                }),
            "no such key",
        ),
        (
            "names that are near to others",
            pack(
                &format!(
                    "argv = [\"/bin/x\",{}]",
                    many(2800, |i| format!("\"${{param.{long}{i}}}\","))
                ),
                &many(60, |i| {
                    format!(
                        "[[parameter]]\nname = \"{long}_{i}\"\ntitle = \"P\"\npattern = \"x\"\n"
                    )
                }),
            ),
            "no `[[parameter]]` is named",
        ),
        (
            "a value that is asked for often",
            pack(
                &format!(
                    "argv = [\"/bin/x\",{}]",
                    many(60, |_| format!("\"{}\",", references(400)))
                ),
                &parameter(&"x".repeat(4000)),
            ),
            "not filled in",
        ),
        (
            "a long value",
            pack(
                "argv = [\"/bin/x\", \"${param.p}\"]",
                &parameter(&"x".repeat(100_000)),
            ),
            "expected 0 to 4096",
        ),
        (
            "a long host",
            pack(
                argv,
                &format!(
                    "[verify]\nargv = [\"/x\"]\noffline = true\n[test]\nhosts = [\"xn--{}\"]",
                    "a".repeat(200_000)
                ),
            ),
            "expected one exact host name",
        ),
        (
            "a value of another type",
            pack(argv, "").replace(
                "timeout_s = 60",
                &format!("timeout_s = \"{}\"", "x".repeat(200_000)),
            ),
            "invalid type",
        ),
        (
            "a comment that would hide what follows",
            pack(argv, "").replace(
                "format = \"opaque\"",
                "format = \"text\"\npattern = '(?x) a #'",
            ),
            "can't be compared with a whole text",
        ),
    ];
    for (name, text, expected) in cases {
        let said = said(name, &text);
        let shown: String = said.chars().take(400).collect();
        assert!(
            said.contains(expected),
            "{name}: expected `{expected}`, said {shown}"
        );
        assert!(
            said.len() < 100_000,
            "{name}: {} bytes are said",
            said.len()
        );
    }
}

//! nftables rulesets (`nft(8)`): what a file loads, and whether a TCP connection to the guest gets through it. The part of
//! the grammar that images use is read in full; a rule whose match cannot be decided may match or not, and a ruleset with
//! words that are not known decides nothing: `nft` loads a file whole or, after an error, nothing of it.
mod eval;
mod model;
mod parse;
mod rule;
mod token;

pub(crate) use eval::World;
pub(crate) use token::Place;

use crate::disk::Root;

/// The line that keeps a connection from the guest's port, where the ruleset of `path` certainly does.
pub(crate) fn blocker(root: &Root, path: &str, world: &World) -> Option<Place> {
    let tokens = token::load(root, path)?;
    let ruleset = parse::parse(tokens)?;
    eval::blocker(&ruleset, world)
}

/// Whether the file takes away what others have loaded.
pub(crate) fn removes(root: &Root, path: &str) -> bool {
    let words = token::load(root, path).unwrap_or_default();
    words
        .iter()
        .any(|w| matches!(w.text.as_str(), "flush" | "delete" | "destroy"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dropped(text: &str) -> bool {
        let world = World {
            port: 8080,
            host: Some([10, 0, 2, 2].into()),
            guest: Some([10, 0, 2, 15].into()),
            services: std::collections::BTreeMap::new(),
        };
        let ruleset = parse::parse(token::tokens(text, "f"));
        ruleset.is_some_and(|r| eval::blocker(&r, &world).is_some())
    }

    #[test]
    fn connections_are_dropped_as_by_the_kernel() {
        let lines = include_str!("rulesets.txt").lines();
        for line in lines.filter(|l| !l.starts_with('#')) {
            let (expected, text) = line.split_once(' ').unwrap();
            let text = text.replace("\\n", "\n");
            assert_eq!(dropped(&text), expected == "drop", "{text}");
        }
    }

    #[test]
    fn nothing_keeps_it_busy() {
        let mut text =
            "table inet f {\nchain a { type filter hook input priority 0; policy drop\n".to_owned();
        text.push_str(&"jump b0\n".repeat(20));
        for at in 0..15 {
            let jump = format!("jump b{}\n", at + 1);
            text.push_str(&format!("}}\nchain b{at} {{\n{}", jump.repeat(20)));
        }
        text.push_str("}\nchain b15 {\n}\n}\n");
        assert!(!dropped(&text));
        let nested = format!("tcp dport {}", "{".repeat(100_000));
        assert!(!dropped(&format!("table f {{\nchain a {{\n{nested}")));
        assert!(!dropped(
            "table f {\nchain a { type filter hook input priority 0; policy drop\njump a\n}\n}"
        ));
    }
}

//! nftables rulesets (`nft(8)`): what a file loads, and whether a TCP connection to the guest gets through it. The part of
//! the grammar that images use is read in full; a rule whose match cannot be decided may match or not, and a ruleset with
//! words that are not known decides nothing: `nft` loads a file whole or, after an error, nothing of it.
mod eval;
mod parse;
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

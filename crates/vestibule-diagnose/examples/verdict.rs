//! `cargo run -p vestibule-diagnose --example verdict -- TREE-OR-IMAGE [UNIT]`: the verdict of a disk alone, as JSON.
#![expect(clippy::print_stdout, reason = "an example for people")]

use anyhow::{Context, Result};
use std::{fs::File, path::PathBuf};
use vestibule_diagnose::{
    Evidence, diagnose,
    disk::{dir::DirTree, ext4::Ext4Tree, source::SeekSource},
};

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1);
    let path = PathBuf::from(args.next().context("name a tree or an image")?);
    let evidence = if path.is_dir() {
        Evidence::new().disk(DirTree::new(&path))
    } else {
        Evidence::new().disk(Ext4Tree::open(SeekSource::file(File::open(&path)?)?)?)
    };
    let evidence = match args.next().and_then(|u| u.into_string().ok()) {
        Some(unit) => evidence.unit(unit),
        None => evidence,
    };
    println!("{}", serde_json::to_string_pretty(&diagnose(&evidence))?);
    Ok(())
}

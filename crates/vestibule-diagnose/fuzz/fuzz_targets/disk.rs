//! A file system, raw or in a partition table: opened, and judged as any disk is.
#![no_main]
use libfuzzer_sys::fuzz_target;
use vestibule_diagnose::{Evidence, diagnose, disk::ext4::Ext4Tree};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(tree) = Ext4Tree::open(bytes.to_vec()) {
        let _ = diagnose(&Evidence::new().disk(tree).unit("vm-browser-agent.service"));
    }
});

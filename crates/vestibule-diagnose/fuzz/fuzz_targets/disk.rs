//! A file system, raw or in a partition table: opened, its journal replayed, asked for attributes, and judged as any disk is.
#![no_main]
use libfuzzer_sys::fuzz_target;
use vestibule_diagnose::{
    Evidence, diagnose,
    disk::{Tree, ext4::Ext4Tree, xattr::Acl},
};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(tree) = Ext4Tree::open(bytes.to_vec()) {
        for entry in tree.list("/etc", 64).unwrap_or_default() {
            for attribute in tree.xattrs(&format!("/etc/{}", entry.name)) {
                let _ = Acl::parse(&attribute.value);
            }
        }
        let _ = diagnose(&Evidence::new().disk(tree).unit("vm-browser-agent.service"));
    }
});

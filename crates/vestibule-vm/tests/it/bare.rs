//! Guests of a few bytes: Multiboot kernels in 32-bit mode that write to the serial port and then do one thing. They run
//! under a real QEMU in milliseconds and need no image.
use camino::Utf8Path;
use std::collections::BTreeMap;
use vestibule_api::image::Manifest;

/// What a guest does after its words.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Then {
    /// Powers off through ACPI, as `poweroff` does.
    PowerOff,
    /// Halts for ever.
    Halt,
    /// Says its words again and again.
    Repeat,
}

/// Where the kernel is loaded.
const BASE: u32 = 0x0010_0000;
/// Bytes of the Multiboot header (Multiboot Specification 0.6.96, section 3.1), with load addresses.
const HEADER: u32 = 32;

/// A kernel that says `words` and then does one thing.
fn kernel(words: &str, then: Then) -> Vec<u8> {
    let end: &[u8] = match then {
        // mov dx,0x604; mov ax,0x2000; out dx,ax; hlt; jmp $-1
        Then::PowerOff => &[
            0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef, 0xf4, 0xeb, 0xfd,
        ],
        // cli; hlt; jmp $-2
        Then::Halt => &[0xfa, 0xf4, 0xeb, 0xfc],
        // jmp to the beginning
        Then::Repeat => &[0xeb, 0xec],
    };
    let text = BASE + HEADER + 18 + u32::try_from(end.len()).unwrap();
    let mut code = vec![0xbe];
    code.extend(text.to_le_bytes()); // mov esi, text
    // lodsb; test al,al; jz +8; mov dx,0x3f8; out dx,al; jmp lodsb
    code.extend([
        0xac, 0x84, 0xc0, 0x74, 0x08, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf4, 0x90,
    ]);
    assert_eq!(code.len(), 18);
    code.extend(end);
    code.extend(words.as_bytes());
    code.push(0);
    let (magic, flags) = (0x1bad_b002u32, 0x0001_0000u32);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let header = [magic, flags, checksum, BASE, BASE, 0, 0, BASE + HEADER];
    let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend(code);
    image
}

/// Writes an image directory whose kernel is such a guest.
pub(crate) fn image(directory: &Utf8Path, words: &str, then: Then) {
    std::fs::create_dir_all(directory).unwrap();
    let manifest = Manifest {
        schema: 1,
        recipe: "bare".into(),
        recipe_digest: "0".repeat(64),
        artifacts: BTreeMap::new(),
        kernel_release: "0".into(),
        cmdline: "quiet".into(),
        drivers: Vec::new(),
        min_memory_mib: 16,
        default_memory_mib: 32,
        default_vcpus: 1,
        required_units: Vec::new(),
        features: vec!["agent".into()],
        agent_build: "0".repeat(64),
        packages: Vec::new(),
        tools: Vec::new(),
        files: BTreeMap::<String, String>::new(),
    };
    std::fs::write(
        directory.join("manifest.json"),
        serde_json::to_vec(&manifest).unwrap(),
    )
    .unwrap();
    std::fs::write(directory.join("vmlinuz"), kernel(words, then)).unwrap();
    std::fs::write(directory.join("root.ext4"), vec![0; 1 << 20]).unwrap();
    std::fs::write(directory.join("initrd"), b"none").unwrap();
}

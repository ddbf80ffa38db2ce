//! Guests of a few bytes of 64-bit machine code, as Firecracker boots them.

/// What a guest does after its words.
#[derive(Clone, Copy)]
pub(super) enum Then {
    /// Writes the alphabet again and again, a letter each time that it has counted down.
    Count,
    /// Counts down, and resets the machine through the keyboard controller, as `reboot=k` makes Linux do.
    Reset,
}

pub(super) const WORDS: &str = "hello from the guest\n";
/// Where the kernel is loaded; below 1 MiB Firecracker refuses it.
const BASE: u64 = 0x0100_0000;
pub(super) const PAGE: usize = 4096;
/// What a guest counts down from between two letters: some ms where instructions are interpreted.
const COUNT: u32 = 300;

/// An ELF kernel with one segment. Firecracker enters it in 64-bit mode with the first GiB mapped onto itself (Linux,
/// Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
pub(super) fn kernel(then: Then) -> Vec<u8> {
    // mov ecx,COUNT; dec ecx; jnz $-2
    let mut count = vec![0xb9];
    count.extend(COUNT.to_le_bytes());
    count.extend([0xff, 0xc9, 0x75, 0xfc]);
    let mut end = Vec::new();
    match then {
        Then::Count => {
            end.extend([0xb3, b'a']); // mov bl,'a'
            end.extend(&count);
            // mov al,bl; mov dx,0x3f8; out dx,al; inc bl; cmp bl,'z'+1
            end.extend([0x88, 0xd8, 0x66, 0xba, 0xf8, 0x03, 0xee]);
            end.extend([0xfe, 0xc3, 0x80, 0xfb, b'z' + 1]);
            end.extend([0x75, back(end.len(), 2)]); // jne to the count
            end.extend([0xeb, back(end.len(), 0)]); // jmp to the beginning
        }
        Then::Reset => {
            end.extend(&count);
            end.extend([0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd]); // mov al,0xfe; out 0x64,al; hlt; jmp $-1
        }
    }
    // lodsb; test al,al; jz +7; mov dx,0x3f8; out dx,al; jmp to lodsb
    let say = [
        0xac, 0x84, 0xc0, 0x74, 0x07, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf4,
    ];
    let mut code = vec![0x48, 0x8d, 0x35]; // lea rsi,[rip+…]
    code.extend(u32::try_from(say.len() + end.len()).unwrap().to_le_bytes());
    code.extend(say);
    code.extend(end);
    code.extend(WORDS.as_bytes());
    code.push(0);
    elf(&code)
}

/// The operand of a short jump at `at` to `to`.
fn back(at: usize, to: usize) -> u8 {
    let distance = i8::try_from(to).unwrap() - i8::try_from(at + 2).unwrap();
    distance.to_le_bytes()[0]
}

fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |file: &mut Vec<u8>, values: &[u16]| {
        file.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    };
    half(&mut file, &[2, 62]); // an executable for x86-64
    file.extend(1u32.to_le_bytes());
    for word in [BASE, 64, 0] {
        file.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    file.extend(0u32.to_le_bytes());
    half(&mut file, &[64, 56, 1, 0, 0, 0]);
    file.extend(1u32.to_le_bytes()); // loaded
    file.extend(5u32.to_le_bytes()); // readable, executable
    let size = code.len() as u64;
    for word in [PAGE as u64, BASE, BASE, size, size, PAGE as u64] {
        file.extend(word.to_le_bytes());
    }
    file.resize(PAGE, 0);
    file.extend(code);
    file
}

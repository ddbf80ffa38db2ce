//! The ELF kernel inside a bzImage. QEMU boots the latter, Firecracker the former.
//!
//! A bzImage is a header, code that unpacks, and the packed kernel; where that is, the header says (Linux,
//! Documentation/arch/x86/boot.rst: `payload_offset`, `payload_length`). Debian packs its cloud kernel with LZ4, in the old
//! frame: a magic number, then blocks, each with its packed length before it. The last four bytes of the payload are the
//! unpacked length, which the kernel's build puts there (scripts/Makefile.lib, `size_append`).

/// What an LZ4 frame of the old kind begins with.
const MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// Every block but the last unpacks to so much.
const BLOCK: usize = 8 << 20;
/// A kernel, unpacked, is far smaller.
const LIMIT: usize = 512 << 20;
const SECTOR: usize = 512;

/// Why there is no ELF kernel in a file.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VmlinuxError {
    #[error("the file is no bzImage of boot protocol 2.08 or newer")]
    NotBzImage,
    #[error("the kernel is packed with {0}; only LZ4 can be unpacked")]
    Packing(&'static str),
    #[error("the packed kernel ends early or its lengths are wrong")]
    Lengths,
    #[error("a block of the packed kernel is damaged: {0}")]
    Block(String),
    #[error("what was packed is no ELF file")]
    NotElf,
}

/// Unpacks the kernel of `image`.
///
/// # Errors
/// When it is no bzImage, is packed with something else, or is damaged.
pub(crate) fn extract(image: &[u8]) -> Result<Vec<u8>, VmlinuxError> {
    let payload = payload(image).ok_or(VmlinuxError::NotBzImage)?;
    let Some(rest) = payload.strip_prefix(&MAGIC) else {
        return Err(VmlinuxError::Packing(packing(payload)));
    };
    let (mut rest, length) = rest.split_last_chunk().ok_or(VmlinuxError::Lengths)?;
    let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > LIMIT {
        return Err(VmlinuxError::Lengths);
    }
    let mut kernel = Vec::with_capacity(length);
    let mut block = vec![0; BLOCK];
    while let Some((packed, after)) = rest.split_first_chunk() {
        let packed = usize::try_from(u32::from_le_bytes(*packed)).unwrap_or(usize::MAX);
        let (packed, after) = after
            .split_at_checked(packed)
            .ok_or(VmlinuxError::Lengths)?;
        let unpacked = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|err| VmlinuxError::Block(err.to_string()))?;
        if kernel.len() + unpacked > length {
            return Err(VmlinuxError::Lengths);
        }
        kernel.extend_from_slice(&block[..unpacked]);
        rest = after;
    }
    if !rest.is_empty() || kernel.len() != length {
        return Err(VmlinuxError::Lengths);
    }
    if !kernel.starts_with(b"\x7fELF\x02") {
        return Err(VmlinuxError::NotElf);
    }
    Ok(kernel)
}

/// The packed kernel.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let header = image.get(0x202..0x206)? == b"HdrS";
    let protocol = u16::from_le_bytes(image.get(0x206..0x208)?.try_into().ok()?);
    if !header || protocol < 0x0208 {
        return None;
    }
    // 0 means 4, for a reason that is long gone.
    let setup_sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let from = (setup_sectors + 1) * SECTOR + word(0x248)?;
    image.get(from..from.checked_add(word(0x24c)?)?)
}

/// How a kernel is packed, by its first bytes.
fn packing(payload: &[u8]) -> &'static str {
    let known: [(&[u8], &str); 6] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ\0", "XZ"),
        (b"\x28\xb5\x2f\xfd", "Zstandard"),
        (b"BZh", "bzip2"),
        (b"\x5d\0\0", "LZMA"),
        (b"\x89LZO", "LZO"),
    ];
    known
        .iter()
        .find(|(magic, _)| payload.starts_with(magic))
        .map_or("something unknown", |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage whose payload is `payload`.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 5 * SECTOR + 100];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&100_u32.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend(payload);
        image.extend(b"what follows the payload");
        image
    }

    fn packed(kernel: &[u8]) -> Vec<u8> {
        let mut payload = MAGIC.to_vec();
        for block in kernel.chunks(BLOCK) {
            let packed = lz4_flex::block::compress(block);
            payload.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
            payload.extend(packed);
        }
        payload.extend(u32::try_from(kernel.len()).unwrap().to_le_bytes());
        payload
    }

    fn kernel() -> Vec<u8> {
        let mut kernel = b"\x7fELF\x02\x01".to_vec();
        kernel.resize(BLOCK + 4321, 7);
        kernel
    }

    #[test]
    fn a_kernel_of_several_blocks_is_what_was_packed() {
        assert_eq!(extract(&image(&packed(&kernel()))), Ok(kernel()));
    }

    #[test]
    fn what_cannot_be_unpacked_is_said() {
        assert_eq!(extract(b"MZ"), Err(VmlinuxError::NotBzImage));
        let xz = image(b"\xfd7zXZ\0rest");
        assert_eq!(extract(&xz), Err(VmlinuxError::Packing("XZ")));
        let mut short = packed(&kernel());
        short.truncate(short.len() - 10);
        assert_eq!(extract(&image(&short)), Err(VmlinuxError::Lengths));
        let mut damaged = packed(&kernel());
        damaged[9] ^= 0xff;
        assert!(extract(&image(&damaged)).is_err());
        let text = packed(b"this is no kernel");
        assert_eq!(extract(&image(&text)), Err(VmlinuxError::NotElf));
        for length in [0, 1, 0x210, 5 * SECTOR] {
            assert!(extract(&image(&packed(&kernel()))[..length]).is_err());
        }
    }
}

//! Extended attributes of ext4 (`fs/ext4/xattr.h`): in the inode behind its fields, and in a block of their own. Values in
//! inodes of their own (`ea_inode`) are not read: `ext4-view` opens no file system that has them. And what two of them mean: access lists (`acl(5)`) and capabilities
//! (`capabilities(7)`).
use super::raw::{Inode, Raw};
use crate::bytes::{le16, le32};

const MAGIC: u32 = 0xea02_0000;
/// Attributes of one file that are read.
const COUNT_LIMIT: usize = 256;
/// Bytes of one value, as in the kernel (`XATTR_SIZE_MAX`).
const VALUE_LIMIT: usize = 65_536;
/// Bytes of all values of one file.
const TOTAL_LIMIT: usize = 1 << 20;

/// Name of the list that says who may use a file.
pub const ACCESS_LIST: &str = "system.posix_acl_access";
/// Name of a program's capabilities.
pub const CAPABILITY: &str = "security.capability";

/// One extended attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// With its prefix, as `getfattr -m -` shows it.
    pub name: String,
    /// As it lies on the disk: an access list is shorter there than in a system call.
    pub value: Vec<u8>,
}

/// The attributes of the inode with this number, and what is wrong with them.
pub(super) fn read(raw: &Raw, number: u32) -> (Vec<Xattr>, Option<String>) {
    let mut found = Vec::new();
    let Some(inode) = raw.inode(number) else {
        return (found, Some("its inode is out of reach".to_owned()));
    };
    let whole = in_inode(&inode, &mut found).and_then(|()| in_block(raw, &inode, &mut found));
    (
        found,
        whole
            .is_none()
            .then(|| "an attribute leads out of its place".to_owned()),
    )
}

fn in_inode(inode: &Inode, found: &mut Vec<Xattr>) -> Option<()> {
    // An inode of 128 bytes has no room.
    let Some(extra) = le16(inode.bytes(), 0x80) else {
        return Some(());
    };
    let at = usize::from(extra).checked_add(128)?;
    if le32(inode.bytes(), at) != Some(MAGIC) {
        return Some(());
    }
    let entries = inode.bytes().get(at.checked_add(4)?..)?;
    parse(entries, entries, found)
}

fn in_block(raw: &Raw, inode: &Inode, found: &mut Vec<Xattr>) -> Option<()> {
    let number =
        u64::from(le32(inode.bytes(), 0x68)?) | (u64::from(le16(inode.bytes(), 0x76)?) << 32);
    if number == 0 {
        return Some(());
    }
    let block = raw.block(number)?;
    (le32(&block, 0)? == MAGIC).then_some(())?;
    parse(block.get(32..)?, &block, found)
}

/// Reads entries; their values lie in `values`.
fn parse(mut entries: &[u8], values: &[u8], found: &mut Vec<Xattr>) -> Option<()> {
    // Four zero bytes end the list; one that fills its place has none.
    while let Some(head) = le32(entries, 0).filter(|head| *head != 0) {
        let [name_len, prefix, ..] = head.to_le_bytes();
        let offset = usize::from(le16(entries, 2)?);
        let inode = le32(entries, 4)?;
        let size = usize::try_from(le32(entries, 8)?).ok()?;
        let name = entries.get(16..usize::from(name_len).checked_add(16)?)?;
        let total: usize = found.iter().map(|a| a.value.len()).sum();
        if size > VALUE_LIMIT
            || found.len() >= COUNT_LIMIT
            || total.saturating_add(size) > TOTAL_LIMIT
        {
            return None;
        }
        if inode != 0 {
            return None;
        }
        let value = values.get(offset..offset.checked_add(size)?)?.to_vec();
        found.push(Xattr {
            name: format!("{}{}", prefix_of(prefix), String::from_utf8_lossy(name)),
            value,
        });
        entries = entries.get(usize::from(name_len).checked_add(16)?.next_multiple_of(4)..)?;
    }
    Some(())
}

fn prefix_of(index: u8) -> &'static str {
    match index {
        1 => "user.",
        2 => ACCESS_LIST,
        3 => "system.posix_acl_default",
        4 => "trusted.",
        6 => "security.",
        7 => "system.",
        8 => "system.richacl",
        _ => "",
    }
}

/// Who may do what with a file, where that is more than its mode says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acl {
    /// Tag, permissions (4 read, 2 write, 1 execute), and the id where the tag has one.
    entries: Vec<(u16, u16, u32)>,
}

const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const GROUP: u16 = 8;
const MASK: u16 = 16;
const OTHER: u16 = 32;

impl Acl {
    /// Reads a list: as the disk has it (version 1), or as a system call gives it (version 2).
    pub fn parse(value: &[u8]) -> Option<Self> {
        let short = match le32(value, 0)? {
            1 => true,
            2 => false,
            _ => return None,
        };
        let mut rest = value.get(4..)?;
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let tag = le16(rest, 0)?;
            let named = matches!(tag, USER | GROUP);
            let id = if named { le32(rest, 4)? } else { 0 };
            entries.push((tag, le16(rest, 2)?, id));
            rest = rest.get(if named || !short { 8 } else { 4 }..)?;
        }
        Some(Self { entries })
    }

    /// Whether the list lets `uid` with `gids` execute, or enter, a file of `owner` and `group`: the kernel's order
    /// (`posix_acl_permission`). None where the list is not whole.
    pub fn executes(&self, uid: u32, gids: &[u32], owner: u32, group: u32) -> Option<bool> {
        let of = |tag| self.entries.iter().find(|e| e.0 == tag).map(|e| e.1);
        let mask = of(MASK).unwrap_or(7);
        if uid == owner {
            return Some(of(USER_OBJ)? & 1 != 0);
        }
        if let Some((_, permissions, _)) = self.entries.iter().find(|e| e.0 == USER && e.2 == uid) {
            return Some(permissions & mask & 1 != 0);
        }
        let own = |e: &&(u16, u16, u32)| {
            (e.0 == GROUP_OBJ && gids.contains(&group)) || (e.0 == GROUP && gids.contains(&e.2))
        };
        let mut groups = self.entries.iter().filter(own).peekable();
        if groups.peek().is_some() {
            return Some(groups.any(|e| e.1 & mask & 1 != 0));
        }
        Some(of(OTHER)? & 1 != 0)
    }

    /// The list as `getfacl` writes it, with numbers for names.
    pub fn text(&self) -> String {
        let line = |(tag, permissions, id): &(u16, u16, u32)| {
            let (kind, id) = match *tag {
                USER_OBJ => ("user", String::new()),
                USER => ("user", id.to_string()),
                GROUP_OBJ => ("group", String::new()),
                GROUP => ("group", id.to_string()),
                MASK => ("mask", String::new()),
                OTHER => ("other", String::new()),
                _ => ("?", String::new()),
            };
            let bit = |bit: u16, letter| if permissions & bit != 0 { letter } else { '-' };
            format!("{kind}:{id}:{}{}{}", bit(4, 'r'), bit(2, 'w'), bit(1, 'x'))
        };
        self.entries
            .iter()
            .take(32)
            .map(line)
            .collect::<Vec<_>>()
            .join(" ")
    }
}

/// What a program's file gives it (`include/uapi/linux/capability.h`, `struct vfs_cap_data`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Bit n: capability n is given.
    pub permitted: u64,
    /// Bit n: capability n is given where the process may inherit it.
    pub inheritable: u64,
    /// They are in effect at once: the program does not know of capabilities, and is not started without all of them.
    pub effective: bool,
}

impl Capabilities {
    /// Reads revisions 1 to 3.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let magic = le32(value, 0)?;
        let words = match magic >> 24 {
            1 => 1,
            2 | 3 => 2,
            _ => return None,
        };
        let set = |at: usize| {
            let low = u64::from(le32(value, at)?);
            let high = if words == 2 {
                le32(value, at.checked_add(8)?)?
            } else {
                0
            };
            Some(low | (u64::from(high) << 32))
        };
        Some(Self {
            permitted: set(4)?,
            inheritable: set(8)?,
            effective: magic & 1 != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[(u16, u16, u32)]) -> Acl {
        Acl {
            entries: entries.to_vec(),
        }
    }

    #[test]
    fn an_access_list_is_asked_in_the_kernels_order() {
        let acl = list(&[
            (USER_OBJ, 7, 0),
            (USER, 4, 1000),
            (GROUP_OBJ, 5, 0),
            (GROUP, 7, 50),
            (MASK, 5, 0),
            (OTHER, 5, 0),
        ]);
        // The owner, whatever a list says of it as a named user.
        assert_eq!(acl.executes(0, &[0], 0, 0), Some(true));
        // A named user, although others may and one of its groups may.
        assert_eq!(acl.executes(1000, &[50], 0, 0), Some(false));
        assert_eq!(acl.executes(1001, &[50], 0, 0), Some(true));
        assert_eq!(acl.executes(1001, &[7], 0, 0), Some(true));
        let masked = list(&[
            (USER_OBJ, 7, 0),
            (USER, 7, 1000),
            (GROUP_OBJ, 5, 0),
            (MASK, 4, 0),
            (OTHER, 5, 0),
        ]);
        assert_eq!(masked.executes(1000, &[1000], 0, 0), Some(false));
        // A group that matches and grants nothing is not asked as others.
        assert_eq!(masked.executes(5, &[0], 0, 0), Some(false));
        assert_eq!(masked.executes(5, &[5], 0, 0), Some(true));
        assert_eq!(
            masked.text(),
            "user::rwx user:1000:rwx group::r-x mask::r-- other::r-x"
        );
    }

    #[test]
    fn both_forms_of_a_list_say_the_same() {
        let mut disk = 1_u32.to_le_bytes().to_vec();
        let mut call = 2_u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in [
            (USER_OBJ, 7_u16, None),
            (USER, 4, Some(1000_u32)),
            (OTHER, 5, None),
        ] {
            for (form, always) in [(&mut disk, false), (&mut call, true)] {
                form.extend(tag.to_le_bytes());
                form.extend(permissions.to_le_bytes());
                if id.is_some() || always {
                    form.extend(id.unwrap_or(u32::MAX).to_le_bytes());
                }
            }
        }
        assert_eq!(Acl::parse(&disk), Acl::parse(&call));
        assert_eq!(
            Acl::parse(&disk).unwrap().text(),
            "user::rwx user:1000:r-- other::r-x"
        );
        assert_eq!(Acl::parse(&disk[..disk.len() - 1]), None);
        assert_eq!(Acl::parse(&[]), None);
    }
}

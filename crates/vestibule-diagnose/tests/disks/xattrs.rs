//! Extended attributes, as `mke2fs -d` takes them from real files and as `debugfs` reads them; and what two of them decide.
use crate::{Disk, ask, run};
use anyhow::{Context, Result, ensure};
use proptest::prelude::*;
use rustix::fs::{XattrFlags, setxattr};
use std::{collections::BTreeMap, fs, sync::LazyLock, time::Instant};
use vestibule_api::{
    cause::Cause,
    finding::{Verdict, VerdictKind},
};
use vestibule_diagnose::disk::{
    Root, Tree as _,
    dir::DirTree,
    ext4::Ext4Tree,
    xattr::{ACCESS_LIST, Acl, Capabilities, Xattr},
};

const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const MASK: u16 = 16;
const OTHER: u16 = 32;

/// An access list as system calls have it (`include/uapi/linux/posix_acl_xattr.h`).
fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut out = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        out.extend(tag.to_le_bytes());
        out.extend(permissions.to_le_bytes());
        out.extend(id.to_le_bytes());
    }
    out
}

const NONE: u32 = u32::MAX;
/// Everybody may read and execute, but for the user `web`.
const WITHOUT_WEB: [(u16, u16, u32); 5] = [
    (USER_OBJ, 7, NONE),
    (USER, 4, 1000),
    (GROUP_OBJ, 5, NONE),
    (MASK, 5, NONE),
    (OTHER, 5, NONE),
];

fn set(disk: &Disk, path: &str, name: &str, value: &[u8]) -> Result<()> {
    let at = disk.tree().join(path);
    setxattr(at.as_std_path(), name, value, XattrFlags::empty())
        .with_context(|| format!("set {name} of {at}"))
}

/// Names and sizes in debugfs's list: `  user.color (4) = "blue"`.
fn listed(disk: &Disk, path: &str) -> Result<BTreeMap<String, usize>> {
    let text = ask(&disk.image(), &format!("ea_list {path}"))?;
    text.lines()
        .filter_map(|l| l.strip_prefix("  "))
        .map(|line| {
            let (name, rest) = line.split_once(" (").with_context(|| line.to_owned())?;
            let (size, _) = rest.split_once(')').with_context(|| line.to_owned())?;
            Ok((name.to_owned(), size.parse()?))
        })
        .collect()
}

/// The value that debugfs has of an attribute.
fn value(disk: &Disk, path: &str, name: &str) -> Result<Vec<u8>> {
    let out = disk.dir.path().join("value");
    run(
        "debugfs",
        &[
            "-R",
            &format!("ea_get -f {out} {path} {name}"),
            disk.image().as_str(),
        ],
    )?;
    Ok(fs::read(&out)?)
}

/// Both readers agree on every attribute of `path`; their number.
fn agree(disk: &Disk, root: &Root, path: &str) -> Result<usize> {
    let theirs = listed(disk, path)?;
    let ours = root.xattrs(path);
    let names: BTreeMap<_, _> = ours.iter().map(|a| (a.name.as_str(), a)).collect();
    ensure!(names.len() == theirs.len(), "{path}: {names:?} {theirs:?}");
    for name in theirs.keys() {
        let Xattr { value: found, .. } = names
            .get(name.as_str())
            .with_context(|| format!("{path}: no {name}"))?;
        let expected = value(disk, path, name)?;
        if name == ACCESS_LIST {
            // The disk's form is another one than the system call's.
            ensure!(
                Acl::parse(found).is_some() && Acl::parse(found) == Acl::parse(&expected),
                "{path}: {name}"
            );
        } else {
            ensure!(*found == expected, "{path}: {name}");
        }
    }
    Ok(names.len())
}

/// A disk with attributes of every kind and place.
fn rich() -> Result<Disk> {
    let disk = Disk::with_service()?;
    disk.file("etc/many", "x")?;
    set(&disk, "opt/front/run", "user.color", b"blue")?;
    set(&disk, "opt/front/run", "user.empty", b"")?;
    set(&disk, "opt/front/run", ACCESS_LIST, &list(&WITHOUT_WEB))?;
    for number in 0..20 {
        set(
            &disk,
            "etc/many",
            &format!("user.key{number}"),
            format!("value {number}").repeat(5).as_bytes(),
        )?;
    }
    disk.pack(&["-b", "4096"])?;
    // What this host may not let a test set on its own files.
    let file = disk.dir.path().join("big");
    fs::write(&file, "long ".repeat(700))?;
    let caps = disk.dir.path().join("caps");
    fs::write(&caps, capabilities(1 << 10))?;
    disk.debugfs(&format!(
        "ea_set -f {file} /etc/group user.large\nea_set -f {caps} /opt/front/shell security.capability\n\
         ea_set /opt/front/shell security.selinux system_u:object_r:bin_t:s0\n"
    ))?;
    Ok(disk)
}

/// `struct vfs_cap_data`, revision 2, in effect at once.
fn capabilities(permitted: u64) -> Vec<u8> {
    let halves = [permitted & 0xffff_ffff, 0, permitted >> 32, 0];
    let words = std::iter::once(0x0200_0001).chain(halves);
    words
        .flat_map(|w| u64::to_le_bytes(w).into_iter().take(4))
        .collect()
}

#[test]
fn attributes_are_what_debugfs_reads() -> Result<()> {
    let disk = rich()?;
    let root = disk.read()?;
    assert_eq!(
        agree(&disk, &root, "/opt/front/run")?,
        3,
        "in the inode, and a list"
    );
    assert_eq!(agree(&disk, &root, "/etc/many")?, 20, "in a block");
    assert_eq!(
        agree(&disk, &root, "/etc/group")?,
        1,
        "nearly a whole block"
    );
    assert_eq!(agree(&disk, &root, "/opt/front/shell")?, 2, "of security");
    assert_eq!(agree(&disk, &root, "/etc/passwd")?, 0);
    assert!(
        root.xattr("/etc/group", "user.large")
            .is_some_and(|v| v.len() == 3_500)
    );
    let caps = root
        .xattr("/opt/front/shell", "security.capability")
        .context("none")?;
    let expected = Capabilities {
        permitted: 1 << 10,
        inheritable: 0,
        effective: true,
    };
    assert_eq!(Capabilities::parse(&caps), Some(expected));
    assert_eq!(root.damage(), Vec::<String>::new());
    // The tree itself, by this machine's system calls, has the same where that lets a test set them.
    let tree = Root::new(DirTree::new(disk.tree()));
    assert_eq!(
        tree.xattr("/opt/front/run", "user.color"),
        root.xattr("/opt/front/run", "user.color")
    );
    let lists = [&tree, &root].map(|r| Acl::parse(&r.xattr("/opt/front/run", ACCESS_LIST)?));
    assert!(lists[0].is_some() && lists[0] == lists[1], "{lists:?}");
    Ok(())
}

fn cause(verdict: &Verdict) -> Option<(Cause, String)> {
    let finding = verdict.finding.as_ref()?;
    let text = finding
        .evidence
        .iter()
        .map(|q| q.text.as_str())
        .collect::<Vec<_>>()
        .join("\n");
    Some((finding.cause, format!("{}\n{text}", finding.why)))
}

/// The mode says that everybody may execute, and the list says that the unit's user may not.
#[test]
fn an_access_list_that_leaves_out_the_units_user_is_named() -> Result<()> {
    for (path, says) in [
        (
            "opt/front/run",
            "its access list keeps uid 1000 from executing it",
        ),
        ("opt/front", "its user may not enter /opt/front"),
        (
            "opt/front/shell",
            "its access list keeps uid 1000 from executing it",
        ),
    ] {
        let disk = Disk::with_service()?;
        set(&disk, path, ACCESS_LIST, &list(&WITHOUT_WEB))?;
        disk.pack(&[])?;
        let (cause, text) = cause(&disk.verdict()?).with_context(|| format!("{path}: no cause"))?;
        assert_eq!(cause, Cause::ExecNotExecutable, "{path}: {text}");
        assert!(
            text.contains(says) && text.contains("user:1000:r--"),
            "{path}: {text}"
        );
        // The control: the same list about somebody else.
        let mut other = WITHOUT_WEB;
        other[1].2 = 1001;
        set(&disk, path, ACCESS_LIST, &list(&other))?;
        disk.pack(&[])?;
        assert_eq!(disk.verdict()?.verdict, VerdictKind::Healthy, "{path}");
    }
    Ok(())
}

/// A list may also give what the mode does not.
#[test]
fn an_access_list_that_lets_the_units_user_in_is_no_fault() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let disk = Disk::with_service()?;
    let run = disk.tree().join("opt/front/run");
    fs::set_permissions(&run, fs::Permissions::from_mode(0o750))?;
    disk.pack(&["-E", "root_owner=0:0"])?;
    disk.debugfs("sif /opt/front/run uid 0\nsif /opt/front/run gid 0\n")?;
    let (found, text) = cause(&disk.verdict()?).context("no cause without the list")?;
    assert_eq!(found, Cause::ExecNotExecutable, "{text}");
    let lets = [
        (USER_OBJ, 7, NONE),
        (USER, 5, 1000),
        (GROUP_OBJ, 5, NONE),
        (MASK, 5, NONE),
        (OTHER, 0, NONE),
    ];
    set(&disk, "opt/front/run", ACCESS_LIST, &list(&lets))?;
    disk.pack(&["-E", "root_owner=0:0"])?;
    disk.debugfs("sif /opt/front/run uid 0\nsif /opt/front/run gid 0\n")?;
    let verdict = disk.verdict()?;
    assert_eq!(verdict.verdict, VerdictKind::Healthy, "{verdict:#?}");
    Ok(())
}

/// `cap_net_bind_service=ep` on a program whose unit may not have it: `execve` answers EPERM, for root, too (tried on Linux 6
/// with `setpriv --bounding-set`).
#[test]
fn capabilities_that_the_unit_may_not_have_are_named() -> Result<()> {
    let with = |line: &str| -> Result<Verdict> {
        let disk = Disk::with_service()?;
        let unit = format!(
            "[Service]\nExecStart=/opt/front/shell\nUser=web\n{line}\n\n[Install]\nWantedBy=multi-user.target\n"
        );
        disk.file("etc/systemd/system/front.service", &unit)?;
        disk.pack(&[])?;
        let caps = disk.dir.path().join("caps");
        fs::write(&caps, capabilities(1 << 10))?;
        disk.debugfs(&format!(
            "ea_set -f {caps} /opt/front/shell security.capability\n"
        ))?;
        disk.verdict()
    };
    for line in [
        "CapabilityBoundingSet=CAP_NET_RAW",
        "CapabilityBoundingSet=",
        "CapabilityBoundingSet=~CAP_NET_BIND_SERVICE CAP_KILL",
    ] {
        let (cause, text) = cause(&with(line)?).with_context(|| format!("{line}: no cause"))?;
        assert_eq!(cause, Cause::ExecNotExecutable, "{line}: {text}");
        assert!(
            text.contains("cap_net_bind_service") && text.contains(line),
            "{line}: {text}"
        );
    }
    for line in [
        "",
        "CapabilityBoundingSet=CAP_NET_BIND_SERVICE",
        "CapabilityBoundingSet=~CAP_KILL",
        "CapabilityBoundingSet=CAP_KILL\nCapabilityBoundingSet=CAP_NET_BIND_SERVICE",
    ] {
        let verdict = with(line)?;
        assert_eq!(
            verdict.verdict,
            VerdictKind::Healthy,
            "{line}: {verdict:#?}"
        );
    }
    Ok(())
}

/// A disk whose metadata has no checksums, so that what is damaged is read.
static RICH: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let disk = rich().expect("the disk is made");
    run("tune2fs", &["-O", "^metadata_csum", disk.image().as_str()])
        .expect("the checksums are taken off");
    fs::read(disk.image()).expect("the disk is read")
});

const FILES: [&str; 5] = [
    "/opt/front/run",
    "/etc/many",
    "/etc/group",
    "/opt/front/shell",
    "/etc/passwd",
];

/// Places of the magic number of attributes: in inodes, and at the begin of blocks.
static PLACES: LazyLock<Vec<usize>> = LazyLock::new(|| {
    let magic = 0xea02_0000_u32.to_le_bytes();
    (0..RICH.len())
        .step_by(4)
        .filter(|at| RICH[*at..].starts_with(&magic))
        .collect()
});

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bits flipped where attributes are, inodes before them included, and the end cut off.
    #[test]
    fn attributes_survive_damage(
        flips in prop::collection::vec((any::<prop::sample::Index>(), -160_isize..400, any::<u8>()), 1..60),
        keep in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = RICH.clone();
        for (place, offset, value) in flips {
            let at = PLACES[place.index(PLACES.len())].saturating_add_signed(offset);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        if let Some(keep) = keep {
            bytes.truncate(keep.index(bytes.len()));
        }
        let start = Instant::now();
        if let Ok(tree) = Ext4Tree::open(bytes) {
            for path in FILES {
                let found = tree.xattrs(path);
                prop_assert!(found.iter().map(|a| a.value.len()).sum::<usize>() <= 1 << 20);
                for attribute in &found {
                    let _ = (Acl::parse(&attribute.value), Capabilities::parse(&attribute.value));
                }
            }
            prop_assert!(tree.damage().len() <= 16);
        }
        prop_assert!(start.elapsed().as_secs() < 30);
    }
}

/// Sizes and places that lie are said, and nothing is read beyond them.
#[test]
fn hostile_sizes_are_damage() -> Result<()> {
    ensure!(PLACES.len() >= 4, "attributes in few places: {:?}", *PLACES);
    let mut bytes = RICH.clone();
    for at in &*PLACES {
        // The first entry behind the magic of an inode, and behind the header of a block.
        for entry in [at + 4, at + 32] {
            bytes[entry + 8..entry + 12].fill(0xff);
        }
    }
    let tree = Ext4Tree::open(bytes)?;
    for path in FILES {
        assert!(tree.xattrs(path).len() < 20, "{path}");
    }
    assert!(
        tree.damage()
            .iter()
            .any(|d| d.contains("extended attributes of /etc/many")),
        "{:?}",
        tree.damage()
    );
    Ok(())
}

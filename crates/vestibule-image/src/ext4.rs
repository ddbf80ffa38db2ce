//! The root image: written from a tar stream by mke2fs, changed by debugfs. Nothing is mounted, nobody is root.
//!
//! e2fsprogs 1.47.2 is the first that takes every time from `SOURCE_DATE_EPOCH`, so that the same tree gives the same
//! bytes; where the host's is older, the suite's backport is fetched and used from the cache.
use crate::{
    EPOCH,
    apt::{self, Apt, AptError},
    archive::Extent,
    cache::{Cache, CacheError, Work},
    host::{Host, HostError},
};
use camino::{Utf8Path, Utf8PathBuf};
use std::{io::Write, process::Command};

/// The first release whose images are reproducible.
const NEEDED: [u32; 3] = [1, 47, 2];
/// What our readers (ext4-view) and a read-only root can do without: a journal, room to grow, and what else mke2fs
/// would take by default.
const FEATURES: &str = "none,dir_index,extent,64bit,flex_bg,filetype,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
/// Room for the agent, which is put in afterwards, and for its successors in size.
const SPARE: u64 = 32 << 20;
const INODE: u64 = 256;
/// mke2fs reads tar archives with a library that it opens when it needs it. These have it and what it needs.
const READER: [&str; 10] = [
    "libacl1",
    "libarchive13",
    "libbz2-1.0",
    "libicu72",
    "liblz4-1",
    "liblzma5",
    "libnettle8",
    "libxml2",
    "libzstd1",
    "zlib1g",
];
const WRITER: [&str; 4] = ["e2fsprogs", "libcom-err2", "libext2fs2", "libss2"];

/// Why there is no root image.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    #[error(transparent)]
    Apt(#[from] AptError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("unpack `{package}`")]
    Unpack {
        package: Utf8PathBuf,
        #[source]
        err: HostError,
    },
    #[error(
        "find e2fsprogs 1.47.2 or newer: the one of {suite}'s backports does not say its version"
    )]
    Version { suite: String },
    #[error("{what} the root image")]
    Tool {
        what: &'static str,
        #[source]
        err: HostError,
    },
    #[error("write `{path}`")]
    Write {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("`{path}` is not in the root image after it was written there")]
    NotThere { path: String },
}

/// e2fsprogs, new enough.
pub(crate) struct E2fs<'a> {
    host: &'a Host<'a>,
    /// Where it was unpacked; none: the host's own.
    root: Option<Utf8PathBuf>,
    directory: Utf8PathBuf,
}

impl<'a> E2fs<'a> {
    /// The host's, else the one in the cache, else fetched.
    pub(crate) fn find(
        host: &'a Host<'a>,
        cache: &Cache,
        work: &Work,
        suite: &str,
    ) -> Result<Self, Ext4Error> {
        let own = Self {
            host,
            root: None,
            directory: work.directory.clone(),
        };
        if own.new_enough() && has_tar_reader() {
            return Ok(own);
        }
        let key = crate::digest::of_list(["e2fsprogs 1", suite]);
        let layer = cache.layer(work, "e2fsprogs", &key, false, |directory| {
            fetch(host, cache, work, suite, directory)
        })?;
        let found = Self {
            root: Some(layer.directory),
            ..own
        };
        if found.new_enough() {
            Ok(found)
        } else {
            Err(Ext4Error::Version {
                suite: suite.to_owned(),
            })
        }
    }

    fn new_enough(&self) -> bool {
        // It prints its version on standard error, so ask the shell-less way: both streams.
        let Ok(output) = self.command("mke2fs").arg("-V").output() else {
            return false;
        };
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let version = text.split_whitespace().nth(1).unwrap_or_default();
        let parts: Vec<u32> = version
            .split('.')
            .map(|part| part.parse().unwrap_or(0))
            .collect();
        parts.as_slice() >= NEEDED.as_slice()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = match &self.root {
            None => Command::new(format!("/usr/sbin/{program}")),
            Some(root) => {
                let sbin = ["sbin", "usr/sbin"].map(|directory| root.join(directory).join(program));
                let mut command =
                    Command::new(sbin.iter().find(|path| path.exists()).unwrap_or(&sbin[0]));
                let libraries = ["usr/lib", "lib"]
                    .map(|directory| root.join(directory).join("x86_64-linux-gnu"));
                command.env(
                    "LD_LIBRARY_PATH",
                    libraries.map(Utf8PathBuf::into_string).join(":"),
                );
                command
            }
        };
        // An empty configuration: what the host's mke2fs.conf prefers must not reach an image.
        command
            .env("MKE2FS_CONFIG", self.directory.join("mke2fs.conf"))
            .env("SOURCE_DATE_EPOCH", EPOCH.to_string())
            .env("E2FSPROGS_FAKE_TIME", EPOCH.to_string())
            .env("E2FSCK_TIME", EPOCH.to_string())
            .env("LC_ALL", "C.UTF-8");
        command
    }

    /// Writes a file system to `image`, from the tar stream that `feed` writes, with room for `extent`. `identity` names
    /// the content; the file system's UUID and hash seed come from it.
    pub(crate) fn make(
        &self,
        image: &Utf8Path,
        extent: Extent,
        identity: &str,
        feed: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    ) -> Result<(), Ext4Error> {
        let configuration = self.directory.join("mke2fs.conf");
        std::fs::write(&configuration, "[defaults]\n\tinode_size = 256\n").map_err(|err| {
            Ext4Error::Write {
                path: configuration,
                err,
            }
        })?;
        let inodes = extent.entries + 256;
        let bytes = extent.bytes + extent.bytes / 64 + inodes * INODE + SPARE;
        let blocks = bytes.div_ceil(1 << 20) * 256;
        let uuid = uuid(identity);
        let mut command = self.command("mke2fs");
        command
            .args([
                "-q",
                "-F",
                "-t",
                "ext4",
                "-b",
                "4096",
                "-I",
                "256",
                "-m",
                "0",
                "-L",
                "vestibule-root",
                "-O",
                FEATURES,
            ])
            .args(["-N", &inodes.to_string(), "-U", &uuid, "-E"])
            .arg(format!(
                "hash_seed={uuid},lazy_itable_init=0,root_owner=0:0,root_perms=0755,nodiscard"
            ))
            .args(["-d", "-"])
            .arg(image)
            .arg(blocks.to_string());
        self.host
            .feed(&mut command, feed)
            .map_err(|err| Ext4Error::Tool { what: "write", err })?;
        // mke2fs writes every directory as a list; a large one is then slow to look up. Exit code 1: it changed some.
        let check = self.host.run_accepting(
            self.command("e2fsck").args(["-f", "-y", "-D"]).arg(image),
            &[0, 1],
        );
        check.map_err(|err| Ext4Error::Tool {
            what: "index the directories of",
            err,
        })
    }

    /// Puts a program owned by root into an image, in place of what is there.
    pub(crate) fn put_program(
        &self,
        image: &Utf8Path,
        path: &str,
        bytes: &[u8],
    ) -> Result<(), Ext4Error> {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("/", path));
        // debugfs splits its requests at blanks: it gets plain names, and works in the directory of the source.
        let source = self.directory.join("program");
        std::fs::write(&source, bytes).map_err(|err| Ext4Error::Write {
            path: source.clone(),
            err,
        })?;
        let mut requests = format!("cd {directory}\nwrite program {name}\n");
        let fields = [
            ("mode", "0100755".to_owned()),
            ("uid", "0".to_owned()),
            ("gid", "0".to_owned()),
        ];
        let times = ["atime", "ctime", "mtime", "crtime"].map(|time| (time, format!("@{EPOCH}")));
        let extra = ["atime_extra", "ctime_extra", "mtime_extra", "crtime_extra"]
            .map(|time| (time, "0".to_owned()));
        for (field, value) in fields.into_iter().chain(times).chain(extra) {
            requests.push_str(&format!("set_inode_field {name} {field} {value}\n"));
        }
        requests.push_str(&format!("stat {name}\n"));
        let script = self.directory.join("requests");
        std::fs::write(&script, requests).map_err(|err| Ext4Error::Write {
            path: script.clone(),
            err,
        })?;
        let mut command = self.command("debugfs");
        command
            .args(["-w", "-f", "requests"])
            .arg(image)
            .current_dir(&self.directory);
        let printed = self
            .host
            .output(&mut command, 1 << 20)
            .map_err(|err| Ext4Error::Tool {
                what: "put the agent into",
                err,
            })?;
        // debugfs reports no request's failure by its exit code.
        let size = format!("Size: {}", bytes.len());
        if String::from_utf8_lossy(&printed)
            .lines()
            .any(|line| line.contains(&size))
        {
            Ok(())
        } else {
            Err(Ext4Error::NotThere {
                path: path.to_owned(),
            })
        }
    }
}

/// Fetches e2fsprogs from the backports, and the tar reader from the suite itself.
fn fetch(
    host: &Host<'_>,
    cache: &Cache,
    work: &Work,
    suite: &str,
    directory: &Utf8Path,
) -> Result<String, Ext4Error> {
    let lists = cache.directory("apt")?;
    let downloads = work.directory.join("e2fsprogs-packages");
    let backports = format!("{suite}-backports");
    let apt = Apt::new(
        host,
        &lists.join(&backports),
        &backports,
        &apt::backports(suite)?,
    )?;
    apt.download(&WRITER, &downloads)?;
    let apt = Apt::new(host, &lists.join(suite), suite, &apt::sources(suite)?)?;
    for package in apt.download(&READER, &downloads)? {
        let unpacked = host.run(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(&package)
                .arg(directory),
        );
        unpacked.map_err(|err| Ext4Error::Unpack { package, err })?;
    }
    Ok(String::from("e2fsprogs"))
}

fn has_tar_reader() -> bool {
    ["/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu"]
        .iter()
        .any(|directory| Utf8Path::new(directory).join("libarchive.so.13").exists())
}

/// A UUID of version 8 (RFC 9562: made as its maker likes) from a digest.
fn uuid(identity: &str) -> String {
    let hex = crate::digest::of(identity.as_bytes());
    format!(
        "{}-{}-8{}-8{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[13..16],
        &hex[17..20],
        &hex[20..32]
    )
}

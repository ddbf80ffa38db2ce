//! A root file system before it is one: every path with its kind, owner and where its bytes are.
//!
//! Layers are laid over each other here, in memory, and the result is written once, sorted, as a tar stream. Nothing is
//! unpacked, owned or mounted on the host, so no step needs root, and the order of a directory on the host's disk
//! cannot reach the image.
use camino::Utf8PathBuf;
use std::{
    collections::BTreeMap,
    io::{Read as _, Seek as _, SeekFrom},
    sync::Arc,
};

/// So many symbolic links are followed in one path (`MAXSYMLINKS` of Linux).
const LINKS: usize = 40;

/// What goes wrong with the tree.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    #[error("read `{path}`")]
    Read {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("`{path}` {what}")]
    Entry { path: String, what: &'static str },
    #[error("`{path}` is missing in the image")]
    Missing { path: String },
    #[error("write the tree")]
    Write(#[source] std::io::Error),
}

/// Where a file's bytes are.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// Part of a host file. Two paths with the same part are one file with two names.
    Part {
        file: Arc<Utf8PathBuf>,
        offset: u64,
        len: u64,
    },
    Bytes(Arc<[u8]>),
}

impl Content {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Part { len, .. } => *len,
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// Reads at most `limit` bytes from the beginning.
    pub(crate) fn head(&self, limit: u64) -> Result<Vec<u8>, TreeError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes
                .iter()
                .copied()
                .take(usize::try_from(limit).unwrap_or(usize::MAX))
                .collect()),
            Self::Part { file, offset, len } => {
                let mut bytes = Vec::new();
                open_at(file, *offset)
                    .and_then(|source| source.take(limit.min(*len)).read_to_end(&mut bytes))
                    .map_err(|err| TreeError::Read {
                        path: file.to_path_buf(),
                        err,
                    })?;
                Ok(bytes)
            }
        }
    }
}

fn open_at(path: &Utf8PathBuf, offset: u64) -> std::io::Result<std::fs::File> {
    let mut file = std::fs::File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    Ok(file)
}

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Directory,
    File(Content),
    Symlink(String),
}

#[derive(Clone, Debug)]
pub(crate) struct Node {
    /// Permission bits with set-id and sticky.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since the epoch.
    pub(crate) mtime: u64,
    pub(crate) kind: Kind,
    /// It has extended attributes, which images do not carry.
    pub(crate) xattrs: bool,
}

impl Node {
    pub(crate) fn new(kind: Kind, mode: u32) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            mtime: crate::EPOCH,
            kind,
            xattrs: false,
        }
    }
}

/// Absolute path → node. The root itself is `/`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// Puts a node at `path`, through symbolic links in its parents (`/lib` → `/usr/lib`), and makes parents that are not
    /// there. A directory that is there keeps its owner and mode.
    pub(crate) fn put(&mut self, path: &str, node: Node) -> Result<(), TreeError> {
        let (parent, name) = split(path)?;
        let parent = self.real(parent)?;
        self.make_directories(&parent);
        let path = child(&parent, name);
        if matches!(node.kind, Kind::Directory) && self.is_directory(&path) {
            return Ok(());
        }
        if !matches!(node.kind, Kind::Directory) && self.is_directory(&path) {
            return Err(TreeError::Entry {
                path,
                what: "is a directory and cannot become something else",
            });
        }
        self.nodes.insert(path, node);
        Ok(())
    }

    pub(crate) fn put_file(
        &mut self,
        path: &str,
        text: impl Into<Vec<u8>>,
        mode: u32,
    ) -> Result<(), TreeError> {
        self.put(
            path,
            Node::new(Kind::File(Content::Bytes(text.into().into())), mode),
        )
    }

    pub(crate) fn put_link(&mut self, path: &str, target: &str) -> Result<(), TreeError> {
        self.put(path, Node::new(Kind::Symlink(target.to_owned()), 0o777))
    }

    /// Puts a node as the lowest layer has it, links not followed.
    pub(crate) fn put_raw(&mut self, path: String, node: Node) {
        self.nodes.insert(path, node);
    }

    /// The node itself, a last symbolic link not followed.
    pub(crate) fn node(&self, path: &str) -> Option<&Node> {
        let (parent, name) = split(path).ok()?;
        self.nodes.get(&child(&self.real(parent).ok()?, name))
    }

    /// The bytes of the file at `path`, links followed.
    pub(crate) fn read(&self, path: &str) -> Result<Vec<u8>, TreeError> {
        let missing = || TreeError::Missing {
            path: path.to_owned(),
        };
        self.file(path).ok_or_else(missing)?.head(u64::MAX)
    }

    /// Where the file at `path` has its bytes, links followed.
    pub(crate) fn file(&self, path: &str) -> Option<&Content> {
        match &self.nodes.get(&self.real(path).ok()?)?.kind {
            Kind::File(content) => Some(content),
            Kind::Directory | Kind::Symlink(_) => None,
        }
    }

    /// Names in a directory, sorted.
    pub(crate) fn names(&self, directory: &str) -> Vec<String> {
        let Ok(real) = self.real(directory) else {
            return Vec::new();
        };
        let prefix = child(&real, "");
        let below = self
            .nodes
            .range(prefix.clone()..)
            .take_while(|(path, _)| path.starts_with(&prefix));
        below
            .filter_map(|(path, _)| path.strip_prefix(&prefix))
            .filter(|name| !name.is_empty() && !name.contains('/'))
            .map(str::to_owned)
            .collect()
    }

    /// Removes what `pattern` names, with everything below it. See [`matches()`].
    pub(crate) fn remove(&mut self, pattern: &str) -> usize {
        let before = self.nodes.len();
        let whole = format!("{pattern}/**");
        self.nodes
            .retain(|path, _| !matches(pattern, path) && !matches(&whole, path));
        before - self.nodes.len()
    }

    /// Gives everything at and below `home` to an account.
    pub(crate) fn own(&mut self, home: &str, uid: u32) {
        let below = format!("{home}/");
        for (path, node) in &mut self.nodes {
            if path == home || path.starts_with(&below) {
                (node.uid, node.gid) = (uid, uid);
            }
        }
    }

    /// `path` with every symbolic link in it followed; components that are not there stand for themselves.
    pub(crate) fn real(&self, path: &str) -> Result<String, TreeError> {
        let mut rest: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let mut real = String::from("/");
        let mut links = 0;
        while let Some(name) = rest.pop() {
            match name.as_str() {
                "" | "." => continue,
                ".." => {
                    real = split(&real)
                        .map_or_else(|_| "/".to_owned(), |(parent, _)| parent.to_owned());
                    continue;
                }
                _ => {}
            }
            let next = child(&real, &name);
            let Some(Node {
                kind: Kind::Symlink(target),
                ..
            }) = self.nodes.get(&next)
            else {
                real = next;
                continue;
            };
            links += 1;
            if links > LINKS {
                return Err(TreeError::Entry {
                    path: path.to_owned(),
                    what: "leads through a circle of links",
                });
            }
            if target.starts_with('/') {
                real = "/".to_owned();
            }
            rest.extend(target.split('/').rev().map(str::to_owned));
        }
        Ok(real)
    }

    fn is_directory(&self, path: &str) -> bool {
        path == "/"
            || matches!(
                self.nodes.get(path),
                Some(Node {
                    kind: Kind::Directory,
                    ..
                })
            )
    }

    fn make_directories(&mut self, path: &str) {
        let mut upto = String::new();
        for name in path.split('/').filter(|name| !name.is_empty()) {
            upto = format!("{upto}/{name}");
            self.nodes
                .entry(upto.clone())
                .or_insert_with(|| Node::new(Kind::Directory, 0o755));
        }
    }
}

/// Parent and name. The root has neither.
fn split(path: &str) -> Result<(&str, &str), TreeError> {
    match path.trim_end_matches('/').rsplit_once('/') {
        Some(("", name)) => Ok(("/", name)),
        Some((parent, name)) => Ok((parent, name)),
        None => Err(TreeError::Entry {
            path: path.to_owned(),
            what: "is not an absolute path below the root",
        }),
    }
}

fn child(parent: &str, name: &str) -> String {
    format!("{}/{name}", parent.trim_end_matches('/'))
}

/// Whether `path` is what `pattern` names: `*` stands for any part of one component, `**` for any components.
pub(crate) fn matches(pattern: &str, path: &str) -> bool {
    fn components(pattern: &[&str], path: &[&str]) -> bool {
        match pattern.split_first() {
            None => path.is_empty(),
            Some((&"**", rest)) => (1..=path.len()).any(|taken| components(rest, &path[taken..])),
            Some((first, rest)) => path
                .split_first()
                .is_some_and(|(name, path)| wild(first, name) && components(rest, path)),
        }
    }
    let split = |text| str::split(text, '/').collect::<Vec<_>>();
    components(&split(pattern), &split(path))
}

/// Whether one component matches, with `*` for any run of characters.
fn wild(pattern: &str, name: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(rest) = name.strip_prefix(head) else {
        return false;
    };
    rest.char_indices()
        .map(|(at, _)| &rest[at..])
        .chain([""])
        .any(|rest| wild(tail, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged_usr() -> Tree {
        let mut tree = Tree::default();
        tree.put("/usr/lib", Node::new(Kind::Directory, 0o755))
            .unwrap();
        tree.put_link("/lib", "usr/lib").unwrap();
        tree
    }

    #[test]
    fn a_path_through_a_link_lands_where_the_link_leads() {
        let mut tree = merged_usr();
        tree.put_file("/lib/systemd/system/x.service", "x", 0o644)
            .unwrap();
        assert_eq!(tree.names("/usr/lib/systemd/system"), ["x.service"]);
        assert_eq!(
            tree.read("/lib/../lib/systemd/system/x.service").unwrap(),
            b"x"
        );
    }

    #[test]
    fn circles_and_files_in_the_place_of_directories_are_refused() {
        let mut tree = merged_usr();
        tree.put_link("/a", "b").unwrap();
        tree.put_link("/b", "a").unwrap();
        assert!(tree.real("/a/x").is_err());
        assert!(tree.put_file("/usr/lib", "x", 0o644).is_err());
    }

    #[test]
    fn patterns_name_components() {
        for (pattern, path, expected) in [
            ("/usr/share/doc/*", "/usr/share/doc/x", true),
            ("/usr/share/doc/*", "/usr/share/doc/x/y", false),
            ("/var/log/**", "/var/log/a/b/c", true),
            ("/var/log/**", "/var/log", false),
            ("/x/*.js.map", "/x/a.js.map", true),
            ("/x/*.map", "/x/a.map.js", false),
            ("/x/**/*.map", "/x/a/b/c.map", true),
            ("/x/a*b*c", "/x/a1b2b3c", true),
        ] {
            assert_eq!(matches(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn removal_takes_what_is_below() {
        let mut tree = merged_usr();
        tree.put_file("/usr/lib/a/b", "x", 0o644).unwrap();
        assert_eq!(tree.remove("/usr/lib/a"), 2);
        assert!(tree.names("/usr/lib").is_empty());
    }
}

//! Layers of a root: a tar archive (what the packages made), a directory (files of the recipe, tools).
use crate::tree::{Content, Kind, Node, Tree, TreeError};
use camino::{Utf8Path, Utf8PathBuf};
use std::{os::unix::fs::PermissionsExt as _, sync::Arc};

/// Reads the index of a tar archive into an empty tree; the bytes stay where they are. What is below `/dev` is left
/// out: the guest's kernel makes it.
pub(crate) fn from_tar(path: &Utf8Path) -> Result<Tree, TreeError> {
    let read = |err| TreeError::Read {
        path: path.to_owned(),
        err,
    };
    let file = Arc::new(path.to_owned());
    let mut archive = tar::Archive::new(std::fs::File::open(path).map_err(read)?);
    let mut tree = Tree::default();
    for entry in archive.entries_with_seek().map_err(read)? {
        let mut entry = entry.map_err(read)?;
        let name = absolute(&entry.path_bytes())?;
        if name.starts_with("/dev/") || name == "/" {
            continue;
        }
        let kind = kind(&entry, &name, &tree, &file)?;
        let xattrs = match entry.pax_extensions().map_err(read)? {
            None => false,
            Some(mut all) => {
                all.any(|one| one.is_ok_and(|one| one.key_bytes().starts_with(b"SCHILY.xattr.")))
            }
        };
        let header = entry.header();
        let id = |value: std::io::Result<u64>| {
            let odd = |_| TreeError::Entry {
                path: name.clone(),
                what: "has an owner out of range",
            };
            value
                .map_err(read)
                .and_then(|id| u32::try_from(id).map_err(odd))
        };
        let node = Node {
            mode: header.mode().map_err(read)? & 0o7777,
            uid: id(header.uid())?,
            gid: id(header.gid())?,
            mtime: header.mtime().map_err(read)?,
            kind,
            xattrs,
        };
        tree.put_raw(name, node);
    }
    Ok(tree)
}

/// What an entry is. A second name of a file (a hard link) shares the part of the archive where the bytes are.
fn kind<R: std::io::Read>(
    entry: &tar::Entry<'_, R>,
    name: &str,
    tree: &Tree,
    file: &Arc<Utf8PathBuf>,
) -> Result<Kind, TreeError> {
    let odd = |what| TreeError::Entry {
        path: name.to_owned(),
        what,
    };
    let target = || {
        let bytes = entry
            .link_name_bytes()
            .ok_or_else(|| odd("is a link to nothing"))?;
        String::from_utf8(bytes.into_owned()).map_err(|_| odd("leads to a name that is not UTF-8"))
    };
    let form = entry.header().entry_type();
    if form.is_dir() {
        Ok(Kind::Directory)
    } else if form.is_file() || form.is_contiguous() {
        let (offset, len) = (entry.raw_file_position(), entry.size());
        Ok(Kind::File(Content::Part {
            file: file.clone(),
            offset,
            len,
        }))
    } else if form.is_symlink() {
        Ok(Kind::Symlink(target()?))
    } else if form.is_hard_link() {
        let first = tree.file(&absolute(target()?.as_bytes())?);
        let content = first.ok_or_else(|| odd("is a second name of a file that is not there"))?;
        Ok(Kind::File(content.clone()))
    } else {
        Err(odd("is neither file, directory nor link"))
    }
}

/// `./usr/bin/` → `/usr/bin`.
fn absolute(name: &[u8]) -> Result<String, TreeError> {
    let text = std::str::from_utf8(name).map_err(|_| TreeError::Entry {
        path: String::from_utf8_lossy(name).into_owned(),
        what: "has a name that is not UTF-8",
    })?;
    let plain = text.strip_prefix("./").unwrap_or(text).trim_matches('/');
    Ok(format!("/{}", if plain == "." { "" } else { plain }))
}

/// Lays a directory of the host over the tree, at `into`. Owner and time are not taken from the host, and of the mode
/// only whether the file is executable: a checkout keeps no more.
pub(crate) fn add_directory(tree: &mut Tree, from: &Utf8Path, into: &str) -> Result<(), TreeError> {
    for (path, kind) in walk(from)? {
        let relative = path.strip_prefix(from).unwrap_or(&path);
        let name = format!("{}/{relative}", into.trim_end_matches('/'));
        match kind {
            Walked::Directory => tree.put(&name, Node::new(Kind::Directory, 0o755))?,
            Walked::Symlink(target) => tree.put_link(&name, &target)?,
            Walked::File { executable, len } => {
                let mode = if executable { 0o755 } else { 0o644 };
                let content = Content::Part {
                    file: Arc::new(path.clone()),
                    offset: 0,
                    len,
                };
                tree.put(&name, Node::new(Kind::File(content), mode))?;
            }
        }
    }
    Ok(())
}

/// What a walk finds.
pub(crate) enum Walked {
    Directory,
    File { executable: bool, len: u64 },
    Symlink(String),
}

/// Everything below `root`, parents first, sorted by name.
pub(crate) fn walk(root: &Utf8Path) -> Result<Vec<(Utf8PathBuf, Walked)>, TreeError> {
    let mut found = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        let read = |err| TreeError::Read {
            path: directory.clone(),
            err,
        };
        for entry in directory.read_dir_utf8().map_err(read)? {
            let entry = entry.map_err(read)?;
            let path = entry.path().to_owned();
            let metadata = entry.path().symlink_metadata().map_err(read)?;
            if metadata.is_dir() {
                open.push(path.clone());
                found.push((path, Walked::Directory));
            } else if metadata.is_symlink() {
                let target = path.read_link_utf8().map_err(read)?;
                found.push((path, Walked::Symlink(target.into_string())));
            } else if metadata.is_file() {
                let executable = metadata.permissions().mode() & 0o111 != 0;
                found.push((
                    path,
                    Walked::File {
                        executable,
                        len: metadata.len(),
                    },
                ));
            } else {
                return Err(TreeError::Entry {
                    path: path.into_string(),
                    what: "is neither file, directory nor link",
                });
            }
        }
    }
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(found)
}

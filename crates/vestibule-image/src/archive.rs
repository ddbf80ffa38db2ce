//! The finished tree as a tar stream, sorted by path, and the digest of every file on the way.
use crate::{
    digest,
    tree::{Content, Kind, Node, Tree, TreeError},
};
use camino::Utf8PathBuf;
use std::{
    collections::BTreeMap,
    io::{Read, Seek as _, SeekFrom, Write},
    sync::Arc,
};

/// What was written.
#[derive(Debug, Default)]
pub(crate) struct Written {
    /// Path → SHA-256 of every regular file.
    pub(crate) files: BTreeMap<String, String>,
}

/// How much room a tree needs, to size its file system.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Extent {
    pub(crate) entries: u64,
    /// Bytes of all files, each rounded up to blocks of 4 KiB.
    pub(crate) bytes: u64,
}

/// Measures `tree`.
pub(crate) fn extent(tree: &Tree) -> Extent {
    tree.iter().fold(Extent::default(), |sum, (_, node)| {
        let bytes = match &node.kind {
            Kind::File(content) => content.len().next_multiple_of(4096),
            Kind::Directory => 4096,
            Kind::Symlink(_) => 0,
        };
        Extent {
            entries: sum.entries + 1,
            bytes: sum.bytes + bytes,
        }
    })
}

/// Writes `tree` to `out`. No time in it is later than [`crate::EPOCH`], so that the day of a build does not show;
/// `advance` is told the bytes of files written so far.
pub(crate) fn write<W: Write>(
    tree: &Tree,
    out: W,
    mut advance: impl FnMut(u64),
) -> Result<Written, TreeError> {
    let mut builder = tar::Builder::new(out);
    let mut written = Written::default();
    let mut names: BTreeMap<(Arc<Utf8PathBuf>, u64), String> = BTreeMap::new();
    let mut source = Source::default();
    let mut bytes = 0;
    for (path, node) in tree.iter() {
        if node.xattrs {
            return Err(TreeError::Entry {
                path: path.to_owned(),
                what: "has extended attributes; images carry none",
            });
        }
        let relative = path.trim_start_matches('/');
        let mut header = header(node);
        match &node.kind {
            Kind::Directory => {
                builder.append_data(&mut header, format!("{relative}/"), std::io::empty())
            }
            Kind::Symlink(target) => builder.append_link(&mut header, relative, target),
            Kind::File(content) => {
                if let Some(first) = second_name(&mut names, content, relative) {
                    let known = written
                        .files
                        .get(&format!("/{first}"))
                        .cloned()
                        .unwrap_or_default();
                    written.files.insert(path.to_owned(), known);
                    header.set_entry_type(tar::EntryType::Link);
                    header.set_size(0);
                    builder.append_link(&mut header, relative, first)
                } else {
                    let mut reader = digest::Reader::new(source.open(content)?);
                    let done = builder.append_data(&mut header, relative, &mut reader);
                    written.files.insert(path.to_owned(), reader.finish());
                    bytes += content.len();
                    advance(bytes);
                    done
                }
            }
        }
        .map_err(TreeError::Write)?;
    }
    builder
        .into_inner()
        .and_then(|mut out| out.flush())
        .map_err(TreeError::Write)?;
    Ok(written)
}

/// The path under which the same file was written before, else remembers this one.
fn second_name(
    names: &mut BTreeMap<(Arc<Utf8PathBuf>, u64), String>,
    content: &Content,
    path: &str,
) -> Option<String> {
    let Content::Part {
        file,
        offset,
        len: 1..,
    } = content
    else {
        return None;
    };
    let key = (file.clone(), *offset);
    let first = names.get(&key).cloned();
    if first.is_none() {
        names.insert(key, path.to_owned());
    }
    first
}

fn header(node: &Node) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(node.mode);
    header.set_uid(node.uid.into());
    header.set_gid(node.gid.into());
    header.set_mtime(node.mtime.min(crate::EPOCH));
    match &node.kind {
        Kind::Directory => {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_size(0);
        }
        Kind::Symlink(_) => {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
        }
        Kind::File(content) => {
            header.set_entry_type(tar::EntryType::Regular);
            header.set_size(content.len());
        }
    }
    header
}

/// Keeps the last file open: most bytes of a root are parts of one archive.
#[derive(Default)]
struct Source {
    last: Option<(Arc<Utf8PathBuf>, std::fs::File)>,
}

impl Source {
    fn open<'a>(&'a mut self, content: &'a Content) -> Result<Box<dyn Read + 'a>, TreeError> {
        let (path, offset, len) = match content {
            Content::Bytes(bytes) => return Ok(Box::new(bytes.as_ref())),
            Content::Part { file, offset, len } => (file, *offset, *len),
        };
        let read = |err| TreeError::Read {
            path: path.to_path_buf(),
            err,
        };
        if self.last.as_ref().is_none_or(|(last, _)| last != path) {
            self.last = Some((
                path.clone(),
                std::fs::File::open(path.as_ref()).map_err(read)?,
            ));
        }
        let Some((_, file)) = &mut self.last else {
            return Err(read(std::io::ErrorKind::NotFound.into()));
        };
        file.seek(SeekFrom::Start(offset)).map_err(read)?;
        Ok(Box::new(file.take(len)))
    }
}

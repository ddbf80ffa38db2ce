//! Whether a program can be executed in the guest: path, permission, architecture, interpreter, shared libraries.
//! The order of the questions is the kernel's (`execve(2)`), then the dynamic linker's (`ld.so(8)`).
use super::{fstab::Fstab, quote_disk, users::Accounts};
use crate::{
    disk::{
        Kind, Meta, Resolved, Root,
        xattr::{ACCESS_LIST, Acl},
    },
    elf,
    text::shorten,
};
use std::{
    cell::RefCell,
    collections::{HashMap, HashSet, VecDeque},
};
use vestibule_api::finding::Quote;

/// `PATH` of systemd for programs without a slash (`systemd.exec(5)`, `ExecSearchPath=`).
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Interpreters of interpreters, as in the kernel.
const DEPTH_LIMIT: u32 = 4;
/// Libraries in one closure; Chromium has about 150.
const LIBRARY_LIMIT: usize = 1_024;

/// Why a program does not run.
#[derive(Clone, Debug)]
pub enum Problem {
    Missing(Quote),
    NotExecutable(Quote, String),
    WrongArchitecture(Quote, String),
    Format(Quote, String),
    Interpreter(Quote, String),
    Library(Quote, String),
}

/// Who executes, with what.
#[derive(Clone, Debug, Default)]
pub struct As<'a> {
    pub user: Option<&'a str>,
    pub group: Option<&'a str>,
    /// `PATH` of the unit, where it sets one.
    pub path: Option<String>,
    /// `LD_LIBRARY_PATH`.
    pub library_path: Option<String>,
}

/// Resolves programs on one disk.
#[derive(Debug)]
pub struct Resolver<'a> {
    pub root: &'a Root,
    pub accounts: &'a Accounts,
    pub fstab: &'a Fstab,
    /// `e_machine` of the guest, from its init.
    pub machine: Option<u16>,
    library_dirs: Vec<String>,
    libraries: RefCell<HashMap<String, Option<String>>>,
}

impl<'a> Resolver<'a> {
    /// A resolver for the guest on `root`.
    pub fn new(root: &'a Root, accounts: &'a Accounts, fstab: &'a Fstab) -> Self {
        let machine = [
            "/sbin/init",
            "/usr/lib/systemd/systemd",
            "/bin/sh",
            "/bin/busybox",
        ]
        .iter()
        .find_map(|p| elf::read(root, p).ok())
        .map(|e| e.machine);
        Self {
            root,
            accounts,
            fstab,
            machine,
            library_dirs: library_dirs(root),
            libraries: RefCell::default(),
        }
    }

    /// The first problem that executing `program` meets; none: it runs as far as a disk can tell.
    pub fn check(&self, program: &str, who: &As<'_>) -> Option<Problem> {
        let path = match self.locate(program, who) {
            Ok(path) => path,
            Err(problem) => return Some(problem),
        };
        self.check_path(&path, who, 0)
    }

    /// Where a program without a slash is found.
    pub fn locate(&self, program: &str, who: &As<'_>) -> Result<String, Problem> {
        if program.starts_with('/') {
            return Ok(program.to_owned());
        }
        let dirs = who.path.as_deref().unwrap_or(PATH);
        let found = dirs
            .split(':')
            .map(|d| format!("{d}/{program}"))
            .find(|p| self.root.stat(p).is_some_and(is_program));
        found.ok_or_else(|| {
            Problem::Missing(quote_disk(
                dirs,
                None,
                &format!("[no {program} in any of these]"),
            ))
        })
    }

    fn check_path(&self, path: &str, who: &As<'_>, depth: u32) -> Option<Problem> {
        let (real, meta) = match self.root.resolve(path) {
            Resolved::Found(real, meta) => (real, meta),
            Resolved::Missing(at) | Resolved::Broken(at) => {
                let text = if at == path {
                    "[does not exist]".to_owned()
                } else {
                    format!("[needs {at}, which does not exist]")
                };
                return Some(Problem::Missing(quote_disk(path, None, &text)));
            }
        };
        if let Some(why) = self.forbidden(&real, meta, who) {
            let text = format!("[{}]", self.rights(&real, meta));
            return Some(Problem::NotExecutable(quote_disk(path, None, &text), why));
        }
        let head = self.root.read_at(&real, 0, 256).unwrap_or_default();
        if head.starts_with(b"#!") {
            return self.check_script(path, &head, who, depth);
        }
        match elf::read(self.root, &real) {
            Ok(elf) => self.check_elf(path, &real, &elf, who),
            Err(elf::Bad::NotElf) => {
                let why = if head.is_empty() {
                    "it is empty"
                } else {
                    "it is neither an ELF file nor a script with a #! line"
                };
                let first = head.split(|b| *b == b'\n').next().unwrap_or_default();
                let text = shorten(&String::from_utf8_lossy(first), 120);
                Some(Problem::Format(
                    quote_disk(path, Some(1), &text),
                    why.to_owned(),
                ))
            }
            Err(elf::Bad::Truncated(machine)) => {
                if let Some(problem) = machine.and_then(|m| self.wrong_machine(path, m)) {
                    return Some(problem);
                }
                let text = format!("[{} bytes]", meta.size);
                Some(Problem::Format(
                    quote_disk(path, None, &text),
                    "its ELF headers are cut short".to_owned(),
                ))
            }
        }
    }

    fn forbidden(&self, real: &str, meta: Meta, who: &As<'_>) -> Option<String> {
        if meta.kind != Kind::File {
            return Some("it is not a regular file".into());
        }
        if let Some(mount) = self.fstab.covering(real)
            && (mount.has("noexec") || (mount.has("user") && !mount.has("exec")))
        {
            return Some(format!("{} is mounted noexec by /etc/fstab", mount.target));
        }
        let (uid, gids) = self.accounts.ids(who.user, who.group)?;
        if !self.allowed(real, meta, uid, &gids) {
            return Some(if allowed(meta, uid, &gids) {
                format!("its access list keeps uid {uid} from executing it")
            } else {
                "no execute permission".into()
            });
        }
        let mut at = real;
        while let Some((parent, _)) = at.rsplit_once('/').filter(|(p, _)| !p.is_empty()) {
            if let Some(dir) = self.root.lstat_real(parent)
                && uid != 0
                && !self.allowed(parent, dir, uid, &gids)
            {
                let rights = self.rights(parent, dir);
                return Some(format!("its user may not enter {parent} ({rights})"));
            }
            at = parent;
        }
        None
    }

    /// Whether `uid` may execute or enter what is at the real path `path`.
    fn allowed(&self, path: &str, meta: Meta, uid: u32, gids: &[u32]) -> bool {
        let by_mode = allowed(meta, uid, gids);
        let by_list = self
            .access_list(path, meta)
            .filter(|_| uid != 0)
            .and_then(|list| list.executes(uid, gids, meta.uid, meta.gid));
        by_list.unwrap_or(by_mode)
    }

    /// The access list of a file; as in the kernel it is not asked where the mode gives its group nothing.
    fn access_list(&self, path: &str, meta: Meta) -> Option<Acl> {
        let value = self.root.xattr(path, ACCESS_LIST);
        value
            .filter(|_| meta.mode & 0o070 != 0)
            .and_then(|value| Acl::parse(&value))
    }

    /// Mode, owner and access list in words.
    fn rights(&self, path: &str, meta: Meta) -> String {
        let mode = format!("mode {:04o}, owner {}:{}", meta.mode, meta.uid, meta.gid);
        match self.access_list(path, meta) {
            Some(list) => format!("{mode}, access list {}", list.text()),
            None => mode,
        }
    }

    fn check_script(&self, path: &str, head: &[u8], who: &As<'_>, depth: u32) -> Option<Problem> {
        let line = head.split(|b| *b == b'\n').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line.get(2..).unwrap_or_default()).into_owned();
        let quote = quote_disk(path, Some(1), &format!("#!{}", line.escape_debug()));
        let trimmed = line.trim_matches([' ', '\t']);
        let (interpreter, arg) = trimmed.split_once([' ', '\t']).unwrap_or((trimmed, ""));
        if interpreter.is_empty() {
            return Some(Problem::Format(
                quote,
                "its #! line names no interpreter".into(),
            ));
        }
        if interpreter.ends_with('\r') {
            let why = "the line ends with CR LF, so the kernel looks for an interpreter whose name ends with a carriage return";
            return Some(Problem::Interpreter(quote, why.into()));
        }
        if depth >= DEPTH_LIMIT {
            return None;
        }
        if !interpreter.starts_with('/') {
            return None;
        }
        match self.check_path(interpreter, who, depth.saturating_add(1)) {
            Some(Problem::Missing(_)) => {
                return Some(Problem::Interpreter(
                    quote,
                    format!("the interpreter {interpreter} does not exist"),
                ));
            }
            Some(other) => return Some(other),
            None => {}
        }
        let runs_env = interpreter.rsplit('/').next() == Some("env");
        let named = arg
            .split_whitespace()
            .find(|w| !w.starts_with('-') && !w.contains('='));
        let named = named.filter(|n| runs_env && !n.starts_with('/'))?;
        if arg.ends_with('\r') {
            return Some(Problem::Interpreter(quote, "the line ends with CR LF, so env looks for a program whose name ends with a carriage return".into()));
        }
        match self.locate(named, who) {
            Ok(_) => None,
            Err(_) => Some(Problem::Interpreter(
                quote,
                format!("env finds no `{named}` in the unit's PATH"),
            )),
        }
    }

    fn check_elf(&self, path: &str, real: &str, found: &elf::Elf, who: &As<'_>) -> Option<Problem> {
        if let Some(problem) = self.wrong_machine(path, found.machine) {
            return Some(problem);
        }
        let interpreter = found.interpreter.as_deref()?;
        if !self.root.exists(interpreter) {
            let quote = quote_disk(path, None, &format!("[ELF interpreter {interpreter}]"));
            return Some(Problem::Interpreter(
                quote,
                format!("{interpreter} does not exist"),
            ));
        }
        self.check_libraries(path, real, found, who)
    }

    fn wrong_machine(&self, path: &str, found: u16) -> Option<Problem> {
        let machine = self.machine?;
        let runs =
            found == machine || (machine == elf::X86_64 && found == elf::I386) || self.has_binfmt();
        let (is, want) = (elf::machine_name(found), elf::machine_name(machine));
        let quote = quote_disk(path, None, &format!("[ELF file for {is}]"));
        (!runs).then(|| Problem::WrongArchitecture(quote, format!("the guest is {want}")))
    }

    fn has_binfmt(&self) -> bool {
        ["/etc/binfmt.d", "/usr/lib/binfmt.d"]
            .iter()
            .any(|d| self.root.list(d).iter().any(|e| e.name.contains("qemu")))
    }

    fn check_libraries(
        &self,
        path: &str,
        real: &str,
        found: &elf::Elf,
        who: &As<'_>,
    ) -> Option<Problem> {
        let mut seen: HashSet<String> = HashSet::new();
        let mut queue: VecDeque<(String, String)> = found
            .needed
            .iter()
            .map(|n| (n.clone(), path.to_owned()))
            .collect();
        let origin = |of: &str, dirs: &[String]| -> Vec<String> {
            let dir = of.rsplit_once('/').map_or("", |(d, _)| d);
            dirs.iter()
                .map(|d| d.replace("${ORIGIN}", dir).replace("$ORIGIN", dir))
                .collect()
        };
        let own = origin(real, &found.run_path);
        while let Some((library, by)) = queue.pop_front() {
            if seen.len() > LIBRARY_LIMIT || !seen.insert(library.clone()) {
                continue;
            }
            let mut extra = own.clone();
            extra.extend(
                who.library_path
                    .iter()
                    .flat_map(|p| p.split(':').map(str::to_owned)),
            );
            if by != path
                && let Ok(of) = elf::read(self.root, &by)
            {
                extra.extend(origin(&by, &of.run_path));
            }
            let Some(at) = self.library(&library, &extra) else {
                let quote = quote_disk(&by, None, &format!("[needs {library}]"));
                return Some(Problem::Library(
                    quote,
                    format!("{library} is in none of the linker's directories"),
                ));
            };
            if let Ok(next) = elf::read(self.root, &at) {
                queue.extend(next.needed.into_iter().map(|n| (n, at.clone())));
            }
        }
        None
    }

    fn library(&self, name: &str, extra: &[String]) -> Option<String> {
        if name.contains('/') {
            return self.root.exists(name).then(|| name.to_owned());
        }
        for dir in extra.iter().filter(|d| !d.is_empty()) {
            let path = format!("{dir}/{name}");
            if self.fits(&path) {
                return Some(path);
            }
        }
        if let Some(known) = self.libraries.borrow().get(name) {
            return known.clone();
        }
        let found = self
            .library_dirs
            .iter()
            .map(|d| format!("{d}/{name}"))
            .find(|p| self.fits(p));
        self.libraries
            .borrow_mut()
            .insert(name.to_owned(), found.clone());
        found
    }

    fn fits(&self, path: &str) -> bool {
        let Some(meta) = self.root.stat(path) else {
            return false;
        };
        if meta.kind != Kind::File {
            return false;
        }
        match elf::read(self.root, path) {
            Ok(found) => self
                .machine
                .is_none_or(|m| m == found.machine || found.machine == elf::I386),
            Err(_) => false,
        }
    }
}

fn is_program(meta: Meta) -> bool {
    meta.kind == Kind::File && meta.mode & 0o111 != 0
}

fn allowed(meta: Meta, uid: u32, gids: &[u32]) -> bool {
    if uid == 0 {
        return meta.mode & 0o111 != 0;
    }
    let bit = if meta.uid == uid {
        0o100
    } else if gids.contains(&meta.gid) {
        0o010
    } else {
        0o001
    };
    meta.mode & bit != 0
}

/// The directories of `ld.so.conf` and the built-in ones (Debian's multiarch, `/lib64`, musl's).
fn library_dirs(root: &Root) -> Vec<String> {
    let mut dirs = Vec::new();
    let mut files = vec!["/etc/ld.so.conf".to_owned()];
    for entry in root
        .list("/etc/ld.so.conf.d")
        .iter()
        .filter(|e| e.name.ends_with(".conf"))
    {
        files.push(format!("/etc/ld.so.conf.d/{}", entry.name));
    }
    for file in files {
        for line in root.read_text(&file).unwrap_or_default().lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.starts_with('/') {
                dirs.push(line.to_owned());
            }
        }
    }
    for triplet in ["x86_64-linux-gnu", "aarch64-linux-gnu", "i386-linux-gnu"] {
        dirs.push(format!("/lib/{triplet}"));
        dirs.push(format!("/usr/lib/{triplet}"));
    }
    dirs.extend(["/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib"].map(str::to_owned));
    dirs.retain(|d| root.is_dir(d));
    dirs
}

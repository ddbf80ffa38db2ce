//! Whether a program can be executed in the guest: path, permission, architecture, interpreter, shared libraries.
//! The order of the questions is the kernel's (`execve(2)`), then the dynamic linker's (`ld.so(8)`).
use super::{fstab::Fstab, libraries::LibraryDirs, quote_disk, users::Accounts};
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
    rc::Rc,
};
use vestibule_api::finding::Quote;

/// `PATH` of systemd for programs without a slash (`systemd.exec(5)`, `ExecSearchPath=`).
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Interpreters of interpreters, as in the kernel.
const DEPTH_LIMIT: u32 = 4;
/// Libraries in one closure; Chromium has about 150.
const LIBRARY_LIMIT: usize = 1_024;
/// Programs and libraries of which is kept what was read; then they are forgotten.
const ELVES_LIMIT: usize = 2_048;

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
    /// It may do more than these two say: `SupplementaryGroups=`, `AmbientCapabilities=`.
    pub more: bool,
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
    /// Of `fstab` and of mount units.
    pub mounts: Fstab,
    /// `e_machine` of the guest, from its init.
    pub machine: Option<u16>,
    library_dirs: LibraryDirs,
    libraries: RefCell<HashMap<String, Option<String>>>,
    /// What was read of programs and libraries, by path: most programs need the same ones.
    elves: RefCell<HashMap<String, Rc<Result<elf::Elf, elf::Bad>>>>,
}

impl<'a> Resolver<'a> {
    /// A resolver for the guest on `root`.
    pub fn new(root: &'a Root, accounts: &'a Accounts, mounts: Fstab) -> Self {
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
            mounts,
            machine,
            library_dirs: LibraryDirs::read(root),
            libraries: RefCell::default(),
            elves: RefCell::default(),
        }
    }

    fn elf(&self, path: &str) -> Rc<Result<elf::Elf, elf::Bad>> {
        if let Some(known) = self.elves.borrow().get(path) {
            return Rc::clone(known);
        }
        let read = Rc::new(elf::read(self.root, path));
        let mut elves = self.elves.borrow_mut();
        if elves.len() >= ELVES_LIMIT {
            elves.clear();
        }
        elves.insert(path.to_owned(), Rc::clone(&read));
        read
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
        match self.elf(&real).as_ref() {
            Ok(elf) => self.check_elf(path, &real, elf, who),
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
        if let Some(mount) = self.mounts.covering(real)
            && (mount.has("noexec") || (mount.has("user") && !mount.has("exec")))
        {
            let by = mount.quote.source.trim_start_matches("disk:");
            return Some(format!("{} is mounted noexec by {by}", mount.target));
        }
        let (uid, gids) = self.ids(who)?;
        if !self.allowed(real, meta, uid, &gids) {
            return Some(if permits(meta, uid, &gids, 0o111) {
                format!("its access list keeps uid {uid} from executing it")
            } else {
                "no execute permission".into()
            });
        }
        self.closed_above(real, uid, &gids)
    }

    /// The ids that decide what `who` may do, where they decide it.
    fn ids(&self, who: &As<'_>) -> Option<(u32, Vec<u32>)> {
        let ids = self.accounts.ids(who.user, who.group);
        ids.filter(|(uid, _)| *uid == 0 || !who.more)
    }

    /// A directory above the real path `path` that `uid` may not enter.
    fn closed_above(&self, path: &str, uid: u32, gids: &[u32]) -> Option<String> {
        let mut at = path;
        while let Some((parent, _)) = at.rsplit_once('/').filter(|(p, _)| !p.is_empty()) {
            if let Some(dir) = self.root.lstat_real(parent)
                && uid != 0
                && !self.allowed(parent, dir, uid, gids)
            {
                let rights = self.rights(parent, dir);
                return Some(format!("its user may not enter {parent} ({rights})"));
            }
            at = parent;
        }
        None
    }

    /// Why `who` may not change to the directory at the real path `path`.
    pub fn why_not_entered(&self, path: &str, who: &As<'_>) -> Option<String> {
        let (uid, gids) = self.ids(who).filter(|(uid, _)| *uid != 0)?;
        // As if for something in it.
        self.closed_above(&format!("{path}/."), uid, &gids)
    }

    /// Why `who` may not read the file at the real path `path`. Where an access list decides, nothing is said.
    pub fn why_not_read(&self, path: &str, who: &As<'_>) -> Option<String> {
        let (uid, gids) = self.ids(who).filter(|(uid, _)| *uid != 0)?;
        let meta = self.root.lstat_real(path)?;
        if self.access_list(path, meta).is_none() && !permits(meta, uid, &gids, 0o444) {
            return Some(format!(
                "its user may not read it ({})",
                self.rights(path, meta)
            ));
        }
        self.closed_above(path, uid, &gids)
    }

    /// Whether `uid` may execute or enter what is at the real path `path`.
    fn allowed(&self, path: &str, meta: Meta, uid: u32, gids: &[u32]) -> bool {
        let by_mode = permits(meta, uid, gids, 0o111);
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
        // The kernel hands the rest of the line over as one argument, which only `-S` splits.
        let named = if arg.starts_with('-') {
            let mut words = arg.split_whitespace();
            words.find(|w| !w.starts_with('-') && !w.contains('='))
        } else {
            Some(arg).filter(|a| !a.is_empty() && !a.contains('='))
        };
        let named = named.filter(|n| runs_env && !n.starts_with('/'))?;
        if arg.ends_with('\r') {
            return Some(Problem::Interpreter(quote, "the line ends with CR LF, so env looks for a program whose name ends with a carriage return".into()));
        }
        match self.locate(named, who) {
            Ok(_) => None,
            Err(_) if named.contains([' ', '\t']) => Some(Problem::Interpreter(
                quote,
                format!(
                    "env is given `{named}` as one name and finds no such program; env -S splits it"
                ),
            )),
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
                && let Ok(of) = self.elf(&by).as_ref()
            {
                extra.extend(origin(&by, &of.run_path));
            }
            let Some(at) = self.library(&library, &extra) else {
                let quote = quote_disk(&by, None, &format!("[needs {library}]"));
                let why = match self.library_dirs.unknown_to_cache(self.root, &library) {
                    Some(at) => format!(
                        "{at} lies in a directory of ld.so.conf, and the linker reads only ld.so.cache, which does not have it (ldconfig)"
                    ),
                    None => format!("{library} is in none of the linker's directories"),
                };
                return Some(Problem::Library(quote, why));
            };
            if let Resolved::Found(real_library, _) = self.root.resolve(&at)
                && let Some(why) = self.why_not_read(&real_library, who)
            {
                let quote = quote_disk(&by, None, &format!("[needs {library}]"));
                return Some(Problem::Library(quote, format!("{at} is there, and {why}")));
            }
            if let Ok(next) = self.elf(&at).as_ref() {
                queue.extend(next.needed.iter().map(|n| (n.clone(), at.clone())));
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
        let found = self.library_dirs.candidates(name).find(|p| self.fits(p));
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
        match self.elf(path).as_ref() {
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

/// Whether the mode gives `uid` what all of `bits` stand for, as `0o111` for execution; to root whatever it gives anybody.
fn permits(meta: Meta, uid: u32, gids: &[u32], bits: u32) -> bool {
    let class = if uid == 0 {
        0o777
    } else if meta.uid == uid {
        0o700
    } else if gids.contains(&meta.gid) {
        0o070
    } else {
        0o007
    };
    meta.mode & class & bits != 0
}

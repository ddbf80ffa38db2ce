//! What a build refuses before it writes an image: programs that are missing or are stubs, units that start nothing.
//!
//! A distribution's "chromium" that only tells another packaging system to install one, or a tool whose native binary
//! was never fetched, would build, boot, and fail in front of a person.
use crate::{
    elf::{self, Format},
    recipe::{Program, Recipe},
    tree::Tree,
    units::{self, UnitError},
};

/// Where a program is looked up that a script names without a path.
const PATH: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/bin"];
/// An interpreter may be a script itself, so many times (Linux: `BINPRM_MAX_RECURSION`).
const DEPTH: usize = 4;
/// What only a stand-in for a package of another system says.
const FOREIGN: [&str; 4] = [
    "/snap/bin/",
    "snap install",
    "flatpak run",
    "flatpak install",
];

/// Why an image is refused.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error("program `{path}` {what}")]
    Program { path: String, what: String },
    #[error("tool of provider `{provider}`: `{path}` {what}")]
    Tool {
        provider: String,
        path: String,
        what: String,
    },
    #[error(transparent)]
    Unit(#[from] UnitError),
}

/// Checks every program that recipe and units name. `later` is the path of the agent, which is not in the tree yet.
pub(crate) fn run(tree: &Tree, recipe: &Recipe, later: &str) -> Result<(), CheckError> {
    for (path, expected) in &recipe.programs {
        check(tree, path, *expected).map_err(|what| CheckError::Program {
            path: path.clone(),
            what,
        })?;
    }
    for tool in &recipe.tools {
        check(tree, &tool.path, tool.program).map_err(|what| CheckError::Tool {
            provider: tool.provider.clone(),
            path: tool.path.clone(),
            what,
        })?;
    }
    for unit in &recipe.units.enable {
        for program in units::programs(tree, unit)?
            .into_iter()
            .filter(|program| program != later)
        {
            executable(tree, &program, DEPTH).map_err(|what| UnitError::Program {
                unit: unit.clone(),
                program: program.clone(),
                what,
            })?;
        }
    }
    Ok(())
}

fn check(tree: &Tree, path: &str, expected: Program) -> Result<(), String> {
    let found = executable(tree, path, DEPTH)?;
    match (expected, found) {
        (Program::Elf, Format::Elf { .. }) | (Program::Script, Format::Script(_)) => Ok(()),
        (Program::Elf, _) => {
            Err("is a script where the recipe says an ELF executable: a stub?".to_owned())
        }
        (Program::Script, _) => Err("is not the script that the recipe says".to_owned()),
    }
}

/// Whether the program at `path` can be executed: it is there, may be, and its interpreters lead to an ELF executable.
fn executable(tree: &Tree, path: &str, depth: usize) -> Result<Format, String> {
    let real = tree.real(path).map_err(|err| err.to_string())?;
    let content = tree.file(path).ok_or_else(|| {
        if real == path {
            "is missing".into()
        } else {
            format!("leads to `{real}`, which is missing")
        }
    })?;
    if tree.node(&real).is_none_or(|node| node.mode & 0o111 == 0) {
        return Err("is not executable".to_owned());
    }
    let head = content.head(elf::HEAD).map_err(|err| err.to_string())?;
    let format = elf::format(&head);
    match &format {
        Format::Elf {
            interpreter: Some(interpreter),
        } if tree.file(interpreter).is_none() => {
            return Err(format!(
                "needs the program interpreter `{interpreter}`, which is missing"
            ));
        }
        Format::Elf { .. } => {}
        Format::ElfOther { machine } => {
            return Err(format!(
                "is an ELF file for machine {machine}, not for x86-64 (62)"
            ));
        }
        Format::Other => {
            return Err("is neither an ELF executable nor a script with an interpreter".to_owned());
        }
        Format::Script(words) => {
            let text = String::from_utf8_lossy(&head);
            if let Some(foreign) = FOREIGN.iter().find(|foreign| text.contains(**foreign)) {
                return Err(format!(
                    "is a stand-in for another packaging system (`{foreign}`)"
                ));
            }
            let interpreter = interpreter(tree, words)?;
            if depth == 0 {
                return Err("leads through too many interpreters".to_owned());
            }
            executable(tree, &interpreter, depth - 1)
                .map_err(|what| format!("needs `{interpreter}`, which {what}"))?;
        }
    }
    Ok(format)
}

/// The program that a `#!` line starts; `env` looks its argument up.
fn interpreter(tree: &Tree, words: &[String]) -> Result<String, String> {
    let (first, rest) = words.split_first().ok_or("names no interpreter")?;
    if !first.ends_with("/env") {
        return Ok(first.clone());
    }
    let name = rest
        .iter()
        .find(|word| !word.starts_with('-'))
        .ok_or("names no interpreter after `env`")?;
    PATH.iter()
        .map(|directory| format!("{directory}/{name}"))
        .find(|path| tree.file(path).is_some())
        .ok_or_else(|| format!("needs `{name}`, which is not in {}", PATH.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        let mut tree = Tree::default();
        let own = std::fs::read("/proc/self/exe").unwrap();
        tree.put_file("/usr/bin/node", own, 0o755).unwrap();
        tree.put_file("/usr/bin/plain", "text", 0o755).unwrap();
        tree.put_file("/usr/bin/tool", "#!/usr/bin/env node\n", 0o755)
            .unwrap();
        tree.put_file(
            "/usr/bin/stub",
            "#!/usr/bin/node\nexec /snap/bin/chromium\n",
            0o755,
        )
        .unwrap();
        tree.put_file("/usr/bin/closed", "#!/usr/bin/node\n", 0o644)
            .unwrap();
        tree.put_link("/usr/bin/away", "/opt/none").unwrap();
        tree
    }

    #[test]
    fn a_program_is_followed_to_its_last_interpreter() {
        let mut tree = tree();
        let why = check(&tree, "/usr/bin/tool", Program::Script).unwrap_err();
        assert!(
            why.contains("ld-linux"),
            "the dynamic loader is missing: {why}"
        );
        tree.put_file("/lib64/ld-linux-x86-64.so.2", "", 0o755)
            .unwrap();
        check(&tree, "/usr/bin/tool", Program::Script).unwrap();
        check(&tree, "/usr/bin/node", Program::Elf).unwrap();
        assert!(
            check(&tree, "/usr/bin/tool", Program::Elf)
                .unwrap_err()
                .contains("stub")
        );
    }

    #[test]
    fn each_kind_of_stub_is_named() {
        let tree = tree();
        for (path, expected) in [
            ("/usr/bin/stub", "another packaging system"),
            ("/usr/bin/plain", "neither"),
            ("/usr/bin/closed", "not executable"),
            ("/usr/bin/away", "/opt/none"),
            ("/usr/bin/none", "is missing"),
        ] {
            let why = check(&tree, path, Program::Elf).unwrap_err();
            assert!(why.contains(expected), "{path}: {why}");
        }
    }
}

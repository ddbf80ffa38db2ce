//! A few programs whose end is known before they run: `true`, `false`, `sleep`, `test`, `exit`, and scripts that only
//! call those. And which argument of an interpreter is its script. Anything else is not guessed at.
use super::command::Command;
use crate::text;

/// How a program ends, where that is known.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// With success, after so many seconds.
    Success(f64),
    /// With failure, at once.
    Failure,
    /// Never.
    Never,
    /// `test` of a path: the operator and the path decide.
    Test(char, String),
}

/// Spans longer than this are as good as never, for a boot.
const LONG: f64 = 600.0;

/// How `command` ends.
pub fn ending(command: &Command) -> Option<Ending> {
    known(&command.program, &command.args)
}

fn known(program: &str, args: &[String]) -> Option<Ending> {
    let name = program.rsplit('/').next()?;
    match name {
        "true" | ":" => Some(Ending::Success(0.0)),
        "false" => Some(Ending::Failure),
        "sleep" => {
            let total: Option<f64> = args.iter().map(|a| text::seconds(a)).sum();
            total.filter(|_| !args.is_empty()).map(|s| {
                if s >= LONG {
                    Ending::Never
                } else {
                    Ending::Success(s)
                }
            })
        }
        "tail"
            if args.iter().any(|a| a == "-f") && args.last().is_some_and(|a| a == "/dev/null") =>
        {
            Some(Ending::Never)
        }
        "test" | "[" => match args {
            [op, path, ..] if op.len() == 2 && op.starts_with('-') && path.starts_with('/') => {
                Some(Ending::Test(op.chars().nth(1)?, path.clone()))
            }
            _ => None,
        },
        "exit" => match args.first().map_or("0", String::as_str) {
            "0" => Some(Ending::Success(0.0)),
            code => code.parse::<u8>().ok().map(|_| Ending::Failure),
        },
        "sh" | "bash" | "dash" => match args {
            [flag, script, ..] if flag == "-c" => script_ending(script),
            _ => None,
        },
        _ => None,
    }
}

/// How a shell script ends whose every line is a known program; the first that never ends or exits decides.
pub fn script_ending(script: &str) -> Option<Ending> {
    let mut total = 0.0;
    let mut last = Some(Ending::Success(0.0));
    for line in script.split(['\n', ';']) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') || line.starts_with("set -") {
            continue;
        }
        if matches!(line, "while :" | "while true" | "for (") {
            return Some(Ending::Never);
        }
        let words = text::words(line)?;
        let words = words.strip_prefix(&["exec".to_owned()]).unwrap_or(&words);
        if words.iter().any(|w| {
            matches!(w.as_str(), "&" | "|" | "||" | "&&") || w.contains(['$', '`', '>', '<'])
        }) {
            return None;
        }
        let (program, args) = words.split_first()?;
        if matches!(
            program.as_str(),
            "echo" | "printf" | "mkdir" | "ln" | "touch" | "rm" | "chmod" | "cp" | "mv"
        ) {
            last = Some(Ending::Success(0.0));
            continue;
        }
        let end = known(program, args)?;
        match &end {
            Ending::Never => return Some(Ending::Never),
            Ending::Success(s) => total += s,
            Ending::Failure | Ending::Test(..) => {}
        }
        let stops = program == "exit" || line.starts_with("exec ");
        last = Some(end);
        if stops {
            break;
        }
    }
    match last {
        Some(Ending::Success(_)) => Some(if total >= LONG {
            Ending::Never
        } else {
            Ending::Success(total)
        }),
        other => other,
    }
}

/// A loop of a shell script that only sleeps until a path is there: its line, and the path.
pub fn waiting_loop(script: &str) -> Option<(u64, String)> {
    let lines = (1_u64..).zip(script.lines());
    let mut statements = lines.flat_map(|(number, line)| {
        let line = if line.trim_start().starts_with('#') {
            ""
        } else {
            line
        };
        line.split(';').map(move |part| (number, part.trim()))
    });
    while let Some((number, statement)) = statements.next() {
        let Some(path) = awaited(statement) else {
            continue;
        };
        let mut body = statements.by_ref().map(|(_, part)| part);
        let idle = body.by_ref().find(|part| {
            let part = part.strip_prefix("do").unwrap_or(part).trim();
            !(part.is_empty() || part == ":" || part.starts_with("sleep "))
        });
        if idle == Some("done") {
            return Some((number, path));
        }
    }
    None
}

/// The path of `until [ -e PATH ]` and `while ! [ -e PATH ]`.
fn awaited(statement: &str) -> Option<String> {
    let words = text::words(statement)?;
    let (keyword, condition) = words.split_first()?;
    let mut present = match keyword.as_str() {
        "until" => true,
        "while" => false,
        _ => return None,
    };
    let mut condition = condition.iter().filter(|word| {
        let not = word.as_str() == "!";
        present ^= not;
        !not
    });
    let (Some(test), Some(op), Some(path)) = (condition.next(), condition.next(), condition.next())
    else {
        return None;
    };
    let rest = condition.all(|word| matches!(word.as_str(), "]" | "]]"));
    let tests = matches!(test.as_str(), "[" | "[[" | "test");
    let of_a_path = matches!(
        op.as_str(),
        "-e" | "-f" | "-d" | "-s" | "-S" | "-L" | "-h" | "-r" | "-x" | "-p" | "-b" | "-c"
    );
    let plain = path.starts_with('/') && !path.contains(['$', '*', '?', '`']);
    (present && tests && of_a_path && plain && rest).then(|| path.clone())
}

/// Whether an earlier command may make `path`, so that a disk says nothing of it any more: it names the path or what is above
/// it, or nobody knows what it does.
pub fn may_make(command: &Command, path: &str) -> bool {
    let tests = matches!(
        ending(command),
        Some(Ending::Test(..) | Ending::Failure | Ending::Success(_))
    );
    let name = command.program.rsplit('/').next().unwrap_or_default();
    let maker = matches!(
        name,
        "mkdir"
            | "touch"
            | "ln"
            | "cp"
            | "mv"
            | "install"
            | "tar"
            | "chmod"
            | "chown"
            | "rm"
            | "rsync"
    );
    if !maker {
        return !tests || matches!(name, "sh" | "bash" | "dash");
    }
    let mut words = command.args.iter().map(|arg| arg.trim_end_matches('/'));
    words.any(|word| {
        let shorter = path.strip_prefix(word).or_else(|| word.strip_prefix(path));
        word.starts_with('/')
            && shorter.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    })
}

/// Whether a shell script starts something in the background as its last real command and then ends.
pub fn backgrounds_and_ends(script: &str) -> Option<u64> {
    let mut background = None;
    for (number, line) in (1_u64..).zip(script.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let starts_background = line.ends_with('&') && !line.ends_with("&&");
        match (starts_background, line) {
            (true, _) => background = Some(number),
            (false, l) if l == "exit" || l == "exit 0" || l.starts_with("echo ") => {}
            (false, l) if l.starts_with("disown") || l.contains("=$!") || l.contains("$! >") => {}
            (false, _) => background = None,
        }
    }
    background
}

/// The script that an interpreter is told to run.
pub fn script_of(command: &Command) -> Option<String> {
    let name = command.program.rsplit('/').next()?;
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
    let first = |value_options: &[&str]| {
        let mut args = command.args.iter();
        while let Some(arg) = args.next() {
            if value_options.contains(&arg.as_str()) {
                args.next();
            } else if !arg.starts_with('-') {
                return Some(arg.clone());
            } else if matches!(
                arg.as_str(),
                "-c" | "-e" | "-m" | "-p" | "--eval" | "--print"
            ) {
                return None;
            }
        }
        None
    };
    match stem {
        "node" | "nodejs" => first(&["-r", "--require", "--import", "--loader"]),
        "python" | "pypy" => first(&["-W", "-X"]),
        "perl" | "ruby" => first(&["-I", "-r"]),
        "sh" | "bash" | "dash" | "php" => first(&[]),
        "java" => {
            let jar = command.args.iter().position(|a| a == "-jar")?;
            command.args.get(jar.checked_add(1)?).cloned()
        }
        _ => None,
    }
}

/// Whether a program needs memory that is writable and executable: runtimes that compile while they run.
pub fn is_jit(program: &str) -> bool {
    let name = program.rsplit('/').next().unwrap_or_default();
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
    matches!(
        stem,
        "node"
            | "nodejs"
            | "deno"
            | "bun"
            | "java"
            | "chromium"
            | "google-chrome"
            | "chrome"
            | "firefox"
            | "firefox-esr"
            | "electron"
            | "dotnet"
            | "pypy"
            | "luajit"
            | "pwsh"
            | "mono"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_endings() {
        let args = |s: &str| s.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(known("/bin/sleep", &args("infinity")), Some(Ending::Never));
        assert_eq!(known("sleep", &args("3")), Some(Ending::Success(3.0)));
        assert_eq!(
            known("/usr/bin/test", &args("-S /tmp/x")),
            Some(Ending::Test('S', "/tmp/x".into()))
        );
        assert_eq!(
            script_ending("#!/bin/sh\nexec sleep 1000\n"),
            Some(Ending::Never)
        );
        assert_eq!(script_ending("sleep 1; exit 1"), Some(Ending::Failure));
        assert_eq!(script_ending("ls | wc"), None);
        assert_eq!(
            backgrounds_and_ends("#!/bin/sh\nnode x &\nexit 0\n"),
            Some(2)
        );
        assert_eq!(backgrounds_and_ends("node x &\nwait\n"), None);
    }

    #[test]
    fn loops_that_wait_for_a_path() {
        let wait = waiting_loop;
        let found = |line| Some((line, "/run/x".to_owned()));
        let one_line = "#!/bin/sh\nuntil [ -e /run/x ]; do sleep 1; done\n";
        assert_eq!(wait(one_line), found(2));
        assert_eq!(
            wait("while ! test -S /run/x\ndo\n sleep 0.1\ndone"),
            found(1)
        );
        assert_eq!(wait("while [ ! -f /run/x ]; do :; done"), found(1));
        for other in [
            "while [ -e /run/x ]; do sleep 1; done",
            "until [ -e \"$1/x\" ]; do sleep 1; done",
            "until [ -e /run/x ]; do n=$((n+1)); [ $n -gt 9 ] && break; sleep 1; done",
            "until [ -e /run/x -o -e /run/y ]; do sleep 1; done",
            "# until [ -e /run/x ]; do sleep 1; done",
            "until [ -e /run/x ]; do sleep 1",
        ] {
            assert_eq!(wait(other), None, "{other}");
        }
    }
}

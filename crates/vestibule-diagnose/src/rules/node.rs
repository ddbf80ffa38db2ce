//! Where Node finds what it is told to load (nodejs.org, "Modules: CommonJS modules", "Modules: ECMAScript modules").
use super::{Candidate, about};
use crate::{
    case::DiskCase,
    disk::{Kind, Root},
    units::quote_disk,
};
use regex::Regex;
use serde_json::Value;
use std::{collections::BTreeMap, sync::LazyLock};
use vestibule_api::cause::Cause;

const REFUTES: &str = "a line that the unit's own process printed in the same boot";

/// The file that Node runs for a path: `server` is `server.js`, a directory is its package's main file or its index.
pub(super) fn file(root: &Root, path: &str) -> Option<String> {
    let plain = |base: &str| {
        let mut tries = ["", ".js", ".json", ".node", ".cjs", ".mjs"]
            .iter()
            .map(|end| format!("{base}{end}"));
        tries.find(|p| root.stat(p).is_some_and(|m| m.kind == Kind::File))
    };
    let index = |dir: &str| plain(&format!("{dir}/index"));
    if let Some(found) = plain(path) {
        return Some(found);
    }
    let package = root.read_text(&format!("{path}/package.json"));
    let package: Option<Value> = package.and_then(|text| serde_json::from_str(&text).ok());
    let main = package.as_ref().and_then(|p| p.get("main")?.as_str());
    let main = main.map(|main| format!("{path}/{main}"));
    main.and_then(|main| plain(&main).or_else(|| index(&main)))
        .or_else(|| index(path))
}

/// The files that options load before the script: `-r ./preload.js`. A bare name is a module, and not looked at.
pub(super) fn preloads(args: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next().filter(|a| a.starts_with('-')) {
        let value = match arg.split_once('=') {
            Some(("--require" | "--import", value)) => Some(value),
            None if matches!(arg.as_str(), "-r" | "--require" | "--import") => {
                args.next().map(String::as_str)
            }
            Some(_) | None => None,
        };
        let is_path = |v: &&str| ["/", "./", "../"].iter().any(|start| v.starts_with(start));
        found.extend(value.filter(is_path).map(str::to_owned));
    }
    found
}

static REQUIRE: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r#"(?m)^[^/\n]*?\brequire\(\s*['"]([^'"]+)['"]\s*\)"#).ok());

/// Modules that Node has built in (`module.builtinModules`, without internals).
pub(super) const BUILTIN: &str = " assert async_hooks buffer child_process cluster console constants crypto dgram diagnostics_channel dns \
domain events fs http http2 https inspector module net os path perf_hooks process punycode querystring readline repl \
stream string_decoder sys timers tls trace_events tty url util v8 vm wasi worker_threads zlib test sqlite sea ";

/// A `require` or `import` at the top of a script that Node cannot resolve.
pub(super) fn missing_module(
    disk: &DiskCase<'_>,
    name: &str,
    script: &str,
    env: &BTreeMap<String, String>,
) -> Option<Candidate> {
    let root = disk.base.root;
    let text = root.read_text(script)?;
    let dir = script.rsplit_once('/').map_or("", |(d, _)| d);
    if is_module(root, script) {
        return missing_import(disk, name, script, &text);
    }
    let node_path = env.get("NODE_PATH").map(String::as_str).unwrap_or_default();
    let exists = |base: &str| {
        let file = |p: &str| root.stat(p).is_some_and(|m| m.kind == Kind::File);
        ["", ".js", ".cjs", ".json", ".node"]
            .iter()
            .any(|e| file(&format!("{base}{e}")))
            || root.is_dir(base)
    };
    for found in REQUIRE.as_ref()?.captures_iter(&text).take(200) {
        let (whole, module) = (found.get(0)?, found.get(1)?.as_str());
        // Inside a function or a try it may never be asked for.
        let line_text = whole.as_str().trim_start_matches('\n');
        if line_text.starts_with([' ', '\t']) || line_text.contains("try") {
            continue;
        }
        let bare = module.strip_prefix("node:").unwrap_or(module);
        let top = bare.split('/').next().unwrap_or(bare);
        if module.starts_with("node:") || BUILTIN.contains(&format!(" {top} ")) {
            continue;
        }
        let resolves = if module.starts_with('.') {
            exists(&format!("{dir}/{module}"))
        } else if module.starts_with('/') {
            exists(module)
        } else {
            let mut at = Some(dir);
            let mut hit = false;
            while let Some(d) = at {
                hit |= exists(&format!("{d}/node_modules/{module}"));
                at = d.rsplit_once('/').map(|(p, _)| p);
            }
            hit || [
                "/usr/share/nodejs",
                "/usr/lib/nodejs",
                "/usr/lib/node_modules",
                "/usr/lib/x86_64-linux-gnu/nodejs",
            ]
            .into_iter()
            .chain(node_path.split(':').filter(|d| !d.is_empty()))
            .any(|d| exists(&format!("{d}/{module}")))
        };
        if !resolves {
            return Some(finding(
                name,
                script,
                &text,
                whole.start(),
                whole.as_str(),
                module,
            ));
        }
    }
    None
}

fn finding(name: &str, script: &str, text: &str, at: usize, line: &str, module: &str) -> Candidate {
    let before = text.get(..at).unwrap_or_default();
    let number = (before.matches('\n').count() as u64).saturating_add(1);
    let why = format!(
        "the script asks for the module `{module}`, which is in none of the directories where Node looks"
    );
    let quote = quote_disk(script, Some(number), line.trim());
    let f = about(
        name,
        Cause::ProgramFileMissing,
        quote,
        why,
        "install the program's dependencies in the image",
    );
    Candidate::fixed(f.refuted_by(REFUTES))
}

static IMPORT: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let from = r#"(?m)^(?:import|export)\b[^'"();=]*?\bfrom\s*['"]([^'"\n]+)['"]"#;
    Regex::new(&format!(r#"{from}|^import\s*['"]([^'"\n]+)['"]"#)).ok()
});

/// Whether Node reads the file as an ES module (nodejs.org, "Determining module system").
fn is_module(root: &Root, script: &str) -> bool {
    let typed = || {
        package(root, script)
            .is_some_and(|p| p.get("type").and_then(Value::as_str) == Some("module"))
    };
    script.ends_with(".mjs") || (script.ends_with(".js") && typed())
}

/// The nearest `package.json` above a file.
fn package(root: &Root, script: &str) -> Option<Value> {
    let mut at = script;
    while let Some((dir, _)) = at.rsplit_once('/') {
        if let Some(text) = root.read_text(&format!("{dir}/package.json")) {
            return serde_json::from_str(&text).ok();
        }
        at = dir;
    }
    None
}

/// An `import` of an ES module that resolves to nothing: a relative one names the very file, another one lies in `node_modules`.
fn missing_import(disk: &DiskCase<'_>, name: &str, script: &str, text: &str) -> Option<Candidate> {
    let root = disk.base.root;
    let dir = script.rsplit_once('/').map_or("", |(d, _)| d);
    let own = package(root, script);
    let own = own.as_ref().and_then(|p| p.get("name")?.as_str());
    for found in IMPORT.as_ref()?.captures_iter(text).take(200) {
        let (whole, module) = (
            found.get(0)?,
            found.get(1).or_else(|| found.get(2))?.as_str(),
        );
        let before = text.get(..whole.start())?;
        // In a comment, or a scheme or a map decides.
        if before.matches("/*").count() > before.matches("*/").count()
            || module.contains(':')
            || module.starts_with('#')
        {
            continue;
        }
        let mut parts = module.split('/');
        let mut top = parts.next().unwrap_or_default().to_owned();
        let resolves = if top == "." || top == ".." {
            root.exists(&format!("{dir}/{module}"))
        } else if top.is_empty() {
            root.exists(module)
        } else {
            if top.starts_with('@') {
                top = format!("{top}/{}", parts.next().unwrap_or_default());
            }
            let mut above =
                std::iter::successors(Some(dir), |d| d.rsplit_once('/').map(|(p, _)| p));
            BUILTIN.contains(&format!(" {top} "))
                || own == Some(top.as_str())
                || above.any(|d| root.is_dir(&format!("{d}/node_modules/{top}")))
        };
        if !resolves {
            return Some(finding(
                name,
                script,
                text,
                whole.start(),
                whole.as_str(),
                module,
            ));
        }
    }
    None
}

//! What is left of a controller's VMs: processes, sockets and files, found by looking, not by asking the controller.
use camino::Utf8Path;
use std::{fs, os::unix::fs::FileTypeExt, path::Path};

/// Every process that mentions `home` or holds a file in it open, except `controller`, and every socket and VM directory
/// in it. Empty when nothing was left behind.
pub fn residue(home: &Utf8Path, controller: Option<u32>) -> Vec<String> {
    let mut found = processes(home, controller);
    sockets(home.as_std_path(), &mut found);
    for entry in fs::read_dir(home.join("vms"))
        .into_iter()
        .flatten()
        .flatten()
    {
        found.push(format!("directory {}", entry.path().display()));
    }
    found
}

/// Every process but this one that mentions `home` or has a file in it open.
pub fn processes_of(home: &Utf8Path) -> Vec<u32> {
    found_processes(home)
        .into_iter()
        .map(|(pid, _)| pid)
        .collect()
}

fn processes(home: &Utf8Path, controller: Option<u32>) -> Vec<String> {
    found_processes(home)
        .into_iter()
        .filter(|(pid, _)| Some(*pid) != controller)
        .map(|(pid, line)| format!("process {pid} {line}"))
        .collect()
}

fn found_processes(home: &Utf8Path) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        if pid == std::process::id() {
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(home.as_str()) || holds(&entry.path(), home) {
            let short: String = line.chars().take(120).collect();
            found.push((pid, short));
        }
    }
    found
}

/// Whether the process has a file below `home` open or works there.
fn holds(process: &Path, home: &Utf8Path) -> bool {
    let below =
        |link: &Path| fs::read_link(link).is_ok_and(|to| to.starts_with(home.as_std_path()));
    below(&process.join("cwd"))
        || fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten()
            .any(|fd| below(&fd.path()))
}

fn sockets(dir: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        // The kind of the entry itself: links to the shared images are not followed.
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => sockets(&entry.path(), found),
            Ok(kind) if kind.is_socket() => {
                found.push(format!("socket {}", entry.path().display()));
            }
            Ok(_) | Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_sockets_and_directories_are_found() {
        let home = camino_tempfile::tempdir().unwrap();
        assert_eq!(residue(home.path(), None), Vec::<String>::new());
        fs::create_dir_all(home.path().join("vms/1")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(home.path().join("vms/1/s")).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .current_dir(home.path())
            .spawn()
            .unwrap();
        let found = residue(home.path(), None);
        assert!(
            found
                .iter()
                .any(|f| f.starts_with(&format!("process {} ", child.id()))),
            "{found:?}"
        );
        assert!(
            found.iter().any(|f| f.starts_with("socket "))
                && found.iter().any(|f| f.starts_with("directory "))
        );
        assert!(
            !residue(home.path(), Some(child.id()))
                .iter()
                .any(|f| f.starts_with("process "))
        );
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

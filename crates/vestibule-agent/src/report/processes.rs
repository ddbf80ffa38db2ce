//! Which processes have used the processors, from proc(5): what a slow machine was busy with.
use super::proc;
use std::{fs, io, path::Path};
use vestibule_api::agent::ProcessReport;

/// More say nothing new, and are a page to read.
const MOST: usize = 12;
/// One that used less hardly ran: most kernel threads used none.
const LEAST_MS: u64 = 1;

/// What a line of `stat` says (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    state: String,
    cpu_ms: u64,
    threads: u32,
    memory_kib: u64,
}

impl Stat {
    fn read(directory: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(directory.join("stat")).ok()?)
    }

    /// `pid (name) state ppid …`: the name may hold blanks and parentheses, what follows the last one has a fixed order.
    fn parse(line: &str) -> Option<Self> {
        let (before, after) = line.rsplit_once(')')?;
        let fields: Vec<&str> = after.split_whitespace().collect();
        // The state is the third of proc_pid_stat(5).
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        let ticks = number(14)?.checked_add(number(15)?)?;
        Some(Self {
            name: before.split_once('(')?.1.to_owned(),
            state: (*fields.first()?).to_owned(),
            cpu_ms: ticks.checked_mul(1000)? / rustix::param::clock_ticks_per_second(),
            threads: number(20)?.try_into().ok()?,
            memory_kib: number(24)?.checked_mul(rustix::param::page_size() as u64)? / 1024,
        })
    }
}

/// The busiest first. A process that ends meanwhile is left out.
pub(super) fn busiest() -> io::Result<Vec<ProcessReport>> {
    let mut found: Vec<(u32, Stat)> = proc::pids()?
        .filter_map(|pid| Some((pid, Stat::read(Path::new(&format!("/proc/{pid}")))?)))
        .filter(|(_, stat)| stat.cpu_ms >= LEAST_MS)
        .collect();
    found.sort_by_key(|(pid, stat)| (std::cmp::Reverse(stat.cpu_ms), *pid));
    found.truncate(MOST);
    Ok(found
        .into_iter()
        .map(|(pid, stat)| report(pid, stat))
        .collect())
}

fn report(pid: u32, stat: Stat) -> ProcessReport {
    let directory = format!("/proc/{pid}");
    let tasks = fs::read_dir(format!("{directory}/task"));
    let busiest = tasks
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| Stat::read(&task.path()))
        .max_by_key(|thread| thread.cpu_ms);
    ProcessReport {
        pid,
        role: role(&fs::read(format!("{directory}/cmdline")).unwrap_or_default()),
        name: stat.name,
        state: stat.state,
        cpu_ms: stat.cpu_ms,
        memory_kib: stat.memory_kib,
        threads: stat.threads,
        busiest_thread_ms: busiest.as_ref().map_or(0, |thread| thread.cpu_ms),
        busiest_thread: busiest.map(|thread| thread.name),
    }
}

/// Of `--type=renderer`. Chromium writes the arguments of its helpers over with blanks between them.
fn role(command_line: &[u8]) -> Option<String> {
    command_line
        .split(|&byte| byte == 0 || byte == b' ')
        .find_map(|argument| argument.strip_prefix(b"--type="))
        .and_then(|role| std::str::from_utf8(role).ok())
        .map(|role| role.chars().take(32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_name_may_hold_anything() {
        let line = "17 (a) R (b) S 1 17 17 0 -1 4194560 120 0 0 0 250 50 0 0 20 0 31 0 123 1000000 2048 18446744073709551615";
        let stat = Stat {
            name: "a) R (b".to_owned(),
            state: "S".to_owned(),
            cpu_ms: 3000,
            threads: 31,
            memory_kib: 8192,
        };
        assert_eq!(Stat::parse(line), Some(stat));
        for cut in ["", "17", "17 (", "17 (a) S 1 2", "17 )a( S 1"] {
            assert_eq!(Stat::parse(cut), None, "{cut}");
        }
    }

    #[test]
    fn a_role_is_all_that_is_taken_of_a_command_line() {
        let helper = b"/usr/lib/chromium/chromium --type=utility --utility-sub-type=x https://a.test/?code=y\0";
        assert_eq!(role(helper).as_deref(), Some("utility"));
        assert_eq!(
            role(b"chromium\0--type=gpu-process\0").as_deref(),
            Some("gpu-process")
        );
        assert_eq!(role(b"chromium\0https://a.test/?code=y\0"), None);
    }

    #[test]
    fn a_busy_thread_is_found() {
        let thread = std::thread::Builder::new().name("spins".to_owned());
        let spins = thread.spawn(|| {
            let begun = Instant::now();
            let mut turns = 0_u64;
            while begun.elapsed() < Duration::from_secs(60) {
                turns = std::hint::black_box(turns + 1);
                let stat = Stat::read(Path::new("/proc/thread-self")).unwrap();
                if stat.cpu_ms >= 200 {
                    let me = Stat::read(Path::new("/proc/self")).unwrap();
                    return report(std::process::id(), me);
                }
            }
            panic!("no processor time in a minute");
        });
        let report = spins.unwrap().join().unwrap();
        assert!(
            report.cpu_ms >= 200 && report.busiest_thread_ms >= 200,
            "{report:?}"
        );
        assert!(report.threads > 1 && report.memory_kib > 0, "{report:?}");
        let all = busiest().unwrap();
        assert!(!all.is_empty() && all.len() <= MOST);
        assert!(all.is_sorted_by(|a, b| a.cpu_ms >= b.cpu_ms), "{all:?}");
    }
}

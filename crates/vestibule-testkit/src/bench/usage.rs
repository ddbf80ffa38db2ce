//! What a process has used, as the kernel counts it (proc_pid_stat(5), proc_pid_smaps(5)).
use anyhow::{Context, Result};

/// Seconds of processor time that the process has used, all its threads, in user and kernel mode. The clock has ticks of
/// 10 ms: too coarse for a fraction of a second.
///
/// # Errors
/// When there is no such process.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read `{path}`"))?;
    let ticks = ticks(&text).with_context(|| format!("understand `{path}`"))?;
    #[expect(clippy::cast_precision_loss, reason = "2⁵² ticks are a million years")]
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The same to the nanosecond, of the threads that there are now (the first field of `schedstat`): what a thread that has
/// ended used is not in it.
///
/// # Errors
/// When there is no such process.
pub fn thread_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/task");
    let threads = std::fs::read_dir(&path).with_context(|| format!("read `{path}`"))?;
    let nanos = threads.flatten().filter_map(|thread| {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_ascii_whitespace().next()?.parse::<u64>().ok()
    });
    #[expect(clippy::cast_precision_loss, reason = "2⁵² ns are 52 days")]
    Ok(nanos.sum::<u64>() as f64 / 1e9)
}

/// utime + stime: fields 14 and 15. The second field, the name, may hold spaces and parentheses.
fn ticks(stat: &str) -> Option<u64> {
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_ascii_whitespace().skip(11);
    let mut field = || fields.next()?.parse::<u64>().ok();
    Some(field()? + field()?)
}

/// Bytes of the process's memory that are no file's (`Anonymous`): of a file that it maps privately, what it has written to.
///
/// # Errors
/// When there is no such process.
pub fn anonymous_bytes(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read `{path}`"))?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u32>().ok());
    let kib = kib.with_context(|| format!("understand `{path}`"))?;
    Ok(f64::from(kib) * 1024.0)
}

/// The most that the process has ever had in memory, in bytes (`VmHWM`, proc_pid_status(5)).
///
/// # Errors
/// When there is no such process, or it has ended.
pub fn peak_bytes(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read `{path}`"))?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u32>().ok());
    let kib = kib.with_context(|| format!("understand `{path}`"))?;
    Ok(f64::from(kib) * 1024.0)
}

/// The same of the mappings of one file alone.
///
/// # Errors
/// When there is no such process.
pub fn anonymous_bytes_of(pid: u32, file: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read `{path}`"))?;
    let (mut meant, mut kib) = (false, 0);
    for line in text.lines() {
        // A mapping's first line begins with its addresses, its others with a name and a colon.
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if first == "Anonymous:" {
            let this: u32 = words.next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
            kib += if meant { this } else { 0 };
        } else if !first.ends_with(':') {
            meant = line.ends_with(file);
        }
    }
    Ok(f64::from(kib) * 1024.0)
}

/// The process that has this among its arguments.
///
/// # Errors
/// When there is none.
pub fn process_with(argument: &str) -> Result<u32> {
    let processes = std::fs::read_dir("/proc").context("read `/proc`")?;
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .find(|pid| {
            let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            arguments
                .split(|byte| *byte == 0)
                .any(|one| one == argument.as_bytes())
        })
        .with_context(|| format!("no process has the argument `{argument}`"))
}

/// The children of a process, of all its threads, as they are now.
///
/// # Errors
/// When there is no such process.
pub fn children(pid: u32) -> Result<Vec<u32>> {
    let path = format!("/proc/{pid}/task");
    let threads = std::fs::read_dir(&path).with_context(|| format!("read `{path}`"))?;
    // A thread that ends meanwhile has no children any more.
    let lists = threads
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    Ok(lists
        .flat_map(|list| {
            list.split_ascii_whitespace()
                .filter_map(|word| word.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect())
}

/// Memory of a process, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Pages that it has mapped and that are in memory, shared ones too.
    pub rss: u64,
    /// The same, each shared page divided by the number of those who map it.
    pub pss: u64,
    /// What only it has: this much is free when it ends.
    pub private: u64,
}

/// The memory of a process.
///
/// # Errors
/// When there is no such process, or it is somebody else's.
pub fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read `{path}`"))?;
    rollup(&text).with_context(|| format!("understand `{path}`"))
}

fn rollup(text: &str) -> Option<Memory> {
    let kib = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.strip_prefix(':')?
            .trim()
            .strip_suffix("kB")?
            .trim()
            .parse()
            .ok()
    };
    Some(Memory {
        rss: kib("Rss")?,
        pss: kib("Pss")?,
        private: kib("Private_Clean")? + kib("Private_Dirty")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_a_parenthesis_does_not_shift_the_fields() {
        let stat = "42 (a) b) c) S 1 42 42 0 -1 4194304 100 0 0 0 250 31 0 0 20 0 3 0 9 1 1";
        assert_eq!(ticks(stat), Some(281));
        assert_eq!(ticks("42 (cut"), None);
    }

    #[test]
    fn a_rollup_is_summed() {
        let text = "5-7 ---p 0 0 0 [rollup]\nRss:   2000 kB\nPss:  900 kB\nPss_Dirty: 1 kB\n\
                    Private_Clean: 100 kB\nPrivate_Dirty:  300 kB\n";
        assert_eq!(
            rollup(text),
            Some(Memory {
                rss: 2000,
                pss: 900,
                private: 400
            })
        );
        assert_eq!(rollup("Rss: 1 kB"), None);
    }

    #[test]
    fn the_kernel_knows_us() {
        let own = std::process::id();
        assert!(cpu_seconds(own).unwrap() >= 0.0);
        assert!(thread_seconds(own).unwrap() > 0.0);
        let memory = memory(own).unwrap();
        assert!(memory.rss >= memory.pss && memory.pss > 0);
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let found = children(own).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.contains(&child.id()), "{found:?}");
    }
}

//! What the host's processor says of itself (proc(5), `/proc/cpuinfo`).
use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    sync::OnceLock,
};

/// Of the first processor.
#[derive(Debug)]
pub(crate) struct Cpu {
    /// `AMD EPYC 9R14`.
    pub(crate) model: String,
    /// Sorted.
    pub(crate) features: Vec<String>,
}

/// Looked at once by a process.
pub(crate) fn read() -> &'static Cpu {
    static CPU: OnceLock<Cpu> = OnceLock::new();
    CPU.get_or_init(look)
}

/// What the other processors say is not read, and the kernel does not ask them.
fn look() -> Cpu {
    let (mut model, mut flags) = (None, None);
    if let Ok(file) = File::open("/proc/cpuinfo") {
        let mut lines = BufReader::new(file).lines().map_while(Result::ok);
        while (model.is_none() || flags.is_none())
            && let Some(line) = lines.next()
        {
            let value = |name| {
                let value = line.strip_prefix(name)?.trim_start();
                Some(value.strip_prefix(':')?.trim_start().to_owned())
            };
            model = model.or_else(|| value("model name"));
            flags = flags.or_else(|| value("flags"));
        }
    }
    let flags = flags.unwrap_or_default();
    let mut features: Vec<_> = flags.split_whitespace().map(str::to_owned).collect();
    features.sort();
    Cpu {
        model: model.unwrap_or_else(|| String::from("unknown")),
        features,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_processor_is_named() {
        let cpu = super::read();
        assert_ne!(cpu.model, "unknown");
        assert!(cpu.features.iter().any(|f| f == "sse2"));
    }
}

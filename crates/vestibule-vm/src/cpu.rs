//! What the host's processor says of itself (proc(5), `/proc/cpuinfo`).
use std::{
    fs::File,
    io::{BufRead as _, BufReader},
};

/// The model: `AMD EPYC 9R14`.
pub(crate) fn model() -> String {
    field("model name").unwrap_or_else(|| String::from("unknown"))
}

/// Its features, sorted.
pub(crate) fn features() -> Vec<String> {
    let flags = field("flags").unwrap_or_default();
    let mut features: Vec<_> = flags.split_whitespace().map(str::to_owned).collect();
    features.sort();
    features
}

/// Of the first processor; what the others say is not read, and the kernel does not ask them.
fn field(name: &str) -> Option<String> {
    let file = File::open("/proc/cpuinfo").ok()?;
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    let mut values = lines.filter_map(|line| {
        let value = line.strip_prefix(name)?.trim_start();
        Some(value.strip_prefix(':')?.trim_start().to_owned())
    });
    values.next()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_processor_is_named() {
        assert_ne!(super::model(), "unknown");
        assert!(super::features().iter().any(|f| f == "sse2"));
    }
}

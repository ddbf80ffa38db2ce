//! What the host's processor says of itself (proc(5), `/proc/cpuinfo`).

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

/// Of the first processor.
fn field(name: &str) -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .map(|rest| {
            rest.trim_start_matches(|c: char| c == ':' || c.is_whitespace())
                .to_owned()
        })
}

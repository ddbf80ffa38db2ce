//! Unit names: validity, templates, instances and the directories that a name's drop-ins live in (`systemd.unit(5)`).

/// Unit types, with which every valid name ends.
const TYPES: [&str; 11] = [
    "service",
    "socket",
    "target",
    "device",
    "mount",
    "automount",
    "swap",
    "timer",
    "path",
    "slice",
    "scope",
];

/// The type of a name: what follows its last dot.
pub(crate) fn unit_type(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(_, t)| t)
}

/// Whether `name` is a valid unit name, template or instance.
pub(crate) fn is_valid(name: &str) -> bool {
    let Some((stem, kind)) = name.rsplit_once('.') else {
        return false;
    };
    name.len() < 256
        && TYPES.contains(&kind)
        && !stem.is_empty()
        && !stem.starts_with('@')
        && stem
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c))
}

/// `foo@.service`: a template.
pub(crate) fn is_template(name: &str) -> bool {
    name.rsplit_once('.')
        .is_some_and(|(stem, _)| stem.ends_with('@'))
}

/// The instance of `foo@bar.service`: `bar`.
pub(crate) fn instance(name: &str) -> Option<&str> {
    let (stem, _) = name.rsplit_once('.')?;
    stem.split_once('@')
        .map(|(_, i)| i)
        .filter(|i| !i.is_empty())
}

/// `foo@bar.service` → `foo@.service`.
pub(crate) fn template_of(name: &str) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.')?;
    let (prefix, inst) = stem.split_once('@')?;
    (!inst.is_empty()).then(|| format!("{prefix}@.{kind}"))
}

/// A template with an instance filled in; other names stay.
pub(crate) fn with_instance(template: &str, inst: &str) -> String {
    match template.rsplit_once('.') {
        Some((stem, kind)) if stem.ends_with('@') => format!("{stem}{inst}.{kind}"),
        _ => template.to_owned(),
    }
}

/// What stands before `@`, or the name without its type.
pub(crate) fn prefix(name: &str) -> &str {
    let stem = name.rsplit_once('.').map_or(name, |(s, _)| s);
    stem.split_once('@').map_or(stem, |(p, _)| p)
}

/// Names whose `.d` directories apply to `name`, most specific first: the name, its template, each dash prefix, the type.
pub(crate) fn dropin_names(name: &str) -> Vec<String> {
    let kind = unit_type(name).to_owned();
    let mut names = vec![name.to_owned()];
    names.extend(template_of(name));
    let stem = name.rsplit_once('.').map_or(name, |(s, _)| s);
    let (base, at) = match stem.split_once('@') {
        Some((base, inst)) => (base, Some(inst)),
        None => (stem, None),
    };
    let mut cut = base.trim_end_matches('-');
    while let Some(dash) = cut.rfind('-').filter(|d| *d > 0) {
        cut = cut.get(..dash).unwrap_or_default();
        if let Some(inst) = at {
            names.push(format!("{cut}-@{inst}.{kind}"));
            names.push(format!("{cut}-@.{kind}"));
        }
        names.push(format!("{cut}-.{kind}"));
        cut = cut.trim_end_matches('-');
    }
    names.push(kind);
    names.dedup();
    names
}

/// `\x2d` and `-` of an escaped path undone: `dev-vdb.device` → `/dev/vdb`.
pub(crate) fn unescape_path(stem: &str) -> String {
    let mut out = String::from("/");
    let mut rest = stem;
    while let Some(c) = rest.chars().next() {
        let hex = rest
            .strip_prefix("\\x")
            .and_then(|r| r.get(..2))
            .and_then(|h| u8::from_str_radix(h, 16).ok());
        if let Some(byte) = hex {
            out.push(char::from(byte));
            rest = rest.get(4..).unwrap_or_default();
            continue;
        }
        out.push(if c == '-' { '/' } else { c });
        rest = rest.get(c.len_utf8()..).unwrap_or_default();
    }
    if stem == "-" { "/".to_owned() } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        assert!(
            is_valid("vncserver@1.service")
                && is_valid("dev-vdb.device")
                && is_valid("foo@.service")
        );
        assert!(!is_valid("vm-browser-agent") && !is_valid("a b.service") && !is_valid("x.conf"));
        assert_eq!(
            template_of("vncserver@1.service").as_deref(),
            Some("vncserver@.service")
        );
        assert_eq!(instance("foo@.service"), None);
        assert_eq!(
            dropin_names("vm-browser-agent.service"),
            [
                "vm-browser-agent.service",
                "vm-browser-.service",
                "vm-.service",
                "service"
            ]
        );
        assert_eq!(
            unescape_path("dev-disk-by\\x2duuid-1"),
            "/dev/disk/by-uuid/1"
        );
    }
}

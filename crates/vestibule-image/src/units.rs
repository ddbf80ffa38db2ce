//! Enabling and masking units in a tree, exactly as `systemctl enable` and `mask` do it: links, nothing else.
//!
//! systemd reads unit files at every boot; there is no cache that a build would have to fill (reference: systemd.md).
use crate::{
    recipe::Units,
    tree::{Tree, TreeError},
};

const OWN: &str = "/etc/systemd/system";
const VENDOR: &str = "/usr/lib/systemd/system";

/// Why a unit cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum UnitError {
    #[error("unit `{unit}` is enabled by the recipe and does not exist in the image")]
    Absent { unit: String },
    #[error(
        "unit `{unit}` has no `WantedBy=` or `RequiredBy=` in its [Install] section, so nothing would start it"
    )]
    NoInstall { unit: String },
    #[error("unit `{unit}` starts `{program}`, which {what}")]
    Program {
        unit: String,
        program: String,
        what: String,
    },
    #[error("set up unit `{unit}`")]
    Tree {
        unit: String,
        #[source]
        err: TreeError,
    },
}

/// Applies the recipe's `[units]` to the tree.
pub(crate) fn apply(tree: &mut Tree, units: &Units) -> Result<(), UnitError> {
    for unit in &units.mask {
        link(tree, unit, &format!("{OWN}/{unit}"), "/dev/null")?;
    }
    if units.mask_generators {
        for name in tree.names("/usr/lib/systemd/system-generators") {
            link(
                tree,
                &name,
                &format!("/etc/systemd/system-generators/{name}"),
                "/dev/null",
            )?;
        }
    }
    for unit in &units.enable {
        enable(tree, unit)?;
    }
    if let Some(target) = &units.default_target {
        link(
            tree,
            target,
            &format!("{OWN}/default.target"),
            &format!("{VENDOR}/{target}"),
        )?;
    }
    let preset: String = units
        .enable
        .iter()
        .map(|unit| format!("enable {unit}\n"))
        .collect();
    let text =
        format!("# What the recipe enables, should presets ever be applied.\n{preset}disable *\n");
    tree.put_file(
        "/usr/lib/systemd/system-preset/00-vestibule.preset",
        text,
        0o644,
    )
    .map_err(|err| UnitError::Tree {
        unit: "00-vestibule.preset".to_owned(),
        err,
    })
}

fn enable(tree: &mut Tree, unit: &str) -> Result<(), UnitError> {
    let (path, text) = find(tree, unit)?;
    let mut wanted = false;
    for (key, directory) in [("WantedBy", "wants"), ("RequiredBy", "requires")] {
        for target in values(&text, "Install", key)
            .iter()
            .flat_map(|value| value.split_whitespace())
        {
            wanted = true;
            link(
                tree,
                unit,
                &format!("{OWN}/{target}.{directory}/{unit}"),
                &path,
            )?;
        }
    }
    if wanted {
        Ok(())
    } else {
        Err(UnitError::NoInstall {
            unit: unit.to_owned(),
        })
    }
}

/// The unit's file and its text; of an instance, the template's.
fn find(tree: &Tree, unit: &str) -> Result<(String, String), UnitError> {
    let file = template(unit);
    let path = [OWN, VENDOR]
        .iter()
        .map(|directory| format!("{directory}/{file}"))
        .find(|path| tree.file(path).is_some());
    let path = path.ok_or_else(|| UnitError::Absent {
        unit: unit.to_owned(),
    })?;
    let bytes = tree.read(&path).map_err(|err| UnitError::Tree {
        unit: unit.to_owned(),
        err,
    })?;
    Ok((path, String::from_utf8_lossy(&bytes).into_owned()))
}

/// `vncserver@1.service` → `vncserver@.service`.
fn template(unit: &str) -> String {
    match (unit.split_once('@'), unit.rsplit_once('.')) {
        (Some((prefix, _)), Some((_, suffix))) => format!("{prefix}@.{suffix}"),
        _ => unit.to_owned(),
    }
}

/// The programs that an enabled unit starts, as `ExecStart=` names them, prefixes removed.
pub(crate) fn programs(tree: &Tree, unit: &str) -> Result<Vec<String>, UnitError> {
    let (_, text) = find(tree, unit)?;
    let commands = values(&text, "Service", "ExecStart");
    let words = commands
        .iter()
        .filter_map(|command| command.split_whitespace().next());
    Ok(words
        .map(|word| {
            word.trim_start_matches(['-', '+', '!', ':', '@'])
                .to_owned()
        })
        .collect())
}

/// Values of `key` in `[section]`. Our own units only: no continuation lines, no drop-ins.
fn values(text: &str, section: &str, key: &str) -> Vec<String> {
    let mut current = "";
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            current = name;
        } else if let Some((name, value)) = line.split_once('=')
            && current == section
            && name.trim_end() == key
        {
            found.push(value.trim().to_owned());
        }
    }
    found
}

fn link(tree: &mut Tree, unit: &str, path: &str, target: &str) -> Result<(), UnitError> {
    tree.put_link(path, target).map_err(|err| UnitError::Tree {
        unit: unit.to_owned(),
        err,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Kind;
    use std::collections::BTreeSet;

    fn tree(text: &str) -> Tree {
        let mut tree = Tree::default();
        tree.put_file(&format!("{VENDOR}/x@.service"), text, 0o644)
            .unwrap();
        tree
    }

    fn target(tree: &Tree, path: &str) -> Option<String> {
        match &tree.node(path)?.kind {
            Kind::Symlink(target) => Some(target.clone()),
            Kind::File(_) | Kind::Directory => None,
        }
    }

    #[test]
    fn an_instance_is_linked_to_its_template() {
        let mut tree =
            tree("[Service]\nExecStart=-/bin/x %i\n[Install]\nWantedBy=multi-user.target\n");
        let units = Units {
            enable: BTreeSet::from(["x@1.service".to_owned()]),
            ..Units::default()
        };
        apply(&mut tree, &units).unwrap();
        let link = target(
            &tree,
            "/etc/systemd/system/multi-user.target.wants/x@1.service",
        );
        assert_eq!(link.as_deref(), Some("/usr/lib/systemd/system/x@.service"));
        assert_eq!(programs(&tree, "x@1.service").unwrap(), ["/bin/x"]);
    }

    #[test]
    fn a_unit_that_nothing_would_start_is_refused() {
        let units = Units {
            enable: BTreeSet::from(["x@1.service".to_owned()]),
            ..Units::default()
        };
        let outcome = apply(&mut tree("[Service]\nWantedBy=multi-user.target\n"), &units);
        assert!(matches!(outcome, Err(UnitError::NoInstall { .. })));
        let outcome = apply(&mut Tree::default(), &units);
        assert!(matches!(outcome, Err(UnitError::Absent { .. })));
    }

    #[test]
    fn masks_are_links_to_the_null_device() {
        let mut tree = tree("");
        tree.put_file("/usr/lib/systemd/system-generators/fstab", "", 0o755)
            .unwrap();
        let units = Units {
            mask: BTreeSet::from(["y.service".to_owned()]),
            mask_generators: true,
            ..Units::default()
        };
        apply(&mut tree, &units).unwrap();
        for path in [
            "/etc/systemd/system/y.service",
            "/etc/systemd/system-generators/fstab",
        ] {
            assert_eq!(target(&tree, path).as_deref(), Some("/dev/null"), "{path}");
        }
    }
}

//! `${param.NAME}` in a pack, and the operator's values for it. `${param.NAME.host}` is the host of a parameter that is
//! a URL. References may stand in `oidc`, `url.hosts`, `browser.allow_hosts`, `env.set` and `argv`, nowhere else.
use super::{
    Flow, Parameter, ProviderPack,
    check::check,
    parse::PACK_LIMIT,
    problem::{PackErrors, Problems, nearest, show},
    rules::matches_whole,
};
use std::collections::{BTreeMap, BTreeSet};
use url::Url;

const OPEN: &str = "${";

/// Whether the text waits for a parameter.
pub(super) fn has_reference(text: &str) -> bool {
    text.contains("${param.")
}

/// A reference in a text: `name`, and whether only the host of its URL is meant.
#[derive(Debug, PartialEq, Eq)]
struct Reference<'a> {
    name: &'a str,
    host: bool,
}

/// Splits off the first reference: text before it, what stands between the braces, text after it.
fn split(text: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = text.split_once(OPEN)?;
    let (inner, after) = rest.split_once('}')?;
    Some((before, inner, after))
}

fn reference(inner: &str) -> Option<Reference<'_>> {
    let name = inner.strip_prefix("param.")?;
    Some(match name.strip_suffix(".host") {
        Some(name) => Reference { name, host: true },
        None => Reference { name, host: false },
    })
}

/// Every text of a flow that may hold references, with its key.
fn texts<'a>(
    key: &str,
    flow: &'a mut Flow,
) -> impl Iterator<Item = (String, &'a mut String)> + use<'a> {
    let at = key.to_owned();
    let indexed = move |name: &str, list: &'a mut Vec<String>| {
        let base = format!("{at}.{name}");
        list.iter_mut()
            .enumerate()
            .map(move |(i, text)| (format!("{base}[{i}]"), text))
            .collect::<Vec<_>>()
    };
    let mut all = indexed("argv", &mut flow.argv);
    all.extend(indexed(
        "browser.allow_hosts",
        &mut flow.browser.allow_hosts,
    ));
    if let Some(url) = &mut flow.url {
        all.extend(indexed("url.hosts", &mut url.hosts));
    }
    for (name, value) in &mut flow.env.set {
        all.push((format!("{key}.env.set.{name}"), value));
    }
    if let Some(oidc) = &mut flow.oidc {
        all.push((format!("{key}.oidc.issuer"), &mut oidc.issuer));
        all.push((format!("{key}.oidc.client_id"), &mut oidc.client_id));
        all.extend(indexed("oidc.scopes", &mut oidc.scopes));
    }
    all.into_iter()
}

/// Reports references to what is not declared, and parameters that nothing refers to.
pub(super) fn check_references(pack: &ProviderPack, problems: &mut Problems) {
    let declared: BTreeSet<&str> = pack.parameter.iter().map(|p| p.name.as_str()).collect();
    let mut used = BTreeSet::new();
    for (index, flow) in pack.flow.iter().enumerate() {
        for (key, text) in texts(&format!("flow[{index}]"), &mut flow.clone()) {
            let mut rest: &str = text;
            while let Some((_, inner, after)) = split(rest) {
                rest = after;
                match reference(inner) {
                    Some(Reference { name, .. }) if declared.contains(name) => {
                        used.insert(name.to_owned());
                    }
                    Some(Reference { name, .. }) => problems.unless(false, &key, || {
                        let hint = nearest(name, declared.iter().copied())
                            .map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
                        format!("no `[[parameter]]` is named {}{hint}", show(name))
                    }),
                    None => problems.unless(false, &key, || {
                        let inner = show(&format!("${{{inner}}}"));
                        format!("{inner}; expected `${{param.NAME}}`")
                    }),
                }
            }
        }
    }
    for (index, parameter) in pack.parameter.iter().enumerate() {
        problems.unless(
            used.contains(&parameter.name),
            &format!("parameter[{index}].name"),
            || format!("nothing refers to {}", show(&parameter.name)),
        );
    }
}

impl ProviderPack {
    /// Fills in the parameters. The result has none left and is checked again as a whole.
    ///
    /// # Errors
    /// When a value is missing, unknown, does not match its pattern, or makes a part of the pack wrong.
    pub fn resolve(&self, parameters: &BTreeMap<String, String>) -> Result<Self, PackErrors> {
        let file = format!("providers.{}", self.provider.id);
        let mut problems = Problems::default();
        let values = values(&self.parameter, parameters, &mut problems);
        if !problems.is_empty() {
            return Err(problems.of(&file));
        }
        let mut pack = self.clone();
        pack.parameter.clear();
        // A pack may name a parameter in every second word: what it becomes is bounded as what was read is.
        let mut room = PACK_LIMIT;
        for (index, flow) in pack.flow.iter_mut().enumerate() {
            for (key, text) in texts(&format!("flow[{index}]"), flow) {
                match fill(text, &values, &mut room) {
                    Ok(filled) => *text = filled,
                    Err(what) => problems.add(key, what),
                }
            }
            if let Some(oidc) = &mut flow.oidc {
                // One parameter may hold several scopes, separated by spaces as on the wire.
                oidc.scopes = oidc
                    .scopes
                    .iter()
                    .flat_map(|s| s.split_whitespace())
                    .map(str::to_owned)
                    .collect();
            }
        }
        check(&pack, &mut problems);
        problems.or(&file, pack)
    }
}

/// The value of every declared parameter.
fn values<'a>(
    declared: &'a [Parameter],
    given: &'a BTreeMap<String, String>,
    problems: &mut Problems,
) -> BTreeMap<&'a str, &'a str> {
    for name in given.keys() {
        if !declared.iter().any(|p| p.name == *name) {
            let hint = nearest(name, declared.iter().map(|p| p.name.as_str()))
                .map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
            problems.add(
                format!("parameters.{name}"),
                format!("the pack has no such parameter{hint}"),
            );
        }
    }
    let mut values = BTreeMap::new();
    for parameter in declared {
        let key = format!("parameters.{}", parameter.name);
        let Some(value) = given.get(&parameter.name).or(parameter.default.as_ref()) else {
            problems.add(key, format!("missing: {}", parameter.title));
            continue;
        };
        if matches_whole(&parameter.pattern, value) == Some(true) && !value.contains(OPEN) {
            values.insert(parameter.name.as_str(), value.as_str());
        } else {
            problems.add(
                key,
                format!("{} does not match `{}`", show(value), parameter.pattern),
            );
        }
    }
    values
}

/// The text with every reference filled in. `room`: so many bytes may still come of this and further texts.
fn fill(text: &str, values: &BTreeMap<&str, &str>, room: &mut usize) -> Result<String, String> {
    let mut filled = String::new();
    let mut rest = text;
    let mut take = |bytes: usize| match room.checked_sub(bytes) {
        Some(left) => {
            *room = left;
            Ok(())
        }
        None => Err(format!(
            "its parameters' values make the pack larger than {PACK_LIMIT} bytes"
        )),
    };
    while let Some((before, inner, after)) = split(rest) {
        filled.push_str(before);
        rest = after;
        let reference =
            reference(inner).ok_or_else(|| format!("`${{{inner}}}` is no parameter"))?;
        let value = values
            .get(reference.name)
            .ok_or_else(|| format!("no parameter is named {}", show(reference.name)))?;
        take(value.len())?;
        if reference.host {
            let host = Url::parse(value)
                .ok()
                .and_then(|url| url.host_str().map(str::to_owned));
            filled.push_str(&host.ok_or_else(|| format!("{} has no host", show(value)))?);
        } else {
            filled.push_str(value);
        }
    }
    filled.push_str(rest);
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_filled_once() {
        let fill = |text, values: &_| fill(text, values, &mut 100);
        let values = BTreeMap::from([("issuer", "https://id.example:8443/x"), ("a", "1")]);
        assert_eq!(
            fill("${param.issuer.host}/${param.a}", &values).unwrap(),
            "id.example/1"
        );
        assert_eq!(
            fill("no reference $ {", &values).unwrap(),
            "no reference $ {"
        );
        assert!(
            fill("${param.a.host}", &values)
                .unwrap_err()
                .contains("no host")
        );
        assert!(fill("${home}", &values).is_err());
    }
}

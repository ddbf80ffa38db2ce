//! TOML text → [`ProviderPack`]. Each section is read on its own, so that one run names what is wrong in all of them.
use super::{
    ProviderPack,
    check::{LIST_LIMIT, check, list},
    problem::{PackErrors, Problems, nearest, show},
};
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// A pack file of more bytes than this is refused unread.
pub const PACK_LIMIT: usize = 256 << 10;
/// What serde says of a value quotes the value; more than this is no sentence.
const WORDS_LIMIT: usize = 400;
/// So many unknown keys of one section are reported; more is not a typo.
const UNKNOWN_LIMIT: usize = 16;
/// Sections that are lists of tables.
const LISTS: [&str; 3] = ["parameter", "flow", "credential"];

impl ProviderPack {
    /// Reads and checks the pack in `text`. `file_name` stands in messages; where it ends in `.toml`, its stem must be
    /// the provider's id.
    ///
    /// # Errors
    /// Everything that is wrong, as far as it can be told apart, each with its key and what was expected.
    pub fn parse(file_name: &str, text: &str) -> Result<Self, PackErrors> {
        let mut problems = Problems::default();
        if text.len() > PACK_LIMIT {
            problems.add(
                "",
                format!("{} bytes; expected at most {PACK_LIMIT}", text.len()),
            );
            return Err(problems.of(file_name));
        }
        let table = match text.parse::<Table>() {
            Ok(table) => table,
            Err(err) => {
                problems.add("", syntax(text, &err));
                return Err(problems.of(file_name));
            }
        };
        let Some(pack) = read(&table, &mut problems) else {
            return Err(problems.of(file_name));
        };
        if let Some(stem) = file_name
            .rsplit('/')
            .next()
            .and_then(|n| n.strip_suffix(".toml"))
        {
            problems.unless(pack.provider.id.as_str() == stem, "provider.id", || {
                format!("`{}`; expected `{stem}`, the file's name", pack.provider.id)
            });
        }
        for (index, flow) in pack.flow.iter().enumerate() {
            let plain = flow.url.as_ref().is_some_and(|url| url.allow_http);
            let key = format!("flow[{index}].url.allow_http");
            problems.unless(!plain, &key, || {
                "only an operator's configuration may set it".into()
            });
        }
        check(&pack, &mut problems);
        problems.or(file_name, pack)
    }
}

/// One line for an error of TOML's own syntax.
fn syntax(text: &str, err: &toml::de::Error) -> String {
    let line = err
        .span()
        .and_then(|span| text.get(..span.start))
        .map_or(1, |before| before.matches('\n').count() + 1);
    format!("line {line} is not TOML: {}", one_line(err.message()))
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Reads section by section; `None` when any could not be read.
fn read(table: &Table, problems: &mut Problems) -> Option<ProviderPack> {
    let mut clean = Table::new();
    for (name, value) in table {
        match value {
            Value::Array(items) if LISTS.contains(&name.as_str()) => {
                list(name, items.len(), problems);
                if items.len() > LIST_LIMIT {
                    return None;
                }
                let items: Vec<Value> = items
                    .iter()
                    .enumerate()
                    .map(|(i, item)| {
                        let key = format!("{name}[{i}]");
                        match name.as_str() {
                            "parameter" => section::<super::Parameter>(&key, item, problems),
                            "flow" => section::<super::Flow>(&key, item, problems),
                            _ => section::<super::CredentialRule>(&key, item, problems),
                        }
                    })
                    .collect();
                clean.insert(name.clone(), Value::Array(items));
            }
            Value::Table(_) => {
                let item = match name.as_str() {
                    "provider" => section::<super::Provider>(name, value, problems),
                    "terms" => section::<super::Terms>(name, value, problems),
                    "install" => section::<super::Install>(name, value, problems),
                    "detect" => section::<super::Detect>(name, value, problems),
                    "verify" => section::<super::Verify>(name, value, problems),
                    "cleanup" => section::<super::Cleanup>(name, value, problems),
                    "test" => section::<super::TestOverride>(name, value, problems),
                    _ => value.clone(),
                };
                clean.insert(name.clone(), item);
            }
            Value::String(_)
            | Value::Integer(_)
            | Value::Float(_)
            | Value::Boolean(_)
            | Value::Datetime(_)
            | Value::Array(_) => {
                clean.insert(name.clone(), value.clone());
            }
        }
    }
    // What is wrong inside a section was said above; here speak only the keys of the file itself.
    let sections_are_fine = problems.is_empty();
    let mut whole = Value::Table(clean);
    let mut top = Problems::default();
    let pack = deserialize::<ProviderPack>("", &mut whole, &mut top);
    for problem in top.of("").problems {
        if sections_are_fine || !problem.key.contains(['.', '[']) {
            problems.add(problem.key, problem.what);
        }
    }
    if problems.is_empty() { pack } else { None }
}

/// Checks that `value` reads as a `T`, reports what does not, and returns it without its unknown keys.
fn section<T: DeserializeOwned>(key: &str, value: &Value, problems: &mut Problems) -> Value {
    let mut value = value.clone();
    deserialize::<T>(key, &mut value, problems);
    value
}

/// Reads a `T`. An unknown key is reported, removed, and the rest is read again.
fn deserialize<T: DeserializeOwned>(
    key: &str,
    value: &mut Value,
    problems: &mut Problems,
) -> Option<T> {
    for _ in 0..UNKNOWN_LIMIT {
        let (path, message) = match serde_path_to_error::deserialize(value.clone()) {
            Ok(read) => return Some(read),
            Err(err) => (steps(err.path()), one_line(err.inner().message())),
        };
        let at = dotted(key, &path);
        let Some((unknown, known)) = unknown_field(&message) else {
            problems.add(at, expectation(&message));
            return None;
        };
        let hint = nearest(unknown, known.iter().copied()).map_or_else(
            || format!("expected one of {}", known.join(", ")),
            |near| format!("did you mean `{near}`?"),
        );
        problems.add(at, format!("no such key; {hint}"));
        if !remove(value, &path) {
            return None;
        }
    }
    None
}

#[derive(Debug)]
enum Step {
    Index(usize),
    Key(String),
}

fn steps(path: &serde_path_to_error::Path) -> Vec<Step> {
    use serde_path_to_error::Segment;
    path.iter()
        .filter_map(|segment| match segment {
            Segment::Seq { index } => Some(Step::Index(*index)),
            Segment::Map { key } => Some(Step::Key(key.clone())),
            Segment::Enum { .. } | Segment::Unknown => None,
        })
        .collect()
}

fn dotted(key: &str, path: &[Step]) -> String {
    let mut text = key.to_owned();
    for step in path {
        match step {
            Step::Index(index) => text.push_str(&format!("[{index}]")),
            Step::Key(name) => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(name);
            }
        }
    }
    text
}

/// The words between backquotes: in serde's messages what stands there, then what is known.
fn quoted(message: &str) -> impl Iterator<Item = &str> {
    message.split('`').skip(1).step_by(2)
}

/// The key and its alternatives in serde's message about an unknown field.
fn unknown_field(message: &str) -> Option<(&str, Vec<&str>)> {
    message.strip_prefix("unknown field ")?;
    let mut words = quoted(message);
    Some((words.next()?, words.collect()))
}

/// Serde's message in our words where ours are plainer.
fn expectation(message: &str) -> String {
    if let Some(field) = message
        .strip_prefix("missing field `")
        .and_then(|rest| rest.strip_suffix('`'))
    {
        return format!("the key `{field}` is missing");
    }
    let mut words = quoted(message);
    if message.starts_with("unknown variant ")
        && let Some(word) = words.next()
    {
        let known: Vec<&str> = words.collect();
        let near = nearest(word, known.iter().copied())
            .map_or_else(String::new, |near| format!(" (did you mean `{near}`?)"));
        return format!("{}; expected one of {}{near}", show(word), known.join(", "));
    }
    message.chars().take(WORDS_LIMIT).collect()
}

/// Removes the key at the end of `path`; whether it was there.
fn remove(value: &mut Value, path: &[Step]) -> bool {
    let Some((last, way)) = path.split_last() else {
        return false;
    };
    let mut at = value;
    for step in way {
        let next = match step {
            Step::Index(index) => at.get_mut(*index),
            Step::Key(name) => at.get_mut(name.as_str()),
        };
        let Some(next) = next else { return false };
        at = next;
    }
    match last {
        Step::Key(name) => at
            .as_table_mut()
            .is_some_and(|table| table.remove(name).is_some()),
        Step::Index(_) => false,
    }
}

impl ProviderPack {
    /// The pack as TOML text, which [`ProviderPack::parse`] reads back.
    ///
    /// # Errors
    /// Never for a pack that was parsed; TOML cannot express everything that the types can hold.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }
}

/// Reads an [`super::Override`] that stands in a larger configuration with the same care for unknown keys.
impl super::Override {
    /// Reads an override from a TOML table; `key` is where the table stands, for messages.
    ///
    /// # Errors
    /// As [`ProviderPack::parse`].
    pub fn read(file_name: &str, key: &str, table: &Table) -> Result<Self, PackErrors> {
        let mut problems = Problems::default();
        let read = deserialize(key, &mut Value::Table(table.clone()), &mut problems);
        match read {
            Some(value) if problems.is_empty() => Ok(value),
            Some(_) | None => Err(problems.of(file_name)),
        }
    }
}

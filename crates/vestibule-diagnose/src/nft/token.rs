//! Words of a ruleset (`nft(8)`, "Input file formats"): comments, line ends, quotes, `include`, `define` and `$variable`.
use crate::{disk::Root, text, units::service::glob_files};
use std::{collections::HashMap, rc::Rc};

/// Words of one ruleset with all that it includes.
const LIMIT: usize = 200_000;
/// Includes inside includes (`MAX_INCLUDE_DEPTH` of nft's scanner).
const DEPTH: usize = 16;

/// A line of a ruleset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub file: String,
    pub line: u64,
    pub text: String,
}

/// A word, a sign, or `;`, which stands for the end of a line as well.
#[derive(Clone, Debug)]
pub(super) struct Token {
    pub text: String,
    pub place: Rc<Place>,
}

/// Reads `path` and what it includes. None where `nft` would refuse a part of it.
pub(super) fn load(root: &Root, path: &str) -> Option<Vec<Token>> {
    let mut loader = Loader {
        root,
        defined: HashMap::new(),
        out: Vec::new(),
    };
    loader.file(path, 0)?;
    Some(loader.out)
}

struct Loader<'a> {
    root: &'a Root,
    defined: HashMap<String, Vec<Token>>,
    out: Vec<Token>,
}

impl Loader<'_> {
    fn file(&mut self, path: &str, depth: usize) -> Option<()> {
        if depth > DEPTH {
            return None;
        }
        let text = self.root.read_text(path)?;
        let mut tokens = tokens(&text, path).into_iter().peekable();
        while let Some(token) = tokens.next() {
            let first = self
                .out
                .last()
                .is_none_or(|t| matches!(t.text.as_str(), ";" | "{" | "}"));
            match token.text.as_str() {
                "include" if first => self.include(&tokens.next()?.text, depth)?,
                "define" | "redefine" if first => {
                    let name = tokens.next()?.text;
                    tokens.next().filter(|t| t.text == "=")?;
                    let mut value = Vec::new();
                    let mut open = 0_usize;
                    while let Some(t) = tokens.next_if(|t| t.text != ";" || open > 0) {
                        match t.text.as_str() {
                            "{" => open = open.saturating_add(1),
                            "}" => open = open.saturating_sub(1),
                            _ => {}
                        }
                        self.push(&mut value, t)?;
                    }
                    self.defined.insert(name, value);
                }
                "undefine" if first => {
                    self.defined.remove(&tokens.next()?.text);
                }
                _ => {
                    let mut out = std::mem::take(&mut self.out);
                    let pushed = self.push(&mut out, token);
                    self.out = out;
                    pushed?;
                }
            }
        }
        Some(())
    }

    /// Appends a word, or what a variable stands for. None for one that is not defined.
    fn push(&self, out: &mut Vec<Token>, token: Token) -> Option<()> {
        if out.len() > LIMIT {
            return None;
        }
        match token.text.strip_prefix('$') {
            None => out.push(token),
            Some(name) => out.extend(self.defined.get(name)?.iter().map(|t| Token {
                text: t.text.clone(),
                place: Rc::clone(&token.place),
            })),
        }
        Some(())
    }

    /// A pattern may match nothing; a plain name must be there. Other names than `/…` and `./…` are meant below `/etc`.
    fn include(&mut self, name: &str, depth: usize) -> Option<()> {
        let path = match name.strip_prefix("./") {
            Some(rest) => format!("/{rest}"),
            None if name.starts_with('/') => name.to_owned(),
            None => format!("/etc/{name}"),
        };
        let deeper = depth.saturating_add(1);
        if !path.contains(['*', '?', '[']) {
            return self.file(&path, deeper);
        }
        for file in glob_files(self.root, &path) {
            let hidden = file.rsplit('/').next().is_some_and(|n| n.starts_with('.'));
            if !hidden && !self.root.is_dir(&file) {
                self.file(&file, deeper)?;
            }
        }
        Some(())
    }
}

/// Signs that are words of their own, longest first.
const SIGNS: [&str; 22] = [
    "==", "!=", "<=", ">=", "<<", ">>", "{", "}", ";", ",", ":", "=", "<", ">", "&", "|", "^", "(",
    ")", "!", "[", "]",
];

pub(super) fn tokens(text: &str, file: &str) -> Vec<Token> {
    let mut out = Vec::new();
    for (number, line) in (1_u64..).zip(text.split('\n')) {
        let place = Rc::new(Place {
            file: file.to_owned(),
            line: number,
            text: text::shorten(line.trim(), 300),
        });
        let mut push = |text: &str| {
            out.push(Token {
                text: text.to_owned(),
                place: Rc::clone(&place),
            });
        };
        let mut rest = line.trim_start();
        // A backslash at its end continues a line.
        let mut ends = true;
        while let Some(head) = rest.chars().next() {
            let mut taken = 1;
            if head == '#' {
                break;
            } else if head == '\\' {
                ends = false;
            } else if head == '"' {
                let inner = rest.get(1..).unwrap_or_default();
                let inner = inner.split('"').next().unwrap_or_default();
                push(inner);
                taken = inner.len().saturating_add(2);
            } else if let Some(address) = address_with_colons(rest) {
                push(address);
                taken = address.len();
            } else if let Some(sign) = SIGNS.iter().find(|s| rest.starts_with(**s)) {
                push(sign);
                taken = sign.len();
            } else {
                let end = rest
                    .find(|c: char| c.is_whitespace() || "{};,:=<>&|^()![]#\"\\".contains(c))
                    .unwrap_or(rest.len());
                let word = rest.get(..end).unwrap_or_default();
                if !word.is_empty() {
                    push(word);
                }
                taken = end.max(head.len_utf8());
            }
            rest = rest.get(taken..).unwrap_or_default().trim_start();
        }
        if ends {
            push(";");
        }
    }
    out
}

/// An IPv6 or MAC address at the start of `text`: colons are signs elsewhere (`22 : accept`).
fn address_with_colons(text: &str) -> Option<&str> {
    let end = text
        .find(|c: char| !c.is_ascii_hexdigit() && !":./".contains(c))
        .unwrap_or(text.len());
    let word = text.get(..end)?;
    let follows = text.get(end..)?.chars().next();
    let whole = follows.is_none_or(|c| !c.is_alphanumeric());
    (whole && word.matches(':').count() > 1).then_some(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_nft_does() {
        let words = |text| {
            let list: Vec<String> = tokens(text, "f").into_iter().map(|t| t.text).collect();
            list.join(" ")
        };
        assert_eq!(
            words("tcp dport{22,8080}accept # not this"),
            "tcp dport { 22 , 8080 } accept ;"
        );
        assert_eq!(
            words("a vmap{22:accept,::1 : drop} \\\nlog prefix \"x; y\""),
            "a vmap { 22 : accept , ::1 : drop } log prefix x; y ;"
        );
        assert_eq!(words("ip saddr!=10.0.0.0/8"), "ip saddr != 10.0.0.0/8 ;");
    }
}

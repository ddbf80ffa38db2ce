//! `%` specifiers of unit files (`systemd.unit(5)`, "Specifiers").
use super::names;

/// What specifiers are resolved with.
#[derive(Clone, Debug)]
pub(crate) struct Specifiers<'a> {
    pub name: &'a str,
    pub hostname: &'a str,
    pub machine_id: &'a str,
    /// The fragment's path.
    pub fragment: &'a str,
    pub user: &'a str,
    pub home: &'a str,
}

impl Specifiers<'_> {
    /// `text` with every specifier resolved; the offending specifier where systemd knows none of that letter.
    pub(crate) fn expand(&self, text: &str) -> Result<String, String> {
        let mut out = String::with_capacity(text.len());
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            match chars.next() {
                None => out.push('%'),
                Some('%') => out.push('%'),
                Some(letter) => match self.value(letter) {
                    Some(value) => out.push_str(&value),
                    None => {
                        // `specifier_printf` leaves an unknown letter alone unless it is alphanumeric.
                        if letter.is_ascii_alphanumeric() {
                            return Err(format!("%{letter}"));
                        }
                        out.push('%');
                        out.push(letter);
                    }
                },
            }
        }
        Ok(out)
    }

    fn value(&self, letter: char) -> Option<String> {
        let instance = names::instance(self.name).unwrap_or_default();
        let prefix = names::prefix(self.name);
        let fragment_dir = self.fragment.rsplit_once('/').map_or("", |(d, _)| d);
        Some(match letter {
            'n' => self.name.to_owned(),
            'N' => self
                .name
                .rsplit_once('.')
                .map_or(self.name, |(s, _)| s)
                .to_owned(),
            'p' | 'P' => prefix.to_owned(),
            'j' | 'J' => prefix
                .rsplit_once('-')
                .map_or(prefix, |(_, j)| j)
                .to_owned(),
            'i' => instance.to_owned(),
            'I' => names::unescape_path(instance)
                .trim_start_matches('/')
                .to_owned(),
            'f' => names::unescape_path(if instance.is_empty() {
                prefix
            } else {
                instance
            }),
            'H' | 'l' | 'q' => self.hostname.to_owned(),
            'm' => self.machine_id.to_owned(),
            'b' | 'v' | 'A' | 'B' | 'M' | 'o' | 'w' | 'W' | 'a' => String::new(),
            't' | 'V' if letter == 't' => "/run".to_owned(),
            'T' => "/tmp".to_owned(),
            'V' => "/var/tmp".to_owned(),
            'S' => "/var/lib".to_owned(),
            'C' => "/var/cache".to_owned(),
            'L' => "/var/log".to_owned(),
            'E' => "/etc".to_owned(),
            'd' => format!("/run/credentials/{}", self.name),
            'D' => "/usr/share".to_owned(),
            'u' => self.user.to_owned(),
            'U' => "0".to_owned(),
            'g' | 'G' => "root".to_owned(),
            'h' => self.home.to_owned(),
            's' => "/bin/sh".to_owned(),
            'c' | 'r' | 'R' => String::new(),
            'y' => self.fragment.to_owned(),
            'Y' => fragment_dir.to_owned(),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specifiers_resolve_or_are_refused() {
        let s = Specifiers {
            name: "vnc@1.service",
            hostname: "h",
            machine_id: "m",
            fragment: "",
            user: "root",
            home: "/root",
        };
        assert_eq!(s.expand("a %i %p 100%% %").as_deref(), Ok("a 1 vnc 100% %"));
        assert_eq!(s.expand("u:p%40ss"), Err("%4".into()));
    }
}

//! `docs/causes.md`, read out by cause.
use vestibule_api::cause::Cause;

const TEXT: &str = include_str!("../../../docs/causes.md");

/// What the documentation says of a cause: its section, without the heading. Empty where it has none.
pub fn explain(cause: Cause) -> &'static str {
    let heading = format!("\n### `{}`", cause.id());
    let Some((_, rest)) = TEXT.split_once(heading.as_str()) else {
        return "";
    };
    let rest = rest.split_once('\n').map_or("", |(_, r)| r);
    let end = rest
        .find("\n## ")
        .into_iter()
        .chain(rest.find("\n### "))
        .min()
        .unwrap_or(rest.len());
    rest.get(..end).unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vestibule_api::cause::Note;

    #[test]
    fn every_cause_is_explained_in_four_parts() {
        for cause in Cause::ALL {
            let text = explain(*cause);
            for part in ["Meaning", "Recognised by", "Refuted by", "Fix"] {
                assert!(
                    text.contains(&format!("**{part}:**")),
                    "{cause} lacks {part}"
                );
            }
        }
        for note in Note::ALL {
            assert!(TEXT.contains(&format!("`{note}`")), "{note}");
        }
    }
}

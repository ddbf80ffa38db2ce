//! The rules of `[[credential]]`: which files a sign-in leaves, and what each must hold.
use super::{list, not_path, unique, whole};
use crate::pack::{
    CredentialFormat, CredentialRule,
    problem::{Problems, show},
    rules::{self, is_pointer, is_relative_path, is_slug},
};

pub(super) fn credentials(rules: &[CredentialRule], problems: &mut Problems) {
    list("credential", rules.len(), problems);
    unique(
        "credential",
        "id",
        rules.iter().map(|r| r.id.as_str()),
        problems,
    );
    unique(
        "credential",
        "path",
        rules.iter().map(|r| r.path.as_str()),
        problems,
    );
    problems.unless(rules.iter().any(|r| !r.optional), "credential", || {
        "none that is not optional; expected at least one, or nothing would end a sign-in".into()
    });
    for (index, rule) in rules.iter().enumerate() {
        credential(&format!("credential[{index}]"), rule, problems);
    }
}

fn credential(key: &str, rule: &CredentialRule, problems: &mut Problems) {
    let at = |name: &str| format!("{key}.{name}");
    problems.unless(is_slug(&rule.id), &at("id"), || {
        format!(
            "{}; expected lower-case letters, digits, `-` and `_`",
            show(&rule.id)
        )
    });
    problems.unless(is_relative_path(&rule.path), &at("path"), || {
        not_path(&rule.path)
    });
    let pointers = match rule.format {
        CredentialFormat::Json
        | CredentialFormat::Jsonc
        | CredentialFormat::Toml
        | CredentialFormat::Yaml
        | CredentialFormat::Netrc => true,
        CredentialFormat::Text | CredentialFormat::Opaque => false,
    };
    problems.unless(
        !pointers || !rule.required.is_empty() || rule.optional,
        &at("required"),
        || "empty; expected pointers to what a complete credential has".into(),
    );
    problems.unless(
        pointers || rule.required.is_empty(),
        &at("required"),
        || "only structured formats have pointers".into(),
    );
    list(&at("required"), rule.required.len(), problems);
    for (i, pointer) in rule.required.iter().enumerate() {
        problems.unless(is_pointer(pointer), &at(&format!("required[{i}]")), || {
            not_pointer(pointer)
        });
    }
    if let Some(expiry) = &rule.expires_at {
        let fine = pointers && is_pointer(&expiry.pointer);
        problems.unless(fine, &at("expires_at.pointer"), || {
            not_pointer(&expiry.pointer)
        });
    }
    if let Some(account) = &rule.account {
        let fine = pointers && rules::is_account_pointer(account);
        problems.unless(fine, &at("account"), || {
            format!(
                "{}; expected a JSON pointer, or `jwt:/pointer#/claim`",
                show(account)
            )
        });
    }
    match (&rule.pattern, rule.format) {
        (Some(pattern), CredentialFormat::Text) => whole(&at("pattern"), pattern, problems),
        (Some(_), _) => problems.add(at("pattern"), "only the format `text` has a pattern"),
        (None, CredentialFormat::Text) => {
            problems.add(
                at("pattern"),
                "missing; the format `text` needs it to tell when it is complete",
            );
        }
        (None, _) => {}
    }
}

fn not_pointer(pointer: &str) -> String {
    format!(
        "{}; expected a JSON pointer (RFC 6901), with `/` first",
        show(pointer)
    )
}

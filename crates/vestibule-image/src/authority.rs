//! A certificate authority of a test, trusted by everything in an image: the system's bundle and Chromium.
//!
//! Only a recipe that lists `authorities` takes one, and it stands in the recipe's digest: an image that trusts it can
//! never be mistaken for one that does not.
use crate::tree::{Tree, TreeError};

const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// Why an authority cannot be added.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("certificate authority `{name}` is not one or more PEM certificates")]
    NotPem { name: String },
    #[error("add certificate authority `{name}`")]
    Tree {
        name: String,
        #[source]
        err: TreeError,
    },
}

/// Adds the certificates in `pem` under `name`.
pub(crate) fn add(tree: &mut Tree, name: &str, pem: &str) -> Result<(), AuthorityError> {
    let certificates = certificates(pem).ok_or_else(|| AuthorityError::NotPem {
        name: name.to_owned(),
    })?;
    let list: Vec<String> = certificates
        .iter()
        .map(|one| format!("\"{one}\""))
        .collect();
    // Chromium has its own list of roots; `CACertificates` adds to it.
    let policy = format!("{{\n  \"CACertificates\": [{}]\n}}\n", list.join(", "));
    let files = [
        (format!("/etc/vestibule/{name}.pem"), pem.to_owned()),
        (
            format!("/usr/local/share/ca-certificates/vestibule-{name}.crt"),
            pem.to_owned(),
        ),
        (
            format!("/etc/chromium/policies/managed/vestibule-{name}.json"),
            policy,
        ),
    ];
    let tree_error = |err| AuthorityError::Tree {
        name: name.to_owned(),
        err,
    };
    for (path, text) in files {
        tree.put_file(&path, text, 0o644).map_err(tree_error)?;
    }
    let mut bundle = tree.read(BUNDLE).map_err(tree_error)?;
    bundle.extend_from_slice(pem.trim_end().as_bytes());
    bundle.push(b'\n');
    tree.put_file(BUNDLE, bundle, 0o644).map_err(tree_error)
}

/// The base64 bodies of the certificates in `pem` (RFC 7468), at least one.
fn certificates(pem: &str) -> Option<Vec<String>> {
    let mut found = Vec::new();
    let mut rest = pem;
    while let Some((_, after)) = rest.split_once(BEGIN) {
        let (body, after) = after.split_once(END)?;
        let body: String = body.split_whitespace().collect();
        let base64 = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'=');
        if body.is_empty() || !body.bytes().all(base64) {
            return None;
        }
        found.push(body);
        rest = after;
    }
    (!found.is_empty()).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_reaches_bundle_and_browser() {
        let mut tree = Tree::default();
        tree.put_file(BUNDLE, "old\n", 0o644).unwrap();
        let pem = format!("{BEGIN}\nQUJD\nREVG\n{END}\n");
        add(&mut tree, "test-ca", &pem).unwrap();
        assert_eq!(tree.read(BUNDLE).unwrap(), format!("old\n{pem}").as_bytes());
        let policy = tree
            .read("/etc/chromium/policies/managed/vestibule-test-ca.json")
            .unwrap();
        let policy: serde_json::Value = serde_json::from_slice(&policy).unwrap();
        assert_eq!(policy["CACertificates"][0], "QUJDREVG");
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        for pem in [
            "",
            "hello",
            &format!("{BEGIN}\n{END}"),
            &format!("{BEGIN}\n\"]\n{END}"),
            BEGIN,
        ] {
            assert!(certificates(pem).is_none(), "{pem}");
        }
    }
}

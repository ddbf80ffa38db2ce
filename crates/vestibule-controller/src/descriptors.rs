//! A process, or a host, that has no file descriptor left: told from what else the kernel refuses, and named.
use std::{error::Error, io};
use vestibule_api::{
    cause::Cause,
    finding::{Finding, Quote},
};

/// What is the matter.
pub(crate) const WHY: &str = "the controller, or the host, has no file descriptor left";
/// What to do about it.
pub(crate) const FIX: &str = "raise `LimitNOFILE=` of the service (or `ulimit -n`), or lower `limits.vms` and `limits.viewers`";

/// Whether that is behind an error: EMFILE and ENFILE (open(2)).
pub(crate) fn are_gone(err: &(dyn Error + 'static)) -> bool {
    let mut next = Some(err);
    while let Some(err) = next {
        let said = err.downcast_ref::<io::Error>();
        if matches!(said.and_then(io::Error::raw_os_error), Some(23 | 24)) {
            return true;
        }
        next = err.source();
    }
    false
}

/// A VM that could not be made for it.
pub(crate) fn finding(quote: Quote) -> Finding {
    Finding::new(Cause::LaunchRefused, quote, WHY, FIX).retryable()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vestibule_image::StoreError;

    #[test]
    fn they_are_seen_behind_what_failed_for_them() {
        let failed = |errno| StoreError::Io {
            what: "read",
            path: "images".into(),
            err: io::Error::from_raw_os_error(errno),
        };
        assert!(are_gone(&failed(24)) && are_gone(&failed(23)));
        assert!(!are_gone(&failed(2)), "not there is something else");
        assert!(!are_gone(&StoreError::Unknown {
            name: "browser".to_owned()
        }));
    }
}

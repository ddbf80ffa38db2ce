//! The page that the person sees after the redirect: what happened, in words, and nothing that came with it.
use super::exchange::OidcError;

fn page(title: &str, text: &str) -> String {
    // Both are texts of our own: nothing here comes from a request.
    format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>{title}</title><style>body{{font:18px/1.5 sans-serif;margin:15vh auto;max-width:34em;padding:0 1em;\
         color:#1b2a4a;background:#fff}}</style><h1>{title}</h1><p>{text}</p></html>"
    )
}

pub(super) fn done() -> String {
    page(
        "You are signed in",
        "You can leave this page. Vestibule has what it needs.",
    )
}

pub(super) fn waiting() -> String {
    page(
        "Waiting for the sign-in",
        "This page is where the provider sends you back to. Go on with the sign-in in the other tab.",
    )
}

pub(super) fn failed(err: &OidcError) -> String {
    page("The sign-in did not work", err.advice())
}

/// For a redirect that belongs to nothing.
pub(crate) fn stray() -> String {
    page(
        "No sign-in is waiting",
        "It has ended, or it was started somewhere else. Start it again from the dashboard.",
    )
}

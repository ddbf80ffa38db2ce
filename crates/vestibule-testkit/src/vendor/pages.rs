//! The pages a person sees: plain, large, each control in a colour of its own so that a test that only sees pixels finds
//! it, and in an order that the keyboard walks through.

/// Background of every page.
pub const PAGE_RGB: [u8; 3] = [0xf4, 0xef, 0xe1];
/// Background of *Allow* and *Continue*.
pub const ALLOW_RGB: [u8; 3] = [0x12, 0x7a, 0x3c];
/// Background of *Deny*.
pub const DENY_RGB: [u8; 3] = [0xa3, 0x22, 0x2d];
/// Background of the field for a device code.
pub const FIELD_RGB: [u8; 3] = [0xb8, 0xd8, 0xff];
/// Where the forms of the pages go.
pub(crate) const CONSENT_PATH: &str = "/__consent";

const STYLE: &str = "html{background:#f4efe1;color:#222;font:24px sans-serif}body{margin:32px}\
    button{font:32px sans-serif;color:#fff;border:0;padding:24px 64px;margin:16px 24px 0 0;cursor:pointer}\
    .allow{background:#127a3c}.deny{background:#a3222d}input{font:32px monospace;padding:12px;background:#b8d8ff}";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn page(title: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>\
         <h1>{title}</h1>{body}"
    )
}

/// Asks for consent to the authorization `id`. *Allow* has the focus: Enter allows, Tab and Enter deny.
pub(crate) fn consent(vendor: &str, id: &str, scope: &str) -> String {
    let body = format!(
        "<p>A tool asks for: {}</p><form method=post action={CONSENT_PATH}><input type=hidden name=id value=\"{}\">\
         <button class=allow name=decision value=allow autofocus>Allow</button>\
         <button class=deny name=decision value=deny>Deny</button></form>",
        escape(scope),
        escape(id),
    );
    page(&format!("Sign in with {vendor}"), &body)
}

/// Asks for the code that the tool shows.
pub(crate) fn device(vendor: &str, action: &str, problem: &str) -> String {
    let body = format!(
        "<p>{}</p><form method=get action=\"{action}\"><input name=user_code autofocus autocomplete=off size=12>\
         <button class=allow>Continue</button></form>",
        escape(problem),
    );
    page(&format!("{vendor}: enter the code"), &body)
}

/// Says something.
pub(crate) fn message(title: &str) -> String {
    page(title, "")
}

//! What a client is told when its request is refused. A person sees this page in the browser for plain `http://`; for a
//! tunnel, browsers show only the status line.
use super::policy::Refusal;
use hyper::StatusCode;
use vestibule_api::egress::EgressReason;

/// The status that says who is at fault: the request, the policy, or the network.
pub fn status(refusal: &Refusal) -> StatusCode {
    match refusal.reason {
        EgressReason::Loopback
        | EgressReason::Private
        | EgressReason::LinkLocal
        | EgressReason::NotGlobal
        | EgressReason::Policy => StatusCode::FORBIDDEN,
        EgressReason::BadRequest => StatusCode::BAD_REQUEST,
        EgressReason::TooMany => StatusCode::SERVICE_UNAVAILABLE,
        EgressReason::NameNotFound | EgressReason::Unreachable | EgressReason::Tls
            if refusal.late =>
        {
            StatusCode::GATEWAY_TIMEOUT
        }
        EgressReason::NameNotFound | EgressReason::Unreachable | EgressReason::Tls => {
            StatusCode::BAD_GATEWAY
        }
    }
}

/// The reason phrase of the status line.
pub const fn phrase(reason: EgressReason) -> &'static str {
    match reason {
        EgressReason::Loopback => "Refused by Vestibule: loopback",
        EgressReason::Private => "Refused by Vestibule: private address",
        EgressReason::LinkLocal => "Refused by Vestibule: link-local address",
        EgressReason::NotGlobal => "Refused by Vestibule: not a public address",
        EgressReason::Policy => "Refused by Vestibule: policy",
        EgressReason::BadRequest => "Not a proxy request",
        EgressReason::NameNotFound => "Name not found",
        EgressReason::Unreachable => "Unreachable",
        EgressReason::Tls => "TLS failed",
        EgressReason::TooMany => "Too many connections",
    }
}

/// The page for a person.
pub fn html(host: &str, refusal: &Refusal) -> String {
    let (host, why) = (escape(host), escape(&refusal.why));
    let phrase = phrase(refusal.reason);
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{phrase}</title>\
         <style>body{{font:16px/1.5 sans-serif;max-width:40em;margin:4em auto;padding:0 1em}}</style>\
         <h1>{phrase}</h1><p>This virtual machine asked for <strong>{host}</strong>.</p><p>{why}.</p>\
         <p>The sign-in's record names this host too.</p></html>\n"
    )
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_names_host_and_reason_and_runs_nothing() {
        let refusal = Refusal::new(EgressReason::Private, "the name resolves to 10.0.0.1");
        let page = html("<script>alert(1)</script>", &refusal);
        assert!(
            page.contains("10.0.0.1")
                && page.contains("&lt;script&gt;")
                && !page.contains("<script>")
        );
        assert_eq!(status(&refusal), StatusCode::FORBIDDEN);
        let late = Refusal::late(EgressReason::Unreachable, "");
        assert_eq!(status(&late), StatusCode::GATEWAY_TIMEOUT);
    }
}

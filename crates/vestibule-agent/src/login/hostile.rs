//! What a sign-in reads from a terminal and a tool, for [`crate::hostile`].
use super::{screen, url};
use tokio::time::Instant;
use vestibule_api::pack::Flow;

/// Reads `text` as a flow's terminal and logs, and as a page that its tool wants opened.
pub(crate) fn read(flow: &Flow, text: &str) {
    let mut reader = screen::Reader::new(flow).expect("the patterns of a checked pack compile");
    let now = Instant::now();
    for text in [text, "", text] {
        let answers = reader.prompts(text);
        assert!(answers.len() <= flow.prompt.len());
        reader.codes(text);
        reader.conceal(text);
        for last in [false, true] {
            let failure = reader.failure(text, |_| text.to_owned(), now, last);
            assert!(failure.is_none_or(|failure| failure.line.len() <= text.len()));
        }
        assert!(reader.failure_due().is_none_or(|due| due >= now));
        reader.done(text);
    }
    let Some(rule) = &flow.url else { return };
    for page in screen::urls(rule, text)
        .iter()
        .map(String::as_str)
        .chain([text])
    {
        if let Ok(page) = url::check(rule, page) {
            let host = url::host_of(&page);
            assert!(
                rule.hosts
                    .iter()
                    .any(|allowed| allowed.eq_ignore_ascii_case(&host))
            );
        }
    }
}

//! What the terminal's text means: prompts that the pack answers, codes for the person, texts that name a failure, and
//! URLs that came no better way. Pure: text in, findings out.
use super::{LoginError, url};
use regex::{Match, Regex};
use std::{collections::BTreeSet, time::Duration};
use tokio::time::Instant;
use vestibule_api::{
    cause::Cause,
    pack::{FailRule, Flow, UrlRule},
};

/// Codes longer than this are not codes.
const CODE_LIMIT: usize = 64;

/// The compiled patterns of one flow, and what they have matched so far.
#[derive(Debug)]
pub(super) struct Reader {
    prompts: Vec<Prompt>,
    code: Option<Regex>,
    codes: BTreeSet<String>,
    fail: Vec<FailPattern>,
    done: Option<Regex>,
}

#[derive(Debug)]
struct Prompt {
    when: Regex,
    send: String,
    once: bool,
    /// Occurrences on the screen at the last look. A further one is a new question.
    seen: usize,
    answered: bool,
}

#[derive(Debug)]
struct FailPattern {
    when: Regex,
    cause: Cause,
    /// A log of the tool's instead of the terminal.
    file: Option<String>,
    /// It counts when it has matched for so long without a pause.
    hold: Duration,
    since: Option<Instant>,
}

/// A text of the tool's that names a cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) cause: Cause,
    /// `terminal`, or the log's path.
    pub(super) source: String,
    pub(super) line: String,
}

/// A tool often says in its next line what exactly failed; a rule for that comes first in the pack and gets this chance.
const SAID_ALL: Duration = Duration::from_secs(1);

impl Reader {
    pub(super) fn new(flow: &Flow) -> Result<Self, LoginError> {
        let compile = |pattern: &String| Regex::new(pattern).map_err(LoginError::Pattern);
        let prompts = flow.prompt.iter().map(|prompt| {
            Ok(Prompt {
                when: compile(&prompt.when)?,
                send: prompt.send.clone(),
                once: prompt.once,
                seen: 0,
                answered: false,
            })
        });
        Ok(Self {
            prompts: prompts.collect::<Result<_, LoginError>>()?,
            code: flow
                .code
                .as_ref()
                .map(|code| compile(&code.cli_regex))
                .transpose()?,
            codes: BTreeSet::new(),
            fail: flow
                .fail
                .iter()
                .map(FailPattern::new)
                .collect::<Result<_, LoginError>>()?,
            done: flow.done.screen_regex.as_ref().map(compile).transpose()?,
        })
    }

    /// Prompts on `screen` that wait for an answer: index and what to type.
    pub(super) fn prompts(&mut self, screen: &str) -> Vec<(u32, String)> {
        let mut due = Vec::new();
        for (index, prompt) in self.prompts.iter_mut().enumerate() {
            let count = prompt.when.find_iter(screen).count();
            if count > prompt.seen && !(prompt.once && prompt.answered) {
                prompt.answered = true;
                due.push((
                    u32::try_from(index).unwrap_or(u32::MAX),
                    prompt.send.clone(),
                ));
            }
            prompt.seen = count;
        }
        due
    }

    /// Codes in `text` that were not there before.
    pub(super) fn codes(&mut self, text: &str) -> Vec<String> {
        let Some(pattern) = &self.code else {
            return Vec::new();
        };
        let found = pattern.captures_iter(text).filter_map(|found| found.get(1));
        let fresh: Vec<_> = found
            .map(|code| code.as_str().trim().to_owned())
            .filter(|code| code.len() <= CODE_LIMIT)
            .collect();
        fresh
            .into_iter()
            .filter(|code| self.codes.insert(code.clone()))
            .collect()
    }

    /// `text` without the codes that were found: they are for the person, and a finding goes to a disk.
    pub(super) fn conceal(&self, text: &str) -> String {
        self.codes
            .iter()
            .fold(text.to_owned(), |text, code| text.replace(code, "[…]"))
    }

    /// Looks for texts that name a failure; `read` gives the text of a log. `last`: the tool has ended, so what it has said
    /// is all. Returns the pack's first rule that has held long enough.
    pub(super) fn failure(
        &mut self,
        terminal: &str,
        read: impl Fn(&str) -> String,
        now: Instant,
        last: bool,
    ) -> Option<Failure> {
        let mut due = false;
        let mut first = None;
        for rule in &mut self.fail {
            let log = rule.file.as_deref().map(&read);
            let text = log.as_deref().unwrap_or(terminal);
            let Some(found) = rule.when.find(text) else {
                rule.since = None;
                continue;
            };
            let held = now.duration_since(*rule.since.get_or_insert(now)) >= rule.hold;
            due |= held;
            if held || rule.hold <= SAID_ALL {
                let source = rule.file.clone().unwrap_or_else(|| "terminal".to_owned());
                first.get_or_insert_with(|| Failure {
                    cause: rule.cause,
                    source,
                    line: lines_around(text, &found),
                });
            }
        }
        first.filter(|_| due || last)
    }

    /// When the first rule that matches now will have held long enough.
    pub(super) fn failure_due(&self) -> Option<Instant> {
        self.fail
            .iter()
            .filter_map(|rule| Some(rule.since? + rule.hold))
            .min()
    }

    /// Logs that rules look into.
    pub(super) fn logs(&self) -> impl Iterator<Item = &String> {
        self.fail.iter().filter_map(|rule| rule.file.as_ref())
    }

    /// Whether `text` says that the sign-in is done; always, where the pack does not ask.
    pub(super) fn done(&self, text: &str) -> bool {
        self.done
            .as_ref()
            .is_none_or(|pattern| pattern.is_match(text))
    }
}

impl FailPattern {
    fn new(rule: &FailRule) -> Result<Self, LoginError> {
        Ok(Self {
            when: Regex::new(&rule.when).map_err(LoginError::Pattern)?,
            cause: rule.cause,
            file: rule.file.clone(),
            hold: SAID_ALL.max(Duration::from_secs(rule.for_s.into())),
            since: None,
        })
    }
}

/// The whole lines that a match lies in.
fn lines_around(text: &str, found: &Match<'_>) -> String {
    let begin = text[..found.start()].rfind('\n').map_or(0, |at| at + 1);
    let end = text[found.end()..]
        .find('\n')
        .map_or(text.len(), |at| found.end() + at);
    text[begin..end].trim().to_owned()
}

/// URLs in `text` that `rule` allows, in order.
pub(super) fn urls(rule: &UrlRule, text: &str) -> Vec<String> {
    url::find(text)
        .filter(|candidate| url::check(rule, candidate).is_ok())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn reader(extra: &serde_json::Value) -> Reader {
        let mut flow = json!({"id": "f", "title": "F", "kind": "tui", "timeout_s": 60});
        flow.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        Reader::new(&serde_json::from_value(flow).unwrap()).unwrap()
    }

    #[test]
    fn a_prompt_is_answered_once_or_each_time_it_is_new() {
        let mut reader = reader(
            &json!({"prompt": [{"when": "Press Enter", "send": "\r"}, {"when": r"\? Again", "send": "y\r", "once": false}]}),
        );
        assert_eq!(reader.prompts("nothing"), []);
        assert_eq!(reader.prompts("Press Enter"), [(0, "\r".to_owned())]);
        assert_eq!(reader.prompts("Press Enter"), []);
        assert_eq!(reader.prompts("? Again"), [(1, "y\r".to_owned())]);
        assert_eq!(reader.prompts("? Again"), []);
        assert_eq!(reader.prompts("? Again\n? Again"), [(1, "y\r".to_owned())]);
        assert_eq!(reader.prompts(""), []);
        assert_eq!(
            reader.prompts("Press Enter\n? Again"),
            [(1, "y\r".to_owned())]
        );
    }

    #[test]
    fn codes_are_shown_once() {
        let mut reader =
            reader(&json!({"code": {"cli_regex": r"code: ([A-Z0-9]{4}-[A-Z0-9]{4})"}}));
        assert_eq!(
            reader.codes("! First copy your one-time code: ABCD-1234\n"),
            ["ABCD-1234"]
        );
        assert!(reader.codes("code: ABCD-1234").is_empty());
        assert_eq!(
            reader.conceal("code: ABCD-1234 expired"),
            "code: […] expired"
        );
        assert_eq!(
            reader.codes("code: ABCD-1234\ncode: EFGH-5678"),
            ["EFGH-5678"]
        );
    }

    #[test]
    fn a_failure_comes_with_its_line_and_the_more_exact_rule_wins() {
        let mut reader = reader(&json!({"fail": [
            {"when": "(?i)state mismatch", "cause": "state-mismatch"}, {"when": "error", "cause": "tool-failed"}]}));
        let now = Instant::now();
        let mut at = |text, after: u64, last| {
            reader.failure(
                text,
                |_| String::new(),
                now + Duration::from_millis(after),
                last,
            )
        };
        assert_eq!(at("all well", 0, true), None);
        assert_eq!(at("ok\n error", 0, false), None);
        let said = at(
            "ok\n error\n  State mismatch in callback \nend",
            1000,
            false,
        )
        .unwrap();
        assert_eq!(
            (said.cause, said.line.as_str()),
            (Cause::StateMismatch, "State mismatch in callback")
        );
        assert_eq!(at("error", 1001, true).unwrap().cause, Cause::ToolFailed);
    }

    #[test]
    fn a_log_that_says_the_same_for_long_is_a_failure() {
        let mut reader = reader(
            &json!({"fail": [{"when": r"starting exchange\s*\z", "cause": "token-endpoint-failed", "file": "x.log", "for_s": 60}]}),
        );
        let now = Instant::now();
        let log = std::cell::Cell::new("starting exchange\n");
        let mut at = |after: u64| {
            reader.failure(
                "",
                |name| format!("{name}\n{}", log.get()),
                now + Duration::from_secs(after),
                true,
            )
        };
        assert_eq!(at(0), None);
        assert_eq!(at(59), None);
        log.set("starting exchange\ndone\n");
        assert_eq!(at(60), None);
        log.set("done\nstarting exchange\n");
        assert_eq!((at(61), at(120)), (None, None));
        assert_eq!(at(121).unwrap().source, "x.log");
        assert_eq!(reader.logs().count(), 1);
    }

    #[test]
    fn only_allowed_urls_are_taken_from_the_screen() {
        let rule = serde_json::from_value(
            json!({"sources": ["screen"], "hosts": ["auth.openai.com"], "must_have": ["state"]}),
        )
        .unwrap();
        let text = "Docs: https://openai.com/docs. If no browser opens: https://auth.openai.com/oauth?state=1&x=2\n(https://auth.openai.com/x)";
        assert_eq!(
            urls(&rule, text),
            ["https://auth.openai.com/oauth?state=1&x=2"]
        );
    }
}

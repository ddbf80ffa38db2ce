//! Findings and verdicts: a cause, the stage it stops, and the quoted line that proves it.
use crate::cause::{Cause, Note, Stage};
use serde::{Deserialize, Serialize};

/// One quoted piece of evidence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Quote {
    /// Where it stands: `disk:/etc/systemd/system/x.service`, `serial`, `journal`, `vmm`, `report`, `terminal`, `egress`.
    pub source: String,
    /// Line in that source, from 1, where the source has lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
    /// The text itself, cut to a readable length. Never a secret.
    pub text: String,
}

/// One cause with its proof. Built with [`Finding::new`], which asks for the first quote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    pub cause: Cause,
    pub stage: Stage,
    /// The unit concerned, where one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Never empty.
    pub evidence: Vec<Quote>,
    /// Why the evidence means this cause.
    pub why: String,
    /// What to do.
    pub fix: String,
    /// Whether the same request may succeed when it is made again without changing anything.
    pub retryable: bool,
    /// The observation that would show this finding to be wrong.
    pub refutes: String,
}

impl Finding {
    /// A finding of `cause`, proven by `quote`.
    pub fn new(cause: Cause, quote: Quote, why: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            cause,
            stage: cause.stage(),
            unit: None,
            evidence: vec![quote],
            why: why.into(),
            fix: fix.into(),
            retryable: false,
            refutes: String::new(),
        }
    }

    /// The same finding, about `unit`.
    #[must_use]
    pub fn about(mut self, unit: impl Into<String>) -> Self {
        self.unit = Some(unit.into());
        self
    }

    /// The same finding, with a further quote.
    #[must_use]
    pub fn and(mut self, quote: Quote) -> Self {
        self.evidence.push(quote);
        self
    }

    /// The same finding, with the observation that would refute it.
    #[must_use]
    pub fn refuted_by(mut self, refutes: impl Into<String>) -> Self {
        self.refutes = refutes.into();
        self
    }

    /// The same finding, marked as one that a second try may not meet.
    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.retryable = true;
        self
    }
}

/// Weak evidence: something that was looked for and proves nothing here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Weakness {
    pub note: Note,
    pub evidence: Vec<Quote>,
    pub why: String,
}

/// The answer to "what is wrong?".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VerdictKind {
    Healthy,
    Cause,
    Unknown,
}

/// One verdict. For `cause` the finding is [`Verdict::finding`]; what else was found stands in [`Verdict::also`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Verdict {
    pub verdict: VerdictKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finding: Option<Finding>,
    #[serde(default)]
    pub also: Vec<Finding>,
    #[serde(default)]
    pub notes: Vec<Weakness>,
    /// Which kinds of evidence there were: `disk`, `serial`, `journal`, `report`, `vmm`, `events`.
    pub looked_at: Vec<String>,
    /// For `unknown`: what to collect next.
    #[serde(default)]
    pub collect_next: Vec<String>,
    /// Milliseconds that the judgement took.
    pub elapsed_ms: u64,
}

impl Verdict {
    /// A verdict of one cause and nothing else, looked up in `looked_at`.
    pub fn of(finding: Finding, looked_at: Vec<String>) -> Self {
        Self {
            verdict: VerdictKind::Cause,
            finding: Some(finding),
            also: Vec::new(),
            notes: Vec::new(),
            looked_at,
            collect_next: Vec::new(),
            elapsed_ms: 0,
        }
    }
}

//! What a bench says: figures, as a table for people and as JSON for programs.
use super::{host::Host, stats::median};
use serde::Serialize;

/// Which way a ratio has to go.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Required {
    AtLeast(f64),
    AtMost(f64),
}

impl Required {
    /// Whether `value` is what is required. `NaN` never is.
    pub fn met_by(self, value: f64) -> bool {
        match self {
            Self::AtLeast(limit) => value >= limit,
            Self::AtMost(limit) => value <= limit,
        }
    }
}

impl std::fmt::Display for Required {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(limit) => write!(f, "≥ {limit}"),
            Self::AtMost(limit) => write!(f, "≤ {limit}"),
        }
    }
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Figure {
    pub what: String,
    /// The median of the samples, unless `what` says otherwise.
    pub value: f64,
    /// `s`, `ms`, `MiB`, `GiB/s`, …; `x` for a ratio.
    pub unit: &'static str,
    /// Every sample, in the order in which they were taken.
    pub samples: Vec<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub required: Option<Required>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub met: Option<bool>,
}

/// The outcome of a bench.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub bench: &'static str,
    pub host: Host,
    pub figures: Vec<Figure>,
    /// What has to be known to read the figures.
    pub notes: Vec<String>,
}

impl Report {
    /// An empty report; notes the state of the machine, so make it before measuring.
    pub fn new(bench: &'static str) -> Self {
        Self {
            bench,
            host: Host::now(),
            figures: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// The median of `samples`.
    pub fn median(&mut self, what: impl Into<String>, unit: &'static str, samples: &[f64]) {
        self.figure(what, unit, median(samples), samples);
    }

    /// A value that was computed from `samples` in another way than their median.
    pub fn figure(
        &mut self,
        what: impl Into<String>,
        unit: &'static str,
        value: f64,
        samples: &[f64],
    ) {
        self.figures.push(Figure {
            what: what.into(),
            value,
            unit,
            samples: samples.to_vec(),
            required: None,
            met: None,
        });
    }

    /// Holds the last figure against what is required of it.
    pub fn require(&mut self, required: Required) {
        if let Some(figure) = self.figures.last_mut() {
            figure.required = Some(required);
            figure.met = Some(required.met_by(figure.value));
        }
    }

    /// Something that has to be known to read the figures.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }
}

/// More samples than these are in the JSON only.
const SHOWN: usize = 12;

/// Three significant digits: no bench is more exact.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.bench)?;
        writeln!(f, "{}", self.host)?;
        let width = self
            .figures
            .iter()
            .map(|figure| figure.what.chars().count())
            .max()
            .unwrap_or(0);
        for figure in &self.figures {
            let value = short(figure.value);
            write!(
                f,
                "  {:<width$}  {value:>8} {:<8}",
                figure.what, figure.unit
            )?;
            if let (Some(required), Some(met)) = (figure.required, figure.met) {
                write!(
                    f,
                    " required {required}: {}",
                    if met { "met" } else { "MISSED" }
                )?;
            }
            if figure.samples.len() > 1 && figure.samples.len() <= SHOWN {
                let samples: Vec<_> = figure.samples.iter().map(|sample| short(*sample)).collect();
                write!(f, "  ({})", samples.join(", "))?;
            }
            writeln!(f)?;
        }
        for note in &self.notes {
            writeln!(f, "  note: {note}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_requirement_is_met_or_missed_and_both_are_said() {
        let mut report = Report::new("x");
        report.median("fast", "GiB/s", &[1.0, 3.0, 2.0]);
        report.require(Required::AtLeast(2.0));
        report.median("slow", "s", &[120.4]);
        report.require(Required::AtMost(15.0));
        assert_eq!(
            report.figures.iter().map(|f| f.met).collect::<Vec<_>>(),
            [Some(true), Some(false)]
        );
        let text = report.to_string();
        assert!(
            text.contains("2.00 GiB/s") && text.contains("≥ 2: met"),
            "{text}"
        );
        assert!(
            text.contains("120 s") && text.contains("≤ 15: MISSED"),
            "{text}"
        );
        assert!(
            !Required::AtLeast(0.0).met_by(f64::NAN) && !Required::AtMost(0.0).met_by(f64::NAN)
        );
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["figures"][0]["required"]["at-least"], 2.0);
        assert_eq!(json["host"]["cores"], report.host.cores);
    }
}

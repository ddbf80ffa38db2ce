//! Progress of a build or a verification: one bar of phases on a terminal, one line a phase elsewhere.
use crate::output::{self, Output};
use indicatif::{ProgressBar, ProgressStyle};
use std::{io::IsTerminal as _, time::Duration};
use vestibule_image::{Event, Progress};

/// Draws on standard error, so that standard output holds the result alone. Dropped, it takes the bar away.
pub(super) struct Bars {
    bar: Option<ProgressBar>,
}

impl Bars {
    pub(super) fn new(out: Output) -> Self {
        let interactive = std::io::stderr().is_terminal() && !out.json;
        let bar = interactive.then(|| {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template(
                "{spinner} [{bar:24}] {pos}/{len} {prefix} {wide_msg} {elapsed}",
            );
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bars {
    fn event(&self, event: &Event) {
        let Some(bar) = &self.bar else {
            if let Event::PhaseDone {
                phase,
                cached,
                took,
            } = event
            {
                let how = if *cached { ", cached" } else { "" };
                output::note(&format!("{phase} ({:.1} s{how})", took.as_secs_f64()));
            }
            return;
        };
        match event {
            Event::PhaseStarted {
                phase,
                index,
                total,
            } => {
                bar.set_length(*total as u64);
                bar.set_position(index.saturating_sub(1) as u64);
                bar.set_prefix(phase.to_string());
                bar.set_message("");
            }
            Event::PhaseDone {
                phase,
                cached,
                took,
            } => {
                bar.inc(1);
                let how = if *cached { " (cached)" } else { "" };
                bar.println(format!("{phase:<12} {:>6.1} s{how}", took.as_secs_f64()));
            }
            Event::Detail(text) => bar.set_message(text.clone()),
            Event::Advance { done, total } => bar.set_message(format!("{done}/{total}")),
        }
    }
}

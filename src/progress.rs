//! Progress bars on stderr: stage, what is worked on, rate, time left. Silent under --quiet or without a terminal.

use std::io::IsTerminal;
use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};
use lowbit_checkpoint::hub::HubProgress;
use lowbit_quantize::Progress;

/// Draws one bar at a time.
pub struct Bars {
    visible: bool,
    quiet: bool,
    current: Mutex<Option<ProgressBar>>,
}

impl Bars {
    /// Bars when stderr is a terminal and `quiet` is off.
    pub fn new(quiet: bool) -> Self {
        Self { visible: !quiet && std::io::stderr().is_terminal(), quiet, current: Mutex::new(None) }
    }

    fn replace(&self, bar: Option<ProgressBar>) {
        if let Ok(mut slot) = self.current.lock() {
            if let Some(old) = slot.take() {
                old.finish_and_clear();
            }
            *slot = bar;
        }
    }

    fn with(&self, f: impl Fn(&ProgressBar)) {
        if let Ok(slot) = self.current.lock()
            && let Some(bar) = slot.as_ref()
        {
            f(bar);
        }
    }

    /// Removes the bar.
    pub fn clear(&self) {
        self.replace(None);
    }

    /// A bar for work that says how much of how much is done; what was done before it began moves the bar at once.
    pub fn counting(&self, stage: &str) -> impl FnMut(usize, usize) {
        let mut before = None;
        move |done, total| {
            if before.is_none() {
                self.stage(stage, total as u64);
            }
            Progress::advance(self, (done - before.replace(done).unwrap_or(0)) as u64);
        }
    }

    fn start(&self, name: &str, total: u64, template: &str) {
        if !self.visible {
            return;
        }
        let bar = ProgressBar::new(total);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_prefix(name.to_string());
        self.replace(Some(bar));
    }
}

impl Progress for Bars {
    fn stage(&self, name: &str, total: u64) {
        self.start(name, total, "{prefix:>12} {bar:30} {pos}/{len} {per_sec:>10} {eta:>5} left  {msg}");
    }

    fn advance(&self, n: u64) {
        self.with(|b| b.inc(n));
    }

    fn detail(&self, text: &str) {
        self.with(|b| b.set_message(text.to_string()));
    }

    fn say(&self, text: &str) {
        self.clear();
        if !self.quiet {
            crate::exit::talk(text);
        }
    }
}

impl HubProgress for Bars {
    fn start(&self, file: &str, bytes: u64) {
        Bars::start(self, file, bytes, "{prefix:>24} {bar:30} {bytes}/{total_bytes} {bytes_per_sec:>12} {eta:>5} left");
    }

    fn advance(&self, bytes: u64) {
        self.with(|b| b.inc(bytes));
    }

    fn finish(&self) {
        self.clear();
    }
}

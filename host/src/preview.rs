//! Evaluation without effect: what plugins would decide, for authors and operators.
//!
//! [`dry_run`] runs given events through the active plugins and reports whom they would reach;
//! [`runner`] runs one plugin alone on given events; [`backtest`] runs a candidate on past events
//! and compares its decisions with the recorded ones. Nothing here commits or counts towards the
//! health of an active plugin.

pub mod backtest;
pub mod dry_run;
pub mod runner;

//! Evaluation without effect: what plugins would decide, for authors and operators.
//!
//! [`runner`] runs one plugin alone on given events; [`backtest`] runs a candidate on past events and
//! compares its decisions with the recorded ones. Nothing here commits or counts towards the health of
//! an active plugin.

pub mod backtest;
pub mod runner;

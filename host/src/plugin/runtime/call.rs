//! One call of a plugin: its input, its answer, and the errors.

use serde::Serialize;

use super::selection::Document;
use crate::event::{Event, Plan, Priority};

/// Attempts per event for a plugin that fails; the last one uses a fresh instance.
pub(crate) const ATTEMPTS: u32 = 2;

/// Why a call returned no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The call exceeded its CPU time.
    #[error("{0}")]
    Deadline(String),
    /// The instance requested more memory than its limit.
    #[error("{0}")]
    Memory(String),
    /// The guest trapped, mostly because of a panic.
    #[error("{0}")]
    Trap(String),
    /// The answer, or something that the guest did, is invalid.
    #[error("{0}")]
    InvalidOutput(String),
    /// The host has no memory for the instance. Says nothing about the event or the plugin: the
    /// event waits.
    #[error("{0}")]
    HostMemory(String),
    /// The plugin rejected the event and would do so again.
    #[error("{0}")]
    Rejected(String),
    /// The plugin cannot decide now and requests a retry.
    #[error("{0}")]
    Retry(String),
}

impl CallError {
    /// The label in metrics; for a verdict, also the word in decision records.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Deadline(_) => "deadline",
            Self::Memory(_) => "memory",
            Self::Trap(_) => "trap",
            Self::InvalidOutput(_) => "invalid_output",
            Self::HostMemory(_) => "host_memory",
            Self::Rejected(_) => "rejected",
            Self::Retry(_) => "retry",
        }
    }

    /// Whether this is the plugin's verdict on the event and not a failure of the plugin. Calling
    /// again immediately would return the same verdict.
    pub const fn is_verdict(&self) -> bool {
        matches!(self, Self::Rejected(_) | Self::Retry(_))
    }
}

/// The export that a call uses. A plugin may have both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Filter,
    Router,
}

/// The answer of a plugin.
#[derive(Clone, Debug)]
pub enum Answer {
    Keep,
    /// Holds the reason.
    Drop(String),
    Amend(Box<Amended>),
    Routes(Plan),
}

/// An event as amended by a filter.
#[derive(Clone, Debug)]
pub struct Amended {
    pub event: Event,
    /// `None`: unchanged.
    pub priority: Option<Priority>,
}

/// One event on its way through all plugins.
#[derive(Debug)]
pub struct Call<'a> {
    pub event: &'a Event,
    pub priority: Priority,
    /// The clock shown to the plugin, in milliseconds since the Unix epoch.
    pub clock_ms: u64,
    pub payload: &'a ParsedPayload,
}

/// The payload of an event, parsed at most once for all plugins, when one of them reads a field.
#[derive(Debug, Default)]
pub struct ParsedPayload(pub(super) Document);

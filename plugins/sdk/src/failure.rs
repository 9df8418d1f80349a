//! Why a plugin cannot decide about an event.

use std::fmt;

use crate::bindings::lifecycle::pointsman::plugin::types;

/// Why a plugin cannot decide about an event. The text names the problem and the fix; it becomes the
/// reason that the operator sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Permanent: the event is dead-lettered immediately.
    Reject(String),
    /// Temporary: the host may present the event again.
    Retry(String),
}

/// Only the text. The type that wit-bindgen generates would print `Failure::Reject("...")`.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reject(reason) | Self::Retry(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for types::Failure {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Reject(reason) => Self::Reject(reason),
            Failure::Retry(reason) => Self::Retry(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_displayed_as_its_reason() {
        let reason = "the order has no owner; set /order/owner";
        for failure in [
            Failure::Reject(reason.into()),
            Failure::Retry(reason.into()),
        ] {
            assert_eq!(failure.to_string(), reason);
        }
    }
}

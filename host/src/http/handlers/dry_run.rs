//! `POST /v1/events?dry_run=true`: answers with the results of [`preview::dry_run`].
//!
//! [`preview::dry_run`]: crate::preview::dry_run

use crate::broker::Logs;
use crate::event::{Event, Malformed, PartitionNumber};
use crate::http::{ApiError, State};
use crate::preview::dry_run::{self, DryRunError, DryRunResult};

/// Runs events through the pipeline without storing them, in order. Each comes with the partition
/// that it would be appended to.
pub(in crate::http) async fn dry_run(
    state: &State,
    broker: &dyn Logs,
    events: Vec<Result<(Event, PartitionNumber), Malformed>>,
) -> Result<Vec<DryRunResult>, ApiError> {
    Ok(dry_run::dry_run(state.pipeline()?, broker, events).await?)
}

impl From<DryRunError> for ApiError {
    fn from(error: DryRunError) -> Self {
        match error {
            DryRunError::Unevaluated(reason) => Self::unavailable(reason.to_string())
                .fix("GET /readyz on the admin listener shows how"),
            DryRunError::TooSlow => {
                Self::overloaded(error.to_string()).fix("send fewer events at once")
            }
            DryRunError::Broker(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use axum::response::IntoResponse as _;

    use super::*;

    #[test]
    fn a_dry_run_that_takes_too_long_is_refused_with_503() {
        let response = ApiError::from(DryRunError::TooSlow).into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}

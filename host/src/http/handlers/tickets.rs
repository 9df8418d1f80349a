//! `POST /v1/tickets`: exchanges a token for a ticket, which opens one stream within 30 seconds
//! (`GET /v1/stream?ticket=`), for pages that can send neither a header nor a cookie there.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State as Shared};
use axum::http::StatusCode;
use serde::Serialize;

use crate::auth::{self, StreamIdentity, Ticket};
use crate::http::{ApiError, State};

/// How long a ticket is valid.
const TTL: Duration = Duration::from_secs(30);

/// A ticket as issued.
#[derive(Debug, Serialize)]
pub(in crate::http) struct Issued {
    ticket: String,
    /// Seconds.
    expires_in: u64,
}

/// Issues a ticket for the user of the request.
///
/// # Errors
/// 401 or 403 for a missing or invalid token, 503 while the broker is unavailable.
pub(in crate::http) async fn issue(
    Shared(state): Shared<Arc<State>>,
    request: Request,
) -> Result<(StatusCode, Json<Issued>), ApiError> {
    let (parts, _) = request.into_parts();
    let credentials = state.auth().credentials(&parts)?;
    state.auth().identify(&credentials).await?;
    let ticket = Ticket::new()
        .map_err(|_| ApiError::internal("this machine has no random numbers for a ticket"))?;
    let (id, sealed) = (ticket.id(), ticket.seal(&credentials));
    let stored = state.broker()?.store_ticket(&id, sealed, TTL);
    let stored = tokio::time::timeout(state.limits.read_wait, stored).await;
    stored.map_err(|_| ApiError::unavailable("the broker did not answer in time"))??;
    let issued = Issued {
        ticket: ticket.text(),
        expires_in: TTL.as_secs(),
    };
    Ok((StatusCode::CREATED, Json(issued)))
}

/// Takes a ticket from the broker, so that it counts once, and returns the identity of the request
/// for which it was issued. `None`: the broker does not answer.
///
/// # Errors
/// The ticket is unknown, or the token behind it is no longer valid.
pub(super) async fn redeem(
    state: &State,
    ticket: &str,
) -> Result<Option<StreamIdentity>, auth::Error> {
    let refused = || {
        let text =
            "the ticket is unknown, was used or has expired; get a new one by POST /v1/tickets";
        auth::Error::Invalid(text.to_owned())
    };
    let ticket = Ticket::parse(ticket).ok_or_else(refused)?;
    let Some(broker) = state.broker.get() else {
        return Ok(None);
    };
    let id = ticket.id();
    let taken = tokio::time::timeout(state.limits.read_wait, broker.take_ticket(&id)).await;
    let sealed = match taken {
        Ok(Ok(sealed)) => sealed.ok_or_else(refused)?,
        failed => {
            tracing::debug!(
                ?failed,
                "cannot take a ticket; the client is asked to reconnect"
            );
            return Ok(None);
        }
    };
    let credentials = ticket.open(&sealed).ok_or_else(refused)?;
    state.auth().identify(&credentials).await.map(Some)
}

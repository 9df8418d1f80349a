//! `/v1/groups/{group}/members/{user}`: group membership.
//!
//! After a 2xx to PUT, events published from then on reach the member; after a 2xx to DELETE, they
//! do not. Events committed between joining and leaving are still delivered. `broker` defines the
//! stored membership.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract;
use axum::http::StatusCode;
use http_body::Body as _;
use serde::Serialize;

use crate::broker::RecipientChange;
use crate::event::Name;
use crate::http::extract::{ApiKey, Path};
use crate::http::{ApiError, State};

#[derive(Debug, Serialize)]
pub(in crate::http) struct Membership {
    group: Name,
    user: Name,
}

pub(in crate::http) async fn join(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path((group, user)): Path<(Name, Name)>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    // Reserved for future membership options; accepting and ignoring a body would be a promise.
    if body.size_hint().lower() > 0 {
        return Err(
            ApiError::bad_request("a membership has no body").fix("send PUT with an empty body")
        );
    }
    state
        .broker()?
        .change_recipient(&user, RecipientChange::Join { group })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(in crate::http) async fn leave(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path((group, user)): Path<(Name, Name)>,
) -> Result<StatusCode, ApiError> {
    state
        .broker()?
        .change_recipient(&user, RecipientChange::Leave { group })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(in crate::http) async fn show(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path((group, user)): Path<(Name, Name)>,
) -> Result<Json<Membership>, ApiError> {
    let recipient = state.broker()?.recipient(&user).await?;
    // The spans of a former member are kept to replay events that were committed before leaving.
    let is_member = recipient
        .groups
        .get(&group)
        .is_some_and(|spans| spans.values().any(|span| span.left.is_none()));
    if is_member {
        Ok(Json(Membership { group, user }))
    } else {
        Err(ApiError::not_found(
            "this user is not a member of this group",
        ))
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use serde_json::json;

    use crate::broker::fake::FakeBroker;
    use crate::http::site::Site;

    #[tokio::test]
    async fn members_can_join_be_shown_and_leave() {
        let site = Site::dev(FakeBroker::default());
        let path = "/v1/groups/ops%20team/members/ann";
        assert_eq!(
            site.request("GET", path, &[], "").await.0,
            StatusCode::NOT_FOUND
        );
        for _ in 0..2 {
            assert_eq!(
                site.request("PUT", path, &[], "").await.0,
                StatusCode::NO_CONTENT
            );
        }
        let (status, _, body) = site.request("GET", path, &[], "").await;
        assert_eq!(
            (status, body),
            (
                StatusCode::OK,
                json!({ "group": "ops team", "user": "ann" })
            )
        );
        for _ in 0..2 {
            assert_eq!(
                site.request("DELETE", path, &[], "").await.0,
                StatusCode::NO_CONTENT
            );
        }
        assert_eq!(
            site.request("GET", path, &[], "").await.0,
            StatusCode::NOT_FOUND
        );
    }

    #[tokio::test]
    async fn joining_with_a_body_is_refused() {
        let site = Site::dev(FakeBroker::default());
        assert_eq!(
            site.request("PUT", "/v1/groups/ops/members/ann", &[], "{}")
                .await
                .0,
            StatusCode::BAD_REQUEST
        );
    }
}

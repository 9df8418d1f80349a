//! Publishers: `POST /v1/events`, as an application uses it, and `XADD`, as a service with access
//! to Redis uses it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::http::{self, Answer};

/// A CloudEvent with the source `/tests`, an id and a type, plus the attributes (or `data`) in the
/// JSON object `more`.
///
/// # Panics
/// If `more` is not an object.
pub(crate) fn event(id: &str, kind: &str, more: Value) -> Value {
    let mut event = json!({ "specversion": "1.0", "id": id, "source": "/tests", "type": kind });
    let members = event.as_object_mut().expect("the event is an object");
    members.extend(more.as_object().expect("`more` is an object").clone());
    event
}

/// Publishes by `POST /v1/events`.
#[derive(Clone, Debug)]
pub(crate) struct Publisher {
    url: String,
}

impl Publisher {
    pub(crate) fn new(addr: SocketAddr) -> Self {
        Self {
            url: format!("http://{addr}/v1/events"),
        }
    }

    /// Posts a batch once.
    ///
    /// # Errors
    /// If there is no response; the batch may or may not be stored then.
    pub(crate) fn try_publish(&self, events: &[Value]) -> Result<Answer, ureq::Error> {
        let body = serde_json::to_vec(events).expect("JSON");
        http::send(
            "POST",
            &self.url,
            &[("Content-Type", "application/cloudevents-batch+json")],
            Some(&body),
        )
    }

    /// Posts a batch.
    ///
    /// # Panics
    /// If one of its events is not stored.
    pub(crate) fn publish(&self, events: &[Value]) {
        let answer = self
            .try_publish(events)
            .unwrap_or_else(|error| panic!("POST /v1/events: {error}"));
        assert_stored(&answer, events.len());
    }

    /// Posts a batch until it is stored, as a publisher must that may lose nothing: after a lost or
    /// retryable response (429, 5xx) it sends the same events again with the same ids.
    ///
    /// # Panics
    /// If the batch is rejected permanently or not stored in time.
    pub(crate) fn publish_surely(&self, events: &[Value], within: Duration) {
        let deadline = Instant::now() + within;
        loop {
            match self.try_publish(events) {
                Ok(answer) if (200..300).contains(&answer.status) => {
                    return assert_stored(&answer, events.len());
                }
                Ok(answer) if answer.status != 429 && answer.status < 500 => {
                    panic!("POST /v1/events: {answer:?}")
                }
                failure => assert!(
                    Instant::now() < deadline,
                    "POST /v1/events keeps failing for {within:?}: {failure:?}"
                ),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Checks each receipt, because a batch with status 2xx may contain an event that was rejected
/// permanently.
fn assert_stored(answer: &Answer, n_events: usize) {
    assert!(
        (200..300).contains(&answer.status),
        "POST /v1/events: {answer:?}"
    );
    let receipts = answer.json();
    let stored = receipts["events"].as_array().map(|all| {
        all.iter()
            .filter(|receipt| receipt["status"] == "stored")
            .count()
    });
    assert_eq!(stored, Some(n_events), "POST /v1/events: {answer:?}");
}

/// Appends entries to a source with `XADD`, in order and in one round trip, and returns their ids.
///
/// # Panics
/// If Redis rejects one.
pub(crate) fn xadd(
    connection: &mut redis::Connection,
    source: &str,
    entries: &[Vec<(&str, String)>],
) -> Vec<String> {
    let mut pipeline = redis::pipe();
    for fields in entries {
        pipeline.cmd("XADD").arg(source).arg("*");
        for (name, value) in fields {
            pipeline.arg(*name).arg(value);
        }
    }
    pipeline
        .query(connection)
        .unwrap_or_else(|error| panic!("XADD {source}: {error}"))
}

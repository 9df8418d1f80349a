//! How a node reaches its broker, and what it says of it afterwards: readiness is kept true to the broker, whatever becomes of it.
//!
//! Nothing here stops anything. Ingest and streams go through an outage by themselves; this is for whoever asks how the node is.

use std::sync::Arc;
use std::time::Duration;

use crate::broker::{self, Broker, Severity};
use crate::hub::Hub;
use crate::metrics::{Metrics, SourceLabel};
use crate::readiness::Readiness;
use crate::shutdown::Shutdown;

/// How long between two looks at the broker's health.
const CHECK_EVERY: Duration = Duration::from_secs(2);

/// The longest pause between two attempts to reach the broker.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// Tries `connect` until it succeeds. Cancel-safe.
pub(crate) async fn reach<F: Future<Output = broker::Result<Arc<dyn Broker>>>>(
    mut connect: impl FnMut() -> F,
    readiness: &Readiness,
) -> Arc<dyn Broker> {
    let mut pause = Duration::from_millis(100);
    loop {
        match connect().await {
            Ok(broker) => return broker,
            Err(error) => readiness.set("broker", error.to_string()),
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Keeps readiness and the gauges of the sources true to the broker: red while it is away, silent or refuses, a line for each finding.
pub(crate) async fn watch(broker: Arc<dyn Broker>, hub: Hub, metrics: Metrics, readiness: Readiness, shutdown: Shutdown) {
    loop {
        look(broker.as_ref(), &readiness).await;
        for partition in broker.partitions() {
            if let Ok(state) = broker.state(partition.number).await {
                let lag = i64::try_from(state.lag).unwrap_or(i64::MAX);
                metrics.source_lag.get_or_create(&SourceLabel { source: partition.source.clone() }).set(lag);
            }
        }
        tokio::select! {
            () = tokio::time::sleep(CHECK_EVERY) => {}
            () = shutdown.begun() => return,
        }
        // Only now: at the first look, the first tick may be on its way.
        match hub.silent().as_slice() {
            [] => readiness.clear("feed"),
            silent => readiness.set(
                "feed",
                format!(
                    "{} of {} partitions are silent; streams replay when they are heard again",
                    silent.len(),
                    broker.partitions().len()
                ),
            ),
        }
    }
}

/// One look at the broker.
async fn look(broker: &dyn Broker, readiness: &Readiness) {
    let findings = match broker.check().await {
        Ok(findings) => findings,
        Err(error) => return readiness.set("broker", error.to_string()),
    };
    readiness.clear("broker");
    for (n, finding) in findings.iter().enumerate() {
        match finding.severity {
            Severity::Refusal => readiness.set(&format!("broker.{n}"), &finding.text),
            Severity::Warning => readiness.warn(&format!("broker.{n}"), &finding.text),
        }
    }
    readiness
        .retain("broker.", |name| name.strip_prefix("broker.").and_then(|n| n.parse().ok()).is_some_and(|n: usize| n < findings.len()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::{Error, Finding};
    use crate::http::fake::FakeBroker;

    #[tokio::test]
    async fn a_broker_that_is_away_at_the_start_is_tried_again_and_told_of() {
        let readiness = Readiness::default();
        let mut answers = vec![Ok(Arc::new(FakeBroker::default()) as Arc<dyn Broker>), Err(Error::Away("connection refused".into()))];
        reach(|| std::future::ready(answers.pop().unwrap()), &readiness).await;
        assert_eq!(readiness.report().lines, ["broker: the broker is away: connection refused"]);
    }

    #[tokio::test]
    async fn readiness_follows_what_the_broker_finds() {
        let readiness = Readiness::default();
        let finding = |severity, text: &str| Finding { severity, text: text.into() };
        let eviction = finding(Severity::Refusal, "maxmemory-policy is allkeys-lru: CONFIG SET maxmemory-policy noeviction");
        let volatile = finding(Severity::Warning, "the append-only file is off: CONFIG SET appendonly yes");
        look(&FakeBroker::default().with_findings(vec![eviction.clone(), volatile.clone()]), &readiness).await;
        let report = readiness.report();
        assert!(!report.is_ready);
        assert_eq!(report.lines, [format!("broker.0: {}", eviction.text), format!("warning: broker.1: {}", volatile.text)]);

        look(&FakeBroker::default().with_findings(vec![volatile.clone()]), &readiness).await;
        let report = readiness.report();
        assert!(report.is_ready);
        assert_eq!(report.lines, [format!("warning: broker.0: {}", volatile.text)]);

        look(&FakeBroker::failing(|| Error::Away("no answer in 2 s".into())), &readiness).await;
        assert_eq!(readiness.report().lines[0], "broker: the broker is away: no answer in 2 s");
        look(&FakeBroker::default(), &readiness).await;
        assert!(readiness.report().lines.is_empty());
    }
}

//! Telemetry: [`metrics`] for Prometheus, and [`readiness`] for load balancers and operators.

pub mod metrics;
pub mod readiness;

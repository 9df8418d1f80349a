//! Delivery: from an event that a node accepted to the bytes on a stream, also under faults and
//! load.

mod authorization;
mod bridge;
mod clocks;
mod cloudevents;
mod connections;
mod devices;
mod durability;
mod embedded;
mod exhaustion;
mod groups;
mod hardening;
mod installations;
mod lone_outage;
mod malformed_input;
mod outage;
mod payload_alone;
mod plain_json;
mod position;
mod priority;
mod resource_limits;
mod resume;
mod stability;
mod tls;
mod turns;
mod wire;

//! Formats decisions for `explain` and `publish --dry-run`: a plugin's verdict, a route of a plan.
//!
//! The input is the node's JSON response. Fields that this version does not know, or that are
//! missing, are left out rather than causing an error.

use pointsman::event::{VerdictKind, rfc3339};
use serde_json::Value;

/// Maximum number of targets shown per route.
const MAX_TARGETS: usize = 5;

/// A line with a label in the first column.
pub(in crate::cli) fn line(label: &str, what: &str) -> String {
    format!("{label:<11}{what}")
}

/// A plugin's verdict, with generation, hashes of file and configuration, and reason.
pub(in crate::cli) fn verdict(verdict: &Value) -> String {
    let (generation, hash) = (
        &verdict["generation"],
        verdict["hash"]
            .as_str()
            .map(|hash| format!(", {hash}"))
            .unwrap_or_default(),
    );
    let config = verdict["config_hash"]
        .as_str()
        .map(|hash| format!(", config {hash}"))
        .unwrap_or_default();
    let (plugin, reason) = (text(&verdict["plugin"]), &verdict["reason"]);
    let verdict = text(&verdict["verdict"]);
    let reason = reason
        .as_str()
        .or((verdict == VerdictKind::Skipped.as_str()).then_some("its types do not match"));
    let reason = reason
        .map(|reason| format!(": {reason}"))
        .unwrap_or_default();
    format!(
        "{} (generation {generation}{hash}{config}) {verdict}{reason}",
        plugin
    )
}

pub(in crate::cli) fn route(route: &Value) -> String {
    let to: Vec<String> = list(&route["to"])
        .iter()
        .take(MAX_TARGETS)
        .map(text)
        .collect();
    let more = list(&route["to"]).len().saturating_sub(MAX_TARGETS);
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    let mut line = format!(
        "by {} to {}{more}, {}",
        text(&route["by"]),
        to.join(" "),
        text(&route["priority"])
    );
    if let Some(any_of) = route["when"].as_array() {
        let clauses: Vec<String> = any_of
            .iter()
            .map(|clause| {
                list(clause)
                    .iter()
                    .map(test)
                    .collect::<Vec<_>>()
                    .join(" and ")
            })
            .collect();
        line += &format!(", if {}", clauses.join(" or "));
    }
    if let Some(ms) = route["expires_ms"].as_u64() {
        line += &format!(", until {}", rfc3339(ms));
    }
    for (key, label) in [
        ("collapse", "with the collapse key"),
        ("event_name", "as the event"),
    ] {
        if let Some(name) = route[key].as_str() {
            line += &format!(", {label} {name}");
        }
    }
    line
}

fn test(test: &Value) -> String {
    let values: Vec<String> = list(&test["values"])
        .iter()
        .map(ToString::to_string)
        .collect();
    [
        text(&test["attribute"]),
        text(&test["operator"]),
        values.join(", "),
    ]
    .join(" ")
    .trim_end()
    .to_owned()
}

pub(in crate::cli) fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

pub(in crate::cli) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_route_is_formatted_as_one_line() {
        let planned = json!({
            "by": "rules", "to": ["g:ops", "all"], "priority": "high", "expires_ms": 1_795_335_532_612_u64, "collapse": "k", "event_name": "n",
            "when": [[{ "attribute": "plan", "operator": "equals", "values": ["pro"] }, { "attribute": "beta", "operator": "present" }],
                     [{ "attribute": "age", "operator": "one-of", "values": [1, 2] }]],
        });
        assert_eq!(
            route(&planned),
            "by rules to g:ops all, high, if plan equals \"pro\" and beta present or age one-of 1, 2, until 2026-11-22T08:18:52.612Z, \
             with the collapse key k, as the event n"
        );
    }
}

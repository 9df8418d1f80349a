//! `docs/configuration.md` and `docs/metrics.md` match the binary: the configuration page has every
//! key with its default, variable and option, and the metrics page has every series of a node.
//!
//! That every metric is documented, also those which need a failure to appear, is a unit test of
//! `telemetry::metrics`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use pointsman::config::{Layers, OPTIONS, RawConfig};
use pointsman::duration;
use pointsman::plugin::registry::settings::Settings;
use serde_json::json;
use toml::{Table, Value};

use crate::harness::command::{output_of, pointsman};
use crate::harness::eventually;
use crate::harness::node::{Node, SOON};
use crate::harness::publish::event;
use crate::harness::repository;

/// The tables of a page below their headings, as cells without the header rows.
fn tables(page: &str) -> Vec<(String, Vec<Vec<String>>)> {
    let path = repository().join(page);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut tables: Vec<(String, Vec<Vec<String>>)> = Vec::new();
    let mut heading = String::new();
    let mut is_in_table = false;
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            title.clone_into(&mut heading);
        }
        let Some(row) = line
            .strip_prefix('|')
            .and_then(|rest| rest.strip_suffix('|'))
        else {
            is_in_table = false;
            continue;
        };
        let cells = row.split('|').map(|cell| cell.trim().to_owned()).collect();
        if !is_in_table {
            tables.push((heading.clone(), Vec::new()));
            is_in_table = true;
        }
        let (_, rows) = tables.last_mut().expect("pushed above");
        rows.push(cells);
    }
    for (_, rows) in &mut tables {
        assert!(rows.len() > 2, "a table of {page} has no rows");
        rows.remove(1);
    }
    tables
}

/// The text of a cell that is one code span.
fn code(cell: &str) -> Option<&str> {
    let inner = cell.strip_prefix('`')?.strip_suffix('`')?;
    (!inner.contains('`')).then_some(inner)
}

/// A documented key.
#[derive(Debug)]
struct Key {
    /// As in TOML; `None`: it has no default.
    default: Option<Value>,
    is_duration: bool,
    variable: Option<String>,
    option: Option<String>,
}

/// The documented keys by section and key; `plugins.NAME` is a section.
fn documented_keys() -> BTreeMap<(String, String), Key> {
    let mut keys = BTreeMap::new();
    for (heading, rows) in tables("docs/configuration.md") {
        let Some(section) =
            code(&heading).and_then(|name| name.strip_prefix('[')?.strip_suffix(']'))
        else {
            continue;
        };
        let (names, rows) = rows.split_first().expect("a header");
        for row in rows {
            assert_eq!(row.len(), names.len(), "{section}: {row:?}");
            let cell = |name: &str| {
                let at = names.iter().position(|column| column == name)?;
                code(&row[at])
            };
            let key = cell("key").unwrap_or_else(|| panic!("{section}: {row:?}"));
            let default = cell("default").map(|text| {
                let table: Table = format!("x = {text}")
                    .parse()
                    .unwrap_or_else(|e| panic!("{section}.{key}: {e}"));
                table["x"].clone()
            });
            let key_is_new = keys.insert(
                (section.to_owned(), key.to_owned()),
                Key {
                    default,
                    is_duration: row[1].starts_with("duration"),
                    variable: cell("environment").map(str::to_owned),
                    option: cell("option").map(str::to_owned),
                },
            );
            assert!(key_is_new.is_none(), "{section}.{key} is documented twice");
        }
    }
    keys
}

/// The keys that `pointsman config --defaults` prints, with their defaults; `None`: commented out.
fn printed_keys() -> BTreeMap<(String, String), Option<Value>> {
    let text = output_of(&mut pointsman(&["config", "--defaults"]));
    let sections: Table = text.parse().expect("TOML");
    let mut keys = BTreeMap::new();
    let mut section = String::new();
    for line in text.lines() {
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            name.clone_into(&mut section);
        }
        let commented = line.strip_prefix("# ");
        let Some((key, _)) = commented.unwrap_or(line).split_once(" = ") else {
            continue;
        };
        if !key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
            continue;
        }
        let default = match commented {
            None => Some(sections[&section][key].clone()),
            Some(_) => None,
        };
        keys.insert((section.clone(), key.to_owned()), default);
    }
    // The table of a plugin, which is printed as a sample only.
    let settings = Table::try_from(Settings::default()).expect("a table");
    let settings = settings.into_iter().map(|(key, value)| (key, Some(value)));
    let rest = [
        ("sha256".to_owned(), None),
        ("config".to_owned(), Some(Table::new().into())),
    ];
    for (key, default) in settings.chain(rest) {
        assert!(
            text.contains(&format!("#     {key} = ")),
            "config --defaults does not print plugins.NAME.{key}"
        );
        keys.insert(("plugins.NAME".to_owned(), key), default);
    }
    for (key, default) in bridge_keys() {
        assert!(
            text.contains(&format!("#     {key} = ")),
            "config --defaults does not print bridge.{key}"
        );
        keys.insert(("[bridge]".to_owned(), key), default);
    }
    keys
}

/// The keys of a `[[bridge]]` table, with their defaults.
fn bridge_keys() -> Vec<(String, Option<Value>)> {
    let error = toml::from_str::<RawConfig>("[[bridge]]\nno_such_key = 1").unwrap_err();
    let keys = error.message().split('`').skip(3).step_by(2);
    keys.map(|key| {
        let default = match key {
            "sharded" => Some(false.into()),
            "attributes" => Some(Table::new().into()),
            _ => None,
        };
        (key.to_owned(), default)
    })
    .collect()
}

#[test]
fn the_configuration_page_has_every_key_with_its_default_variable_and_option() {
    let (documented, printed) = (documented_keys(), printed_keys());
    let names = |keys: Vec<&(String, String)>| keys.into_iter().cloned().collect::<BTreeSet<_>>();
    assert_eq!(
        names(documented.keys().collect()),
        names(printed.keys().collect())
    );
    for ((section, key), documented) in &documented {
        let name = format!("{section}.{key}");
        let default = &printed[&(section.clone(), key.clone())];
        // A text such as "7d" and "168h" is the same duration.
        let comparable = |value: &Option<Value>| match value {
            Some(Value::String(text)) if documented.is_duration => Some(
                duration::parse(text)
                    .unwrap_or_else(|e| panic!("{name}: {e}"))
                    .as_millis(),
            )
            .map(|ms| format!("{ms} ms")),
            value => value.as_ref().map(ToString::to_string),
        };
        assert_eq!(
            comparable(&documented.default),
            comparable(default),
            "the default of {name}"
        );
        // Tables of plugins are in the file only.
        if ["plugins.NAME", "[bridge]"].contains(&section.as_str()) {
            assert_eq!((&documented.variable, &documented.option), (&None, &None));
            continue;
        }
        let option = OPTIONS
            .iter()
            .find(|(_, set)| *set == name)
            .map(|(name, _)| *name);
        assert_eq!(
            documented.option,
            option.map(|option| format!("--{option}")),
            "the option of {name}"
        );
        let word = option.map_or_else(
            || format!("{section}_{key}"),
            |option| option.replace('-', "_"),
        );
        let variable = format!("POINTSMAN_{}", word.to_ascii_uppercase());
        assert_eq!(documented.variable.as_deref(), Some(variable.as_str()));
        // The variable sets this key: a value of the wrong type is refused in its name.
        let wrong = if documented.is_duration { "5" } else { "" };
        if !wrong.is_empty() {
            let error = Layers::default()
                .environment([(variable.clone(), wrong.to_owned())])
                .expect_err("a bare number")
                .to_string();
            assert!(
                error.starts_with(&format!(
                    "{variable}: {name}: 5 has no unit; write \"5ms\", \"5s\""
                )),
                "{error}"
            );
        }
    }
}

#[test]
fn the_configuration_page_has_the_variables_of_the_commands() {
    let tables = tables("docs/configuration.md");
    let (_, rows) = tables
        .iter()
        .find(|(heading, _)| heading == "Variables of the commands")
        .expect("the section");
    let documented: BTreeSet<(String, String)> = rows[1..]
        .iter()
        .map(|row| {
            (
                code(&row[0]).expect("code").to_owned(),
                code(&row[1]).expect("code").to_owned(),
            )
        })
        .collect();
    let commands: [&[&str]; 8] = [
        &["publish"],
        &["tail"],
        &["dead-letters", "list"],
        &["explain"],
        &["events", "export"],
        &["plugin", "list"],
        &["plugin", "upload"],
        &["plugin", "backtest"],
    ];
    let mut found = BTreeSet::new();
    for command in commands {
        let help = output_of(&mut pointsman(&[command, &["--help"]].concat()));
        let mut option = String::new();
        for line in help.lines() {
            if let Some(at) = line.find("--") {
                option = line[at..]
                    .split([' ', ','])
                    .next()
                    .unwrap_or_default()
                    .to_owned();
            }
            if let Some((_, rest)) = line.split_once("[env: ") {
                let variable = rest.split(['=', ']']).next().unwrap_or_default();
                found.insert((variable.to_owned(), option.clone()));
            }
        }
    }
    assert_eq!(found, documented);
}

/// A documented metric: its type, and for each label the values that the page lists.
struct Metric {
    kind: String,
    labels: BTreeMap<String, BTreeSet<String>>,
}

/// The code spans of a text.
fn spans(text: &str) -> impl Iterator<Item = String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned)
}

fn documented_metrics() -> BTreeMap<String, Metric> {
    let tables = tables("docs/metrics.md");
    let (reasons, metrics): (Vec<_>, Vec<_>) = tables
        .into_iter()
        .partition(|(_, rows)| rows[0][0] == "`reason`");
    let reasons: BTreeSet<String> = reasons
        .iter()
        .flat_map(|(_, rows)| rows[1..].iter().flat_map(|row| spans(&row[0])))
        .collect();
    let rows = metrics
        .into_iter()
        .flat_map(|(_, mut rows)| rows.split_off(1));
    rows.map(|row| {
        let name = code(&row[0]).expect("a name").to_owned();
        let labels = row[2].split(';').filter_map(|part| {
            let mut words = spans(part);
            let label = words.next()?;
            let mut values: BTreeSet<String> = words.collect();
            if part.contains("see below") {
                values.extend(reasons.clone());
            }
            // An optional label and a list of values look alike but for the colon.
            let has_values = part.contains(':') && !part.contains("optional");
            Some((
                label,
                if has_values || part.contains("see below") {
                    values
                } else {
                    BTreeSet::new()
                },
            ))
        });
        let kind = row[1].split(',').next().unwrap_or_default().to_owned();
        (
            name,
            Metric {
                kind,
                labels: labels.collect(),
            },
        )
    })
    .collect()
}

#[test]
fn the_metrics_page_has_every_series_of_a_node() {
    let node = Node::builder().data().start();
    let mut stream = node.stream("1");
    let publisher = node.publisher();
    publisher.publish(&[
        event("one", "t", json!({ "user": "1" })),
        event("two", "t", json!({})),
    ]);
    publisher.publish(&[event("one", "t", json!({ "user": "1" }))]);
    assert_eq!(stream.next_notification(SOON).id, "one");
    node.await_outcomes(3, SOON);
    for path in ["/v1/nothing", "/v1/dead-letters?limit=x"] {
        assert!(node.request("GET", path).status >= 400);
    }
    // Read from the broker every two seconds.
    let page = eventually(SOON, "metrics of the broker", || {
        Some(node.admin("/metrics").body)
            .filter(|page| page.contains("pointsman_source_lag_entries{"))
    });
    let documented = documented_metrics();
    let mut types = BTreeMap::new();
    let mut n_series = 0;
    for line in page.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' ')) {
            types.insert(name.to_owned(), kind.to_owned());
        }
        if line.starts_with('#') {
            continue;
        }
        n_series += 1;
        let (series, _) = line.rsplit_once(' ').expect("a value");
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        // A histogram has three series.
        let name = ["_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|suffix| name.strip_suffix(suffix))
            .find(|base| types.get(*base).is_some_and(|kind| kind == "histogram"))
            .unwrap_or(name);
        let metric = documented
            .get(name)
            .unwrap_or_else(|| panic!("docs/metrics.md does not have {name}"));
        let base = name.trim_end_matches("_total").trim_end_matches("_info");
        let kind = types.get(name).or_else(|| types.get(base));
        assert_eq!(kind, Some(&metric.kind), "the type of {name}");
        for label in labels
            .trim_end_matches('}')
            .split(',')
            .filter(|label| !label.is_empty())
        {
            let (label, value) = label.split_once('=').expect("a label");
            if label == "le" {
                continue;
            }
            let values = metric.labels.get(label).unwrap_or_else(|| {
                panic!("docs/metrics.md does not have the label {label} of {name}")
            });
            let value = value.trim_matches('"');
            assert!(
                values.is_empty() || values.contains(value),
                "docs/metrics.md does not have {label}={value} of {name}"
            );
        }
    }
    assert!(n_series > 20, "{page}");
}

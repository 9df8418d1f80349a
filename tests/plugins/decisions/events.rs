//! The events of the decision test: recorded payloads of other services, and generated ones that
//! cover the edge cases of types.
//!
//! They are JSON texts, because the test distinguishes `5`, `5.0` and `"5"`, and covers large
//! integers and duplicate members.

use std::fs;
use std::path::Path;
use std::process::Command;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use crate::harness::repository;

/// Returns the webhook examples contributed by GitHub users (npm `@octokit/webhooks-examples`,
/// MIT), which are downloaded below `target/`.
///
/// # Panics
/// If npm cannot fetch them.
pub(super) fn recorded() -> Vec<String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("webhooks-examples");
    let examples = folder.join("node_modules/@octokit/webhooks-examples/api.github.com/index.json");
    let pinned = ["package.json", "package-lock.json"].map(|file| {
        (
            folder.join(file),
            repository().join("tests/plugins/decisions").join(file),
        )
    });
    let same = |(there, here): &(_, _)| {
        fs::read(there).ok() == Some(fs::read(here).expect("read the pinned file"))
    };
    if !(examples.exists() && pinned.iter().all(same)) {
        fs::create_dir_all(&folder).expect("make a folder for npm");
        for (there, here) in &pinned {
            fs::copy(here, there).expect("copy the pinned file");
        }
        let npm = [
            "ci",
            "--silent",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
        ];
        let status = Command::new("npm").args(npm).current_dir(&folder).status();
        assert!(
            status.as_ref().is_ok_and(|status| status.success()),
            "npm ci in {}: {status:?}; `make test` installs npm",
            folder.display()
        );
    }
    let text =
        fs::read_to_string(&examples).unwrap_or_else(|e| panic!("{}: {e}", examples.display()));
    let kinds: Vec<Value> = serde_json::from_str(&text).expect("a list of kinds of webhooks");
    let of_kind = |kind: &Value| {
        let name = kind["name"].as_str().expect("a kind has a name").to_owned();
        let payloads = kind["examples"]
            .as_array()
            .expect("a kind has examples")
            .clone();
        payloads
            .into_iter()
            .map(move |payload| (name.clone(), payload))
    };
    kinds
        .iter()
        .flat_map(of_kind)
        .enumerate()
        .map(|(n, (name, payload))| wrapped(n, &name, &payload))
        .collect()
}

/// Wraps a webhook as a publisher would forward it.
fn wrapped(n: usize, name: &str, payload: &Value) -> String {
    let action = payload["action"]
        .as_str()
        .map(|action| format!(".{action}"))
        .unwrap_or_default();
    let mut event = json!({
        "specversion": "1.0", "id": format!("webhook-{n}"), "source": "https://github.example/webhooks",
        "type": format!("github.{name}{action}"), "data": payload
    });
    // Some publishers set more attributes.
    if let Some(repository) = payload["repository"]["full_name"].as_str() {
        event["subject"] = repository.into();
    }
    if n.is_multiple_of(3) && !payload["sender"]["id"].is_null() {
        event["user"] = payload["sender"]["id"].clone();
        event["a"] = payload["repository"]["id"].clone();
    }
    if n.is_multiple_of(5) {
        event["priority"] = "high".into();
        event["time"] = "2019-05-15T15:20:41Z".into();
    }
    event.to_string()
}

/// Values that the operators compare with, so that each decides both ways often enough.
const LIKELY: [&str; 11] = [
    "5",
    r#""😀""#,
    r#""5""#,
    "true",
    r#""grün""#,
    r#"["a","b"]"#,
    "100",
    "false",
    "7",
    r#""b""#,
    "9007199254740993",
];

/// Edge cases: numbers as text and texts that only resemble them, integers that a decimal cannot
/// represent, non-ASCII texts, lists, and null.
const EDGES: [&str; 56] = [
    r#""5.0""#,
    r#""05""#,
    r#""+5""#,
    r#"" 5""#,
    r#""5 ""#,
    r#""1e2""#,
    r#""1e999""#,
    r#""-5""#,
    r#""٥""#,
    r#""NaN""#,
    r#""true""#,
    r#""True""#,
    r#""""#,
    r#""gr""#,
    r#""agr""#,
    r#""Grün""#,
    r#""order-7""#,
    r#""m""#,
    r#""mm""#,
    r#""a😀""#,
    r#""😀""#,
    r#""ﾮ""#,
    r#""[1,2]""#,
    r#""[5""#,
    r#""a\"b\\c""#,
    r#""9007199254740993""#,
    r#""9223372036854775807""#,
    r#""9223372036854775808""#,
    "0",
    "-5",
    "1000",
    "9007199254740992",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "5.0",
    "5.5",
    "100.0",
    "1e2",
    "1e300",
    "1.5e-7",
    "0.1",
    "-0",
    "-0.0",
    "null",
    "[]",
    "[null]",
    "[[5]]",
    r#"["5"]"#,
    "[5.0]",
    r#"["b",5,true,null]"#,
    r#"["x","","y"]"#,
    "[9223372036854775808]",
];

/// Values that only a payload can contain.
const DEEPER: [&str; 6] = [
    r#"{"b":1,"a":[1,2.5,{"x":null}]}"#,
    "{}",
    r#"{"a":1,"a":2}"#,
    r#""two\nlines""#,
    r#"[{"login":"r"},5]"#,
    r#""\u0041\ud83d\ude00\u007f\u0001""#,
];

/// Returns `n` generated events.
pub(super) fn made(n: usize, seed: u64) -> Vec<String> {
    let mut maker = Maker(StdRng::seed_from_u64(seed));
    (0..n).map(|n| maker.event(n)).collect()
}

struct Maker(StdRng);

impl Maker {
    fn one_of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices.choose(&mut self.0).expect("there are choices")
    }

    fn value(&mut self) -> &'static str {
        if self.0.random_bool(0.5) {
            self.one_of(&LIKELY)
        } else {
            self.one_of(&EDGES)
        }
    }

    fn deep_value(&mut self) -> &'static str {
        if self.0.random_bool(0.1) {
            self.one_of(&DEEPER)
        } else {
            self.value()
        }
    }

    fn event(&mut self, n: usize) -> String {
        let mut members = vec![format!(r#""specversion":"1.0","id":"made-{n}""#)];
        let kinds = [
            "order.paid",
            "order.shipped",
            "bill.paid",
            "bill.overdue",
            "chat.line",
            "chat.join",
            "chat.ünïcode",
            "debug.x",
            "order.paid",
            "bill.sent",
            "chat.line",
            "news",
            "score.changed",
            "x.y.z",
            "a.trace",
            "t",
        ];
        members.push(format!(r#""type":"{}""#, self.one_of(&kinds)));
        members.push(format!(
            r#""source":"{}""#,
            self.one_of(&["/shop", "/shop", "/shop/eu", "/tests", "urn:x:ü"])
        ));
        let maybe = [
            (
                "subject",
                0.6,
                &["order-7", "5", "8.5", "9", "ticket/ü", "order-"][..],
            ),
            (
                "time",
                0.25,
                &["2020-02-29T23:59:59.999Z", "2099-01-01T00:00:00+02:00"],
            ),
            ("env", 0.1, &["test", "dev", "prod"]),
        ];
        for (name, chance, values) in maybe {
            if self.0.random_bool(chance) {
                members.push(format!(r#""{name}":"{}""#, self.one_of(values)));
            }
        }
        if self.0.random_bool(0.85) {
            members.push(format!(r#""a":{}"#, self.value()));
        }
        if self.0.random_bool(0.06) {
            members.push(r#""mute":true"#.to_owned());
        }
        if self.0.random_bool(0.1) {
            members.push(format!(
                r#""stop":{}"#,
                self.one_of(&["true", r#""true""#, "false", "1"])
            ));
        }
        self.address(&mut members);
        members.push(self.data());
        format!("{{{}}}", members.join(","))
    }

    /// Adds the attributes that `address` reads, most of them valid.
    fn address(&mut self, members: &mut Vec<String>) {
        let all: [(&str, f64, &[&str], &[&str]); 8] = [
            (
                "user",
                0.4,
                &["42", r#""ann""#, r#""ünï""#],
                &[r#""""#, "true", "1.5", "null"],
            ),
            (
                "users",
                0.15,
                &[r#""a, b""#, r#"["a","b"]"#, "7", r#""""#, "[]"],
                &[r#""a,,b""#, r#"["a",1]"#, r#"["a""#, "true", r#"["a",""]"#],
            ),
            ("group", 0.2, &[r#""ops""#, "5"], &[r#"" ""#, "false"]),
            (
                "groups",
                0.1,
                &[r#""x,y""#, r#"[ "x" ]"#],
                &["1.5", r#""x,""#],
            ),
            (
                "everyone",
                0.1,
                &["true", "false", r#""true""#],
                &[r#""yes""#, "1"],
            ),
            (
                "priority",
                0.3,
                &[
                    r#""low""#,
                    r#""normal""#,
                    r#""HIGH""#,
                    r#""high""#,
                    r#""Medium""#,
                    r#""urgent""#,
                ],
                &[r#""highest""#, "3"],
            ),
            (
                "ttl",
                0.2,
                &["30", r#""30""#, r#""500ms""#, r#""5m""#, r#""2h""#],
                &["0", "-1", r#""5 m""#, r#""99999999999999999h""#, "1.5"],
            ),
            ("collapse", 0.2, &[r#""k""#, "7"], &[r#""""#, "true"]),
        ];
        for (name, chance, good, bad) in all {
            if self.0.random_bool(chance) {
                let value = if self.0.random_bool(0.04) {
                    self.one_of(bad)
                } else {
                    self.one_of(good)
                };
                // This text lacks its closing bracket, so it only resembles a list. It must still
                // be a valid JSON string.
                let value = if value == r#"["a""# {
                    r#""[\"a\"""#
                } else {
                    value
                };
                members.push(format!(r#""{name}":{value}"#));
            }
        }
    }

    /// Returns the payload: usually an object, sometimes not JSON, or none.
    fn data(&mut self) -> String {
        match self.0.random_range(0..20) {
            0 => return r#""datacontenttype":"text/plain","data":"{\"v\":5}""#.to_owned(),
            1 => return r#""datacontenttype":"application/octet-stream","data_base64":"eyJ2Ijo1fQ==""#.to_owned(),
            2 => return r#""dataschema":"urn:none""#.to_owned(),
            3 => return format!(r#""data":{}"#, self.deep_value()),
            4 => return format!(r#""datacontenttype":"application/vnd.x+json; charset=utf-8","data":[{}]"#, self.deep_value()),
            _ => {}
        }
        let mut data = Vec::new();
        for (name, chance) in [
            ("v", 0.95),
            ("l", 0.4),
            ("o", 0.2),
            ("m~n", 0.2),
            ("a/b", 0.2),
        ] {
            if self.0.random_bool(chance) {
                data.push(format!(r#""{name}":{}"#, self.deep_value()));
            }
        }
        if self.0.random_bool(0.3) {
            data.push(format!(
                r#""list":[{},{}]"#,
                self.deep_value(),
                self.value()
            ));
        }
        if self.0.random_bool(0.5) {
            let m = self.one_of(&["95", "99.5", "99.6", "89.999", "\"95\""]);
            data.push(format!(
                r#""n":{{"m":{m},"t":{},"r":{}}}"#,
                self.one_of(&["1", "null"]),
                self.value()
            ));
        }
        if self.0.random_bool(0.05) {
            data.push(format!(r#""keep":{}"#, self.one_of(&["true", "false"])));
        }
        format!(r#""data":{{{}}}"#, data.join(","))
    }
}

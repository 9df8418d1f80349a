//! A test plugin without the SDK. Every string it returns tries to forge a log line, a key or a
//! frame, and some contain bytes that are not valid text. Its behaviour is selected by its
//! configuration (`describe` and `configure` are called before any event) or by the type of the
//! event.

#![expect(
    unsafe_code,
    reason = "creates an invalid string; also needed by the generated bindings"
)]

use std::cell::Cell;

use exports::pointsman::plugin::{filter, lifecycle, router};
use pointsman::plugin::log;
use pointsman::plugin::types::{
    Attribute, Criteria, Event, Failure, Operator, Target, Test, Value,
};

wit_bindgen::generate!({ path: "../../../../wit", world: "full-plugin" });

/// Tries to end a line, begin another, move a terminal's cursor and end a C string.
const FORGED: &str = "x\r\ndata: forged\u{1b}[2J\0";

struct Forger;

export!(Forger);

thread_local! {
    static IS_CONFIGURED: Cell<bool> = const { Cell::new(false) };
    static TRAPS_IN_DESCRIBE: Cell<bool> = const { Cell::new(false) };
}

/// A string of bytes that are not valid UTF-8.
fn no_text() -> String {
    // SAFETY: deliberately unsound: a host must not trust a guest to return valid text.
    unsafe { String::from_utf8_unchecked(vec![b'x', 0xff, 0xfe]) }
}

impl lifecycle::Guest for Forger {
    fn describe() -> lifecycle::Manifest {
        assert!(!TRAPS_IN_DESCRIBE.get(), "in describe");
        lifecycle::Manifest {
            name: FORGED.to_owned(),
            version: FORGED.to_owned(),
            description: FORGED.to_owned(),
            types: vec!["forge.*".to_owned()],
            reads: lifecycle::Selection {
                attributes: Vec::new(),
                fields: Vec::new(),
                payload: false,
            },
            // Checked by the host only.
            config_schema: Some(
                r#"{"properties":{"quota":{"type":"object","properties":{"limit":{"maximum":9}}}}}"#
                    .to_owned(),
            ),
            options: Vec::new(),
        }
    }

    fn configure(config: String) -> Result<(), Vec<lifecycle::Issue>> {
        log::log(log::Level::Info, FORGED);
        if config.contains("trap-in-configure") {
            panic!("in configure");
        }
        if config.contains("trap-in-describe") {
            TRAPS_IN_DESCRIBE.set(true);
        }
        if config.contains("refuse") {
            return Err(vec![lifecycle::Issue {
                path: FORGED.to_owned(),
                message: FORGED.to_owned(),
            }]);
        }
        if config.contains("no-text") {
            return Err(vec![lifecycle::Issue {
                path: String::new(),
                message: no_text(),
            }]);
        }
        IS_CONFIGURED.set(true);
        Ok(())
    }
}

impl filter::Guest for Forger {
    fn evaluate(event: Event) -> Result<filter::Verdict, Failure> {
        let amended = |name: &str, value: &str| {
            let attribute = Attribute {
                name: name.to_owned(),
                value: Value::Text(value.to_owned()),
            };
            Ok(filter::Verdict::Amend(filter::Amendment {
                priority: None,
                attributes: vec![attribute],
                options: Vec::new(),
            }))
        };
        match event.type_.as_str() {
            "forge.drop" => Ok(filter::Verdict::Drop(FORGED.to_owned())),
            "forge.attribute-name" => amended(FORGED, "x"),
            "forge.attribute-value" => amended("seen", FORGED),
            _ => Ok(filter::Verdict::Keep),
        }
    }
}

impl router::Guest for Forger {
    fn resolve(event: Event) -> Result<Vec<router::Route>, Failure> {
        let route = |target| router::Route {
            targets: vec![target],
            when: None,
            priority: None,
            ttl_ms: None,
            collapse_key: None,
            event_name: None,
            body: None,
            options: Vec::new(),
        };
        let good = || route(Target::User("nobody".to_owned()));
        let forged = || FORGED.to_owned();
        let when = |test: Test| {
            Some(Criteria {
                any_of: vec![vec![test]],
            })
        };
        let test = |attribute: String, value: String| Test {
            attribute,
            operator: Operator::Equals,
            values: vec![Value::Text(value)],
        };
        let named = |name: &str| router::Route {
            event_name: Some(name.to_owned()),
            ..good()
        };
        Ok(vec![match event.type_.as_str() {
            "forge.user" => route(Target::User(forged())),
            "forge.group" => route(Target::Group(forged())),
            "forge.collapse-key" => router::Route {
                collapse_key: Some(forged()),
                ..good()
            },
            "forge.event-name" => named(FORGED),
            "forge.body" => router::Route {
                body: Some(forged()),
                ..good()
            },
            "forge.criteria-attribute" => router::Route {
                when: when(test(forged(), "x".to_owned())),
                ..good()
            },
            "forge.criteria-value" => router::Route {
                when: when(test("plan".to_owned(), forged())),
                ..good()
            },
            "forge.reject" => return Err(Failure::Reject(forged())),
            "forge.log" => {
                log::log(log::Level::Error, FORGED);
                panic!("{FORGED}");
            }
            "forge.no-text" => router::Route {
                body: Some(no_text()),
                ..good()
            },
            "forge.100-mb" => router::Route {
                body: Some("x".repeat(100_000_000)),
                ..good()
            },
            "forge.a-million-targets" => router::Route {
                targets: vec![Target::Everyone; 1_000_000],
                ..good()
            },
            reserved => match reserved.strip_prefix("forge.reserved.") {
                Some(name) => named(name),
                None => good(),
            },
        }])
    }
}

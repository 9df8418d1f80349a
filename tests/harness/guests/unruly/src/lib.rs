//! A test plugin that treats each event as the event's type demands, mostly badly.

use std::cell::Cell;
use std::hash::{BuildHasher as _, RandomState};
use std::hint::black_box;
use std::time::Duration;

use pointsman_plugin::{
    Amendment, Attribute, Event, Failure, Filter, Interest, Issue, Operator, Plugin, Priority,
    Route, Router, Target, Test, Value, Verdict, clock, export, log,
};
use serde_json::json;

#[derive(Default, serde::Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Config {
    types: Vec<String>,
    fields: Vec<String>,
    payload: bool,
    /// Never returns from `configure`.
    hang: bool,
}

struct Unruly(Config);

export!(Unruly as filter and router);

thread_local! {
    /// The number of calls of this instance.
    static CALLS: Cell<u32> = const { Cell::new(0) };
}

impl Plugin for Unruly {
    type Config = Config;

    fn new(config: Config) -> Result<Self, Issue> {
        if config.hang {
            hang();
        }
        Ok(Self(config))
    }

    fn interest(&self) -> Interest {
        let types = self.0.types.iter().map(String::as_str);
        let interest = Interest::in_types(types)
            .attributes(["*"])
            .fields(self.0.fields.iter().map(String::as_str));
        if self.0.payload {
            interest.payload()
        } else {
            interest
        }
    }
}

impl Filter for Unruly {
    fn evaluate(&self, event: &Event) -> Result<Verdict, Failure> {
        let amended = |name: &str, value: &str| {
            let attribute = Attribute {
                name: name.into(),
                value: value.into(),
            };
            Ok(Verdict::Amend(Amendment {
                priority: Some(Priority::Urgent),
                attributes: vec![attribute],
                ..Amendment::default()
            }))
        };
        match event.kind.as_str() {
            "drop" => Ok(Verdict::Drop("two\nlines\u{1b}[2J".into())),
            "amend" => amended("seen", "yes"),
            "amend-the-id" => amended("id", "stolen"),
            "amend-with-a-line-feed" => amended("seen", "a\nb"),
            "amend-with-an-option" => Ok(Verdict::Amend(Amendment {
                options: vec![Attribute {
                    name: "colour".into(),
                    value: "red".into(),
                }],
                ..Amendment::default()
            })),
            "filter-rejects" => Err(Failure::Reject("never".into())),
            _ => Ok(Verdict::Keep),
        }
    }
}

impl Router for Unruly {
    fn resolve(&self, event: &Event) -> Result<Vec<Route>, Failure> {
        let calls = CALLS.get() + 1;
        CALLS.set(calls);
        let route = Route::to_user("42");
        Ok(vec![match event.kind.as_str() {
            "loop" => hang(),
            "grow" => {
                let mut hoard: Vec<Vec<u8>> = Vec::new();
                loop {
                    hoard.push(black_box(vec![1; 1024 * 1024]));
                }
            }
            "panic" => panic!("requested by the event type"),
            "recurse" => {
                black_box(recurse(1));
                route
            }
            "fresh-instances-only" if calls > 1 => panic!("call {calls} of this instance"),
            "reject" => return Err(Failure::Reject("no such order\u{7}".into())),
            "retry" => return Err(Failure::Retry("not now".into())),
            // Until the clock has reached the attribute `until`, in ms.
            "retry-until" if clock::now_ms() < until(event) => {
                return Err(Failure::Retry("not yet".into()));
            }
            "many-targets" => Route::to(vec![Target::Everyone; 10_001]),
            "many-routes" => return Ok(vec![Route::to([]); 10_001]),
            "large-answer" => Route {
                body: Some(format!("\"{}\"", "x".repeat(300 * 1024))),
                ..route
            },
            "huge-answer" => Route {
                body: Some("x".repeat(4 * 1024 * 1024)),
                ..route
            },
            "user-with-a-line-feed" => Route::to_user("4\n2"),
            "empty-group" => Route::to_group(""),
            "reserved-name" => route.event_name("cursor"),
            "name-with-a-line-feed" => route.event_name("x\ndata: forged"),
            "body-of-no-json" => Route {
                body: Some("{\"a\":".into()),
                ..route
            },
            "body-of-two-lines" => Route {
                body: Some("{\n\"a\": \"b c\"}".into()),
                ..route
            },
            "ttl-of-nothing" => route.ttl_ms(0),
            "ttl-for-ever" => route.ttl_ms(u64::MAX),
            "test-without-a-value" => route.when([Test::new("plan", Operator::Equals, [])]),
            "test-of-a-plan" => route.when([Test::new("plan", Operator::Equals, ["pro".into()])]),
            "nobody" => return Ok(vec![Route::to([])]),
            "loud" => route
                .priority(Priority::High)
                .ttl_ms(5_000)
                .collapse_key("k")
                .event_name("ping"),
            "chatty" => {
                for n in 0..5_000 {
                    log::info(format_args!("line {n}\r\u{1b}[31m{}", "x".repeat(2_000)));
                }
                #[expect(clippy::print_stdout, reason = "this is what is tested")]
                {
                    println!("and to standard output");
                }
                route
            }
            // Fails as a guest without the SDK does: no message, but something on standard error.
            "traceback" => {
                #[expect(clippy::print_stderr, reason = "this is what is tested")]
                {
                    for n in 1..=6 {
                        eprintln!("line {n}\u{1b}[2J");
                    }
                    eprint!("KeyError: 'fee'");
                }
                trap()
            }
            // A number that the standard library draws for this instance.
            "random" => Route::to_user("42")
                .body(&json!({ "number": RandomState::new().hash_one(0).to_string() })),
            "slow" => {
                black_box((0..200_000_000_u64).fold(0, |sum, n| black_box(sum ^ n)));
                route
            }
            "sleep" => {
                std::thread::sleep(Duration::from_secs(3_600));
                route
            }
            // Everyone who has not muted the topic.
            "rust.topic" => Route::to_everyone().when([Test::not_contains(
                "muted",
                event.text("topic").unwrap_or_default(),
            )]),
            // Everyone whose threshold the severity reaches, or who has none.
            "rust.alarm" => Route::to_everyone()
                .when([Test::at_most("min_severity", number(event, "/severity"))])
                .when([Test::absent("min_severity")]),
            "rust.two" => {
                let to = || Route::to_user(event.text("recipient").unwrap_or("42"));
                return Ok(vec![
                    to().slot("summary").collapse_key("k").body(&json!("short")),
                    to().slot("detail")
                        .collapse_key("k")
                        .priority(Priority::Urgent)
                        .body(&json!("long")),
                    to().slot("detail").body(&json!("not this one")),
                ]);
            }
            "unknown-option" => {
                let mut route = route;
                route.options.push(Attribute {
                    name: "colour".into(),
                    value: "red".into(),
                });
                route
            }
            "slot-without-text" => {
                let mut route = route;
                route.options.push(Attribute {
                    name: "slot".into(),
                    value: 5.into(),
                });
                route
            }
            "many-slots" => {
                return Ok((0..9)
                    .map(|n| Route::to_user("42").slot(n.to_string()))
                    .collect());
            }
            // Returns everything that it was shown.
            _ => {
                let attributes: serde_json::Map<_, _> = event
                    .attributes
                    .iter()
                    .map(|(name, value)| (name.clone(), value.to_string().into()))
                    .collect();
                let seen = json!({
                    "call": calls, "clock": clock::now_ms(), "priority": format!("{:?}", event.priority), "data": format!("{:?}", event.data),
                    "attributes": attributes,
                });
                Route::to_user(event.text("user").unwrap_or("42")).body(&seen)
            }
        }])
    }
}

fn number(event: &Event, pointer: &str) -> i64 {
    match event.attribute(pointer) {
        Some(Value::Integer(number)) => *number,
        _ => 0,
    }
}

fn until(event: &Event) -> u64 {
    event
        .text("until")
        .and_then(|ms| ms.parse().ok())
        .unwrap_or_default()
}

#[inline(never)]
fn trap() -> ! {
    std::process::abort()
}

fn hang() -> ! {
    loop {
        black_box(());
    }
}

#[expect(unconditional_recursion, reason = "this is what is tested")]
fn recurse(n: u64) -> u64 {
    black_box([n; 64]);
    recurse(black_box(n + 1)) + n
}

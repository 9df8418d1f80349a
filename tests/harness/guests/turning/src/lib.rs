//! A test plugin that sends an event to its user until it reaches the version named by the event's
//! `turns`; from that version on it acts as the event's `then` specifies. Tests create versions by
//! overwriting [`VERSION`].

use std::hint::black_box;

use pointsman_plugin::{Event, Failure, Interest, Issue, Plugin, Route, Router, Value, export};

/// Occurs once in the file; tests replace the zeros by a number.
static VERSION: &[u8; 15] = b"version:0000000";

struct Turning;

export!(Turning as router);

impl Plugin for Turning {
    type Config = pointsman_plugin::NoConfig;

    fn new(_: Self::Config) -> Result<Self, Issue> {
        Ok(Self)
    }

    fn interest(&self) -> Interest {
        Interest::in_types(["*"]).attributes(["user", "turns", "then"])
    }
}

impl Router for Turning {
    fn resolve(&self, event: &Event) -> Result<Vec<Route>, Failure> {
        // `black_box` makes it read at run time; otherwise the compiler would inline the value.
        let version = std::str::from_utf8(&black_box(VERSION)[8..])
            .ok()
            .and_then(|digits| digits.parse::<i64>().ok())
            .unwrap_or_default();
        let has_turned =
            matches!(event.attribute("turns"), Some(Value::Integer(turns)) if version >= *turns);
        let user = event.text("user");
        let routes = match event.text("then").filter(|_| has_turned) {
            Some("nobody") => None,
            Some("panic") => panic!("requested by the event"),
            Some("loop") => loop {
                black_box(());
            },
            Some(other) => Some(Route::to_user(other)),
            None => user.map(Route::to_user),
        };
        // An expiry, which the host counts from the clock of the call.
        Ok(routes
            .into_iter()
            .map(|route| route.ttl_ms(3_600_000))
            .collect())
    }
}

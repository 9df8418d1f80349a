//! A plugin for tests: sends an event to its user, until the version that the event names in `turns`; from that one on it does what the event
//! says in `then`. Tests make versions by writing over [`VERSION`].

use std::hint::black_box;

use pointsman_plugin::{Event, Failure, Interest, Issue, Plugin, Route, Router, Value, export};

/// Stands once in the file, with a number in place of the zeros.
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
        // Read when it runs, or the compiler would make an instruction of it.
        let version = std::str::from_utf8(&black_box(VERSION)[8..])
            .ok()
            .and_then(|digits| digits.parse::<i64>().ok())
            .unwrap_or_default();
        let has_turned =
            matches!(event.attribute("turns"), Some(Value::Integer(turns)) if version >= *turns);
        let user = event.text("user");
        let routes = match event.text("then").filter(|_| has_turned) {
            Some("nobody") => None,
            Some("panic") => panic!("as the event said"),
            Some("loop") => loop {
                black_box(());
            },
            Some(other) => Some(Route::to_user(other)),
            None => user.map(Route::to_user),
        };
        // An end, which is counted from the clock that the call is shown.
        Ok(routes
            .into_iter()
            .map(|route| route.ttl_ms(3_600_000))
            .collect())
    }
}

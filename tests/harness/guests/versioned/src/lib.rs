//! A test plugin that sends the number of its version to the user of each event. Tests create
//! versions by overwriting [`VERSION`]. Versions from [`FAULTY`] on panic on three of ten events,
//! selected by the last digit of the id.

use std::hint::black_box;

use pointsman_plugin::{Event, Failure, Interest, Issue, Plugin, Route, Router, export};
use serde_json::json;

/// Occurs once in the file; tests replace the zeros by a number.
static VERSION: &[u8; 15] = b"version:0000000";

const FAULTY: u32 = 9_000_000;

struct Versioned;

export!(Versioned as router);

impl Plugin for Versioned {
    type Config = pointsman_plugin::NoConfig;

    fn new(_: Self::Config) -> Result<Self, Issue> {
        Ok(Self)
    }

    fn interest(&self) -> Interest {
        Interest::in_types(["*"]).attributes(["user"])
    }
}

impl Router for Versioned {
    fn resolve(&self, event: &Event) -> Result<Vec<Route>, Failure> {
        // `black_box` makes it read at run time; otherwise the compiler would inline the value.
        let number = std::str::from_utf8(&black_box(VERSION)[8..])
            .ok()
            .and_then(|digits| digits.parse::<u32>().ok());
        if number.is_some_and(|number| number >= FAULTY) && event.id.ends_with(['0', '1', '2']) {
            panic!("this version is faulty");
        }
        let route = |user| Route::to_user(user).body(&json!({ "version": number }));
        Ok(event.text("user").map(route).into_iter().collect())
    }
}

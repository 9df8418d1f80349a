//! A component that stands between a plugin and the host, as a virtualisation of WASI does: it
//! imports and exports the log, and marks each line that it passes on. It needs more memory than a
//! plugin usually does.

#![expect(unsafe_code, reason = "needed by the generated bindings")]

use std::hint::black_box;

use exports::pointsman::plugin::log::{Guest, Level};
use pointsman::plugin::log;

wit_bindgen::generate!({
    path: "../../../../wit",
    inline: "
        package pointsman:relay;
        world relay {
            import pointsman:plugin/log@0.1.0;
            export pointsman:plugin/log@0.1.0;
        }
    ",
    generate_all,
});

/// Memory of every instance, in bytes.
const BALLAST_BYTES: usize = 12 * 1024 * 1024;

static BALLAST: [u8; BALLAST_BYTES] = [0; BALLAST_BYTES];

struct Relay;

export!(Relay);

impl Guest for Relay {
    fn log(level: Level, message: String) {
        let level = match level {
            Level::Trace => log::Level::Trace,
            Level::Debug => log::Level::Debug,
            Level::Info => log::Level::Info,
            Level::Warn => log::Level::Warn,
            Level::Error => log::Level::Error,
        };
        log::log(
            level,
            &format!("relayed {}: {message}", black_box(&BALLAST).len()),
        );
    }
}

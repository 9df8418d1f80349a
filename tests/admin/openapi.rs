//! The OpenAPI document describes the real responses of nodes. `host/src/http/openapi.rs` checks
//! that it covers every route; here a validator checks the document, and real responses are checked
//! against it (`clients/openapi.test.js`).

use crate::clients;
use crate::harness::guests::core_module;
use crate::harness::node::{Folder, Node};
use crate::harness::plugins::Plugins;
use crate::harness::ports;

const SECRET: &str = "the secret of these tests, longer than 32 bytes";
const KEY: &str = "the key of these tests";

/// Includes a rule that uses every field of a route.
const DEV: &str = r#"
[listen]
webhook_origins = ["events.example"]
[limits]
body_timeout = "1s"
[recipients]
max_groups_per_user = 2
[[plugins.discard.config.rules]]
match.type = "noise"
[[plugins.rules.config.rules]]
match.type = "promotion"
to.everyone = true
when = { plan = "pro" }
[[plugins.rules.config.rules]]
match.type = "promotion"
to.everyone = true
priority = "low"
ttl = "1h"
collapse = "promotion"
event_name = "promotion"
body = { text = "Half the price" }
"#;

#[test]
fn the_document_is_valid_and_nodes_respond_as_documented() {
    let files =
        ["address", "discard", "rules"].map(|name| (format!("{name}.wasm"), core_module(name)));
    let plugins = Plugins::new(
        &files
            .each_ref()
            .map(|(file, bytes)| (file.as_str(), bytes.clone())),
    );
    let node = Node::builder().plugins(plugins.dir()).config(DEV).start();
    // Requires tokens and keys; its broker is unreachable and it has no plugin to compile.
    let no_plugins = Folder::new();
    let config = format!("[auth]\njwt_secret = \"{SECRET}\"\napi_key = \"{KEY}\"");
    let away = Node::builder()
        .production()
        .redis(format!("redis://{}", ports::free()))
        .plugins(no_plugins.path())
        .config(&config);
    let mut away = away.may_be_unready().start();
    let addresses = [
        node.addr(),
        node.admin_addr(),
        away.addr(),
        away.admin_addr(),
    ]
    .map(|address| address.to_string());
    let [address, admin, away_address, away_admin] = addresses.each_ref().map(String::as_str);
    let folder = plugins.dir();
    let variables = [
        ("POINTSMAN_ADDRESS", address),
        ("POINTSMAN_ADMIN", admin),
        ("POINTSMAN_AWAY", away_address),
        ("POINTSMAN_AWAY_ADMIN", away_admin),
        ("POINTSMAN_API_KEY", KEY),
        ("POINTSMAN_SECRET", SECRET),
        ("POINTSMAN_PLUGINS", folder.to_str().expect("a UTF-8 path")),
    ];
    clients::run_with("openapi.test.js", &variables);
    away.kill();
}

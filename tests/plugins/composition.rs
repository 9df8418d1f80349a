//! Components that consist of several, as `wac plug` and WASI-Virt make them: they run like any
//! other plugin, and the limits apply to all of their parts together.

use crate::harness::eventually;
use crate::harness::guests::{core_module, relayed, versioned};
use crate::harness::node::{Node, SOON};
use crate::harness::plugins::{Plugins, Site};
use crate::harness::publish::event;
use serde_json::json;

const CONFIG: &str = "
[plugins.roomy]
memory_mib = 64
[plugins.crowded]
memory_mib = 128
";

#[test]
fn a_composed_component_decides_and_its_limits_apply_to_the_sum_of_its_parts() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::of(Node::builder().config("[plugins]\n"), &plugins);
    assert_eq!(site.next_decision().0, 1);

    // The text of a log line is copied from one memory to the other, and from there to the host.
    plugins.replace("unruly.wasm", &relayed("unruly", 1));
    let unruly = || site.node.admin("/v1/plugins/unruly").json();
    eventually(SOON, "the composed plugin is active", || {
        (unruly()["generation"] == 1).then_some(())
    });
    site.node
        .publisher()
        .publish(&[event("composed", "panic", json!({"user": "7"}))]);
    let dead = eventually(SOON, "the panic in the composed plugin is reported", || {
        let page = site.node.request("GET", "/v1/dead-letters?limit=1000").body;
        page.contains("relayed").then_some(page)
    });
    assert!(dead.contains("relayed 12582912: "), "{dead}");
    let removed = site.node.order("DELETE", "/v1/plugins/unruly", &[], b"");
    assert!(removed.status < 300, "{removed:?}");

    // Each relay has 12 MiB, and no part exceeds the limit by itself.
    let upload = |name: &str, bytes: &[u8]| {
        let path = format!("/v1/plugins/{name}?create=true");
        let answer = site.node.order("PUT", &path, &[], bytes);
        (answer.status, answer.body)
    };
    let (three, four) = (relayed("discard", 3), relayed("discard", 4));
    let (status, body) = upload("small", &three);
    assert_eq!(status, 422, "{body}");
    assert!(
        body.contains("MiB of memory; the limit is 32 (memory_mib)"),
        "{body}"
    );
    site.node.reconfigure(CONFIG);
    site.await_ready(503, |page| {
        page.contains("the plugin 'roomy' is configured")
    });
    let (status, body) = upload("roomy", &three);
    assert_eq!(status, 200, "{body}");
    // Their number is limited as well.
    let (status, body) = upload("crowded", &four);
    assert_eq!(status, 422, "{body}");
    assert!(body.contains("has 5 memories; the limit is 4"), "{body}");
    let many = format!("(module {})", "(memory 1)".repeat(200));
    let (status, body) = upload("crowded", &wat::parse_str(many).expect("a module"));
    assert!(status == 422 && body.contains("memories"), "{body}");
    assert_eq!(upload("crowded", &core_module("discard")).0, 200);
    assert_eq!(site.next_decision().0, 1);
}

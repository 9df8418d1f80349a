// Drops orders from the test system and raises the priority of large orders.

import { Attribute, Event, Issue, Kind, Manifest, Priority, Value, Verdict } from "./pointsman/contract";
import { Json } from "./json";

/** The minimum total of a large order. */
let large: f64 = 1000;

/** Only what is listed here is available in `evaluate`. */
export function describe(): Manifest {
  const manifest = new Manifest();
  manifest.name = "my-plugin";
  manifest.version = "0.1.0";
  manifest.description = "A filter for Pointsman";
  manifest.types = ["order.*"];
  manifest.attributes = ["test"];
  manifest.fields = ["/order/total"];
  manifest.configSchema =
    '{"type":"object","additionalProperties":false,"properties":{"large":{"type":"number","exclusiveMinimum":0}}}';
  return manifest;
}

/** Returns the problems of the configuration. */
export function configure(config: string): Issue[] {
  const issues: Issue[] = [];
  const object = Json.parse(config);
  const names = object.names();
  for (let i = 0; i < names.length; i++) {
    if (names[i] != "large") issues.push(new Issue(names[i], "is unknown; the only key is large"));
  }
  const total = object.member("large");
  if (total != null) {
    const number = total.number();
    if (number > 0) large = number;
    else issues.push(new Issue("large", "give a number above 0"));
  }
  return issues;
}

export function evaluate(event: Event): Verdict {
  // Attributes of events added with XADD are always text.
  const test = event.attribute("test");
  if (test != null && (test.isTrue || (test.kind == Kind.text && test.text == "true"))) {
    return Verdict.drop("order from the test system");
  }
  const total = event.attribute("/order/total");
  if (total == null || !total.isNumber || total.number < large) return Verdict.keep();
  // Plugins called after this one see the attribute.
  return Verdict.amend(Priority.high, [new Attribute("desk", Value.ofText("large"))]);
}

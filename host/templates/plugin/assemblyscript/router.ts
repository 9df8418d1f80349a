// Routes order events to the order's owner and to the group of its region.

import { Event, Issue, Kind, Manifest, Resolution, Route, Target } from "./pointsman/contract";
import { Json } from "./json";

/** The event attribute that names the owner of the order. */
let owner = "owner";

/** Only what is listed here is available in `resolve`. */
export function describe(): Manifest {
  const manifest = new Manifest();
  manifest.name = "my-plugin";
  manifest.version = "0.1.0";
  manifest.description = "A router for Pointsman";
  manifest.types = ["order.*"];
  manifest.attributes = [owner];
  manifest.fields = ["/order/region"];
  manifest.configSchema =
    '{"type":"object","additionalProperties":false,"properties":{"owner":{"type":"string","minLength":1}}}';
  return manifest;
}

/** Returns the problems of the configuration. */
export function configure(config: string): Issue[] {
  const issues: Issue[] = [];
  const object = Json.parse(config);
  const names = object.names();
  for (let i = 0; i < names.length; i++) {
    if (names[i] != "owner") issues.push(new Issue(names[i], "is unknown; the only key is owner"));
  }
  const name = object.member("owner");
  if (name != null) {
    const text = name.string();
    if (text == null || text == "") issues.push(new Issue("owner", "name an attribute, such as customer"));
    else owner = text;
  }
  return issues;
}

export function resolve(event: Event): Resolution {
  const routes: Route[] = [];
  const id = event.attribute(owner);
  if (id != null && id.kind == Kind.text) routes.push(new Route([Target.user(id.text)]));
  const region = event.attribute("/order/region");
  if (region != null && region.kind == Kind.text) {
    routes.push(new Route([Target.group(`region-${region.text}`)]));
  }
  return new Resolution(routes);
}

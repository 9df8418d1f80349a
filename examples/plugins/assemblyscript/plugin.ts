// Notifies customers about their parcels: a filter and a router. ../README.md describes its
// decisions.

import {
  Attribute, Event, Issue, Level, Manifest, NONE, Operator, PayloadKind, Priority, Resolution,
  Route, Target, Test, Value, Verdict, Kind, log, nowMs,
} from "./pointsman/contract";
import { Json, quoted } from "./json";

const HOUR_MS: u64 = 3_600_000;

const NO_CUSTOMER = "the event has no customer; set the attribute customer to a text or an integer";
const NO_NUMBER = "the payload has no parcel number; set /number to a text or an integer";
const NO_PLACE = "the payload has no place; set place in the last element of /steps";

let urgentFee: f64 = 100;

export function describe(): Manifest {
  const manifest = new Manifest();
  manifest.name = "parcels";
  manifest.version = "0.1.0";
  manifest.description = "Notifies customers about their parcels";
  manifest.types = ["parcel.*"];
  manifest.attributes = ["customer", "depot", "late", "test"];
  manifest.fields = ["/fee", "/heavier_than", "/hours_late", "/number"];
  manifest.payload = true;
  manifest.configSchema =
    '{"type":"object","additionalProperties":false,"properties":{"urgent_fee":{"type":"number","minimum":0,"default":100}}}';
  return manifest;
}

/** Returns the problems of the configuration. */
export function configure(config: string): Issue[] {
  const issues: Issue[] = [];
  const object = Json.parse(config);
  urgentFee = 100;
  const names = object.names();
  for (let i = 0; i < names.length; i++) {
    if (names[i] != "urgent_fee") {
      issues.push(new Issue(names[i], "is unknown; the only key is urgent_fee"));
      continue;
    }
    const fee = object.member("urgent_fee")!.number();
    if (fee >= 0) urgentFee = fee;
    else issues.push(new Issue("urgent_fee", "use a number of 0 or more"));
  }
  return issues;
}

export function evaluate(event: Event): Verdict {
  const test = event.attribute("test");
  if (test != null && (test.isTrue || (test.kind == Kind.text && test.text == "true"))) {
    return Verdict.drop("test event");
  }
  if (nowMs() > event.timeMs + 7 * 24 * HOUR_MS) return Verdict.drop("older than 7 days");
  const hours = event.attribute("/hours_late");
  if (hours != null && hours.isNumber && hours.number >= 24) {
    const priority = event.priority >= Priority.high ? NONE : Priority.high;
    return Verdict.amend(priority, [new Attribute("late", Value.ofFlag(true))]);
  }
  return Verdict.keep();
}

export function resolve(event: Event): Resolution {
  if (event.type == "parcel.moved") return moved(event);
  if (event.type == "parcel.delivered") return delivered(event);
  if (event.type == "parcel.held") return held(event);
  if (event.type == "parcel.recalled") return recalled(event);
  return new Resolution([]);
}

function moved(event: Event): Resolution {
  const customer = nameIn(event, "customer");
  if (customer == "") return Resolution.reject(NO_CUSTOMER);
  const parcel = nameIn(event, "/number");
  if (parcel == "") return Resolution.reject(NO_NUMBER);
  const steps = stepsOf(event);
  const last = steps.length > 0 ? steps[steps.length - 1].member("place") : null;
  const place = last != null ? last.string() : null;
  if (place == null || place == "") return Resolution.reject(NO_PLACE);

  const route = new Route([Target.user(customer)]);
  const late = event.attribute("late");
  if (late == null || !late.isTrue) route.priority = Priority.low;
  route.ttlMs = 6 * HOUR_MS;
  route.collapseKey = `parcel-${parcel}`;
  route.eventName = "parcel";
  route.body = `{"number":${quoted(parcel)},"place":${quoted(place)},"stops":${steps.length}}`;
  return new Resolution([route]);
}

function delivered(event: Event): Resolution {
  const customer = nameIn(event, "customer");
  if (customer == "") return Resolution.reject(NO_CUSTOMER);
  const parcel = nameIn(event, "/number");
  if (parcel == "") return Resolution.reject(NO_NUMBER);
  const targets = [Target.user(customer)];
  const depot = event.attribute("depot");
  if (depot != null && depot.kind == Kind.text && depot.text != "") {
    targets.push(Target.group(`depot-${depot.text}`));
  }
  const route = new Route(targets);
  route.collapseKey = `parcel-${parcel}`;
  route.eventName = "parcel";
  return new Resolution([route]);
}

function held(event: Event): Resolution {
  const customer = nameIn(event, "customer");
  if (customer == "") return Resolution.reject(NO_CUSTOMER);
  const fee = event.attribute("/fee");
  if (fee == null || !fee.isNumber) return Resolution.retry("the fee is not known yet");

  const own = new Route([Target.user(customer)]);
  own.priority = fee.number >= urgentFee ? Priority.urgent : Priority.high;
  own.eventName = "parcel";
  const customs = new Route([Target.group("customs")]);
  customs.when = [
    [new Test("shift", Operator.equals, [Value.ofText("day")])],
    [
      new Test("role", Operator.oneOf, [Value.ofText("lead"), Value.ofText("stand-in")]),
      new Test("open", Operator.less, [Value.ofInteger(50)]),
    ],
  ];
  customs.ttlMs = 12 * HOUR_MS;
  customs.options = [new Attribute("slot", Value.ofText("customs"))];
  return new Resolution([own, customs]);
}

function recalled(event: Event): Resolution {
  const parcel = nameIn(event, "/number");
  if (parcel == "") return Resolution.reject(NO_NUMBER);
  log(Level.warn, "a recall goes to everyone");
  const weight = event.attribute("/heavier_than");
  const concerned =
    weight != null && weight.isNumber
      ? new Test("weight", Operator.greater, [weight])
      : new Test("parcels", Operator.greater, [Value.ofInteger(0)]);

  const route = new Route([Target.everyone()]);
  route.when = [[new Test("staff", Operator.present)], [concerned]];
  route.priority = Priority.urgent;
  route.ttlMs = 24 * HOUR_MS;
  route.collapseKey = `recall-${parcel}`;
  route.eventName = "recall";
  return new Resolution([route]);
}

/**
 * Returns the stops of the parcel, of which the last is its location. A JSON pointer cannot select
 * the last element of a list, so the payload is parsed here.
 */
function stepsOf(event: Event): Json[] {
  if (event.payloadKind != PayloadKind.json) return [];
  const steps = Json.parse(event.payload).member("steps");
  return steps != null ? steps.items() : [];
}

/** Returns a text, or an integer as text; empty if there is neither. */
function nameIn(event: Event, attribute: string): string {
  const value = event.attribute(attribute);
  if (value == null) return "";
  if (value.kind == Kind.integer) return value.integer.toString();
  return value.kind == Kind.text ? value.text : "";
}

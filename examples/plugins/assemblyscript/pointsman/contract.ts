// The plugin contract pointsman:plugin@0.1.0 in AssemblyScript: the types of wit/types.wit and
// wit/plugin.wit, and how they lie in memory when they pass the boundary of the module.
//
// A change of wit/ is a change of one class and one function here.

export enum Priority { low, normal, high, urgent }
export enum Kind { text, integer, decimal, flag }
export enum PayloadKind { none, json, text, binary }
export enum Operator {
  equals, notEquals, oneOf, contains, prefix, less, greater, present, absent, notOneOf, notContains, atLeast, atMost,
  suffix,
}
export enum Level { trace, debug, info, warn, error }

/** The place of an absent priority or time to live. */
export const NONE = -1;

export class Value {
  kind: Kind = Kind.flag;
  text: string = "";
  integer: i64 = 0;
  decimal: f64 = 0;
  flag: bool = false;

  static ofText(text: string): Value {
    const value = new Value();
    value.kind = Kind.text;
    value.text = text;
    return value;
  }

  static ofInteger(integer: i64): Value {
    const value = new Value();
    value.kind = Kind.integer;
    value.integer = integer;
    return value;
  }

  static ofFlag(flag: bool): Value {
    const value = new Value();
    value.flag = flag;
    return value;
  }

  get isNumber(): bool {
    return this.kind == Kind.integer || this.kind == Kind.decimal;
  }

  get number(): f64 {
    return this.kind == Kind.integer ? <f64>this.integer : this.decimal;
  }

  get isTrue(): bool {
    return this.kind == Kind.flag && this.flag;
  }
}

export class Attribute {
  constructor(public name: string, public value: Value) {}
}

export class Event {
  id: string = "";
  source: string = "";
  type: string = "";
  subject: string | null = null;
  /** Milliseconds since the Unix epoch. */
  timeMs: u64 = 0;
  priority: Priority = Priority.normal;
  attributes: Attribute[] = [];
  payloadKind: PayloadKind = PayloadKind.none;
  /** The payload of the kinds json and text. */
  payload: string = "";

  /** An attribute, or a payload field by its pointer; null if the event does not have it. */
  attribute(name: string): Value | null {
    for (let i = 0; i < this.attributes.length; i++) {
      if (this.attributes[i].name == name) return this.attributes[i].value;
    }
    return null;
  }
}

/** A test of one attribute of a recipient. */
export class Test {
  constructor(public attribute: string, public operator: Operator, public values: Value[] = []) {}
}

export class Target {
  constructor(public kind: u8, public name: string) {}

  static user(id: string): Target {
    return new Target(0, id);
  }

  static group(name: string): Target {
    return new Target(1, name);
  }

  static everyone(): Target {
    return new Target(2, "");
  }
}

export class Route {
  /** Restricts the targets to recipients for whom every test of at least one clause holds. */
  when: Test[][] | null = null;
  /** NONE for the event's own. */
  priority: i32 = NONE;
  /** Milliseconds; NONE: as long as the host retains the notification. */
  ttlMs: i64 = NONE;
  collapseKey: string | null = null;
  eventName: string | null = null;
  /** JSON that replaces the event's own data. */
  body: string | null = null;
  /**
   * Further properties. The host knows slot, a text: the name of a notification of its own. It refuses
   * an unknown name.
   */
  options: Attribute[] = [];

  constructor(public targets: Target[]) {}
}

/** Why a plugin cannot decide about an event. */
export class Failure {
  constructor(public isTemporary: bool, public reason: string) {}
}

/** The verdict of a filter. */
export class Verdict {
  kind: u8 = 0;
  reason: string = "";
  priority: i32 = NONE;
  attributes: Attribute[] = [];
  /** Further properties of an amendment; the host knows none. */
  options: Attribute[] = [];
  failure: Failure | null = null;

  static keep(): Verdict {
    return new Verdict();
  }

  static drop(reason: string): Verdict {
    const verdict = new Verdict();
    verdict.kind = 1;
    verdict.reason = reason;
    return verdict;
  }

  /** Sets attributes and, unless it is NONE, the priority. */
  static amend(priority: i32, attributes: Attribute[]): Verdict {
    const verdict = new Verdict();
    verdict.kind = 2;
    verdict.priority = priority;
    verdict.attributes = attributes;
    return verdict;
  }

  static failed(failure: Failure): Verdict {
    const verdict = new Verdict();
    verdict.failure = failure;
    return verdict;
  }
}

/** The answer of a router. */
export class Resolution {
  constructor(public routes: Route[], public failure: Failure | null = null) {}

  static reject(reason: string): Resolution {
    return new Resolution([], new Failure(false, reason));
  }

  static retry(reason: string): Resolution {
    return new Resolution([], new Failure(true, reason));
  }
}

export class Manifest {
  name: string = "";
  version: string = "";
  description: string = "";
  types: string[] = [];
  attributes: string[] = [];
  fields: string[] = [];
  payload: bool = false;
  configSchema: string | null = null;
  /** Further properties; the host knows none. */
  options: Attribute[] = [];
}

/** A problem in the configuration. */
export class Issue {
  constructor(public path: string, public message: string) {}
}

// @ts-ignore: decorator
@external("pointsman:plugin/log@0.1.0", "log")
declare function hostLog(level: Level, message: usize, bytes: usize): void;

// @ts-ignore: decorator
@external("pointsman:plugin/clock@0.1.0", "now-ms")
declare function hostNowMs(): u64;

/** Milliseconds since the Unix epoch; the time stands still during a call. */
export function nowMs(): u64 {
  return hostNowMs();
}

export function log(level: Level, message: string): void {
  const bytes = String.UTF8.byteLength(message);
  const memory = heap.alloc(bytes);
  encode(message, memory);
  hostLog(level, memory, bytes);
  heap.free(memory);
}

/** Replaces the function that the runtime calls on an error: the log has the reason of the trap. */
export function onAbort(message: string | null, file: string | null, line: u32, column: u32): void {
  const reason = message ? message : "abort";
  const where = file ? file : "";
  log(Level.error, `${reason} at ${where}:${line}:${column}`);
  unreachable();
}

// ---- Reading arguments. The host writes them into memory of `realloc`, which is freed here. ----

/** The host calls it for each part of the arguments of a call. */
export function realloc(old: usize, _oldBytes: usize, align: usize, bytes: usize): usize {
  if (bytes == 0) return align;
  return old == 0 ? heap.alloc(bytes) : heap.realloc(old, bytes);
}

function release(at: usize, bytes: usize): void {
  if (bytes > 0) heap.free(at);
}

/** Takes a string: a pointer and a number of bytes. */
export function takeText(at: usize, bytes: usize): string {
  const text = String.UTF8.decodeUnsafe(at, bytes);
  release(at, bytes);
  return text;
}

function textIn(at: usize): string {
  return takeText(load<u32>(at), load<u32>(at, 4));
}

/** A variant: its case, then at 8 its payload, because one of the payloads has 64 bits. */
function valueIn(at: usize): Value {
  const value = new Value();
  value.kind = load<u8>(at);
  switch (value.kind) {
    case Kind.text: {
      value.text = textIn(at + 8);
      break;
    }
    case Kind.integer: {
      value.integer = load<i64>(at, 8);
      break;
    }
    case Kind.decimal: {
      value.decimal = load<f64>(at, 8);
      break;
    }
    default: {
      value.flag = load<u8>(at, 8) != 0;
    }
  }
  return value;
}

/** A list of attribute: 24 bytes each, of which 8 are the name. */
export function takeAttributes(at: usize, count: i32): Attribute[] {
  const list = new Array<Attribute>();
  for (let i = 0; i < count; i++) {
    const element = at + <usize>i * 24;
    list.push(new Attribute(textIn(element), valueIn(element + 8)));
  }
  release(at, count);
  return list;
}

// ---- Writing results. ----

function encode(text: string, to: usize): void {
  String.UTF8.encodeUnsafe(changetype<usize>(text), text.length, to, false, String.UTF8.ErrorMode.REPLACE);
}

/** Memory that the host reads after the call; the next call frees it. */
const results: usize[] = [];

export function freeResults(): void {
  for (let i = 0; i < results.length; i++) heap.free(results[i]);
  results.length = 0;
}

/** Lays out fields one after the other, each at a multiple of its alignment. */
export class Writer {
  private memory: usize = heap.alloc(64);
  private capacity: usize = 64;
  private length: usize = 0;

  /** The address of the finished bytes. */
  finish(): usize {
    results.push(this.memory);
    return this.memory;
  }

  private add(bytes: usize): usize {
    if (this.length + bytes > this.capacity) {
      this.capacity = (this.length + bytes) * 2;
      this.memory = heap.realloc(this.memory, this.capacity);
    }
    const at = this.memory + this.length;
    this.length += bytes;
    return at;
  }

  align(to: usize): void {
    while (this.length % to != 0) this.u8(0);
  }

  u8(value: u8): void {
    store<u8>(this.add(1), value);
  }

  u32(value: usize): void {
    this.align(4);
    store<u32>(this.add(4), <u32>value);
  }

  u64(value: u64): void {
    this.align(8);
    store<u64>(this.add(8), value);
  }

  text(text: string): void {
    const bytes = String.UTF8.byteLength(text);
    const memory = heap.alloc(bytes);
    encode(text, memory);
    results.push(memory);
    this.u32(memory);
    // A lone surrogate has become a character of the same size.
    this.u32(bytes);
  }

  /** Writes a list whose elements are in `elements`. */
  list(elements: Writer, count: i32): void {
    this.u32(elements.finish());
    this.u32(count);
  }

  texts(texts: string[]): void {
    const list = new Writer();
    for (let i = 0; i < texts.length; i++) list.text(texts[i]);
    this.list(list, texts.length);
  }

  /**
   * Begins a variant: a case, then its payload at a multiple of the largest alignment of a payload.
   * `size` is that of the largest payload. Returns what `endVariant` needs.
   */
  variant(kind: u8, align: usize, size: usize): usize {
    this.align(align);
    this.u8(kind);
    this.align(align);
    return this.length + size;
  }

  endVariant(end: usize, align: usize): void {
    while (this.length < end) this.u8(0);
    this.align(align);
  }

  optionalText(text: string | null): void {
    const end = this.variant(text == null ? 0 : 1, 4, 8);
    if (text != null) this.text(text);
    this.endVariant(end, 4);
  }

  optionalPriority(priority: i32): void {
    this.u8(priority == NONE ? 0 : 1);
    this.u8(<u8>(priority == NONE ? 0 : priority));
  }

  value(value: Value): void {
    const end = this.variant(<u8>value.kind, 8, 8);
    if (value.kind == Kind.text) this.text(value.text);
    else if (value.kind == Kind.integer) this.u64(value.integer);
    else if (value.kind == Kind.decimal) this.u64(reinterpret<u64>(value.decimal));
    else this.u8(value.flag ? 1 : 0);
    this.endVariant(end, 8);
  }

  attributes(attributes: Attribute[]): void {
    const list = new Writer();
    for (let i = 0; i < attributes.length; i++) {
      list.align(8);
      list.text(attributes[i].name);
      list.value(attributes[i].value);
    }
    this.list(list, attributes.length);
  }

  tests(tests: Test[]): void {
    const list = new Writer();
    for (let i = 0; i < tests.length; i++) {
      const test = tests[i];
      list.text(test.attribute);
      list.u8(<u8>test.operator);
      const values = new Writer();
      for (let j = 0; j < test.values.length; j++) values.value(test.values[j]);
      list.list(values, test.values.length);
    }
    this.list(list, tests.length);
  }

  criteria(clauses: Test[][] | null): void {
    const end = this.variant(clauses == null ? 0 : 1, 4, 8);
    if (clauses != null) {
      const list = new Writer();
      for (let i = 0; i < clauses.length; i++) list.tests(clauses[i]);
      this.list(list, clauses.length);
    }
    this.endVariant(end, 4);
  }

  targets(targets: Target[]): void {
    const list = new Writer();
    for (let i = 0; i < targets.length; i++) {
      const end = list.variant(targets[i].kind, 4, 8);
      if (targets[i].kind != 2) list.text(targets[i].name);
      list.endVariant(end, 4);
    }
    this.list(list, targets.length);
  }

  routes(routes: Route[]): void {
    const list = new Writer();
    for (let i = 0; i < routes.length; i++) {
      const route = routes[i];
      list.align(8);
      list.targets(route.targets);
      list.criteria(route.when);
      list.optionalPriority(route.priority);
      const end = list.variant(route.ttlMs == NONE ? 0 : 1, 8, 8);
      if (route.ttlMs != NONE) list.u64(route.ttlMs);
      list.endVariant(end, 8);
      list.optionalText(route.collapseKey);
      list.optionalText(route.eventName);
      list.optionalText(route.body);
      list.attributes(route.options);
      list.align(8);
    }
    this.list(list, routes.length);
  }

  failure(failure: Failure): void {
    const end = this.variant(failure.isTemporary ? 1 : 0, 4, 8);
    this.text(failure.reason);
    this.endVariant(end, 4);
  }

  verdict(verdict: Verdict): void {
    const end = this.variant(verdict.kind, 4, 20);
    if (verdict.kind == 1) this.text(verdict.reason);
    if (verdict.kind == 2) {
      this.optionalPriority(verdict.priority);
      this.attributes(verdict.attributes);
      this.attributes(verdict.options);
    }
    this.endVariant(end, 4);
  }

  manifest(manifest: Manifest): void {
    this.text(manifest.name);
    this.text(manifest.version);
    this.text(manifest.description);
    this.texts(manifest.types);
    this.texts(manifest.attributes);
    this.texts(manifest.fields);
    this.u8(manifest.payload ? 1 : 0);
    this.optionalText(manifest.configSchema);
    this.attributes(manifest.options);
  }

  issues(issues: Issue[]): void {
    const list = new Writer();
    for (let i = 0; i < issues.length; i++) {
      list.text(issues[i].path);
      list.text(issues[i].message);
    }
    this.list(list, issues.length);
  }
}

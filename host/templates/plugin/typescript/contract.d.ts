// The plugin contract pointsman:plugin@0.1.0: the types of wit/types.wit and wit/plugin.wit as
// componentize-qjs passes them, and the modules of wit/host.wit. Types only: it has no code.

declare namespace Pointsman {
  type Priority = 'low' | 'normal' | 'high' | 'urgent';

  type Value =
    | { tag: 'text'; val: string }
    /** Exact up to 2^53. */
    | { tag: 'integer'; val: number }
    | { tag: 'decimal'; val: number }
    | { tag: 'flag'; val: boolean };

  interface Attribute {
    name: string;
    value: Value;
  }

  type Payload =
    | { tag: 'none' }
    | { tag: 'json'; val: string }
    | { tag: 'text'; val: string }
    | { tag: 'binary'; val: Uint8Array };

  interface Event {
    id: string;
    source: string;
    type: string;
    subject?: string;
    /** Milliseconds since the Unix epoch. */
    timeMs: number;
    priority: Priority;
    attributes: Attribute[];
    data: Payload;
  }

  type Operator =
    | 'equals'
    | 'not-equals'
    | 'one-of'
    | 'contains'
    | 'prefix'
    | 'less'
    | 'greater'
    | 'present'
    | 'absent'
    | 'not-one-of'
    | 'not-contains'
    | 'at-least'
    | 'at-most'
    | 'suffix';

  interface Test {
    attribute: string;
    operator: Operator;
    values: Value[];
  }

  type Target = { tag: 'user'; val: string } | { tag: 'group'; val: string } | { tag: 'everyone' };

  interface Route {
    targets: Target[];
    /** Restricts the targets to recipients for whom every test of at least one clause holds. */
    when?: { anyOf: Test[][] };
    priority?: Priority;
    /** Milliseconds. */
    ttlMs?: number;
    collapseKey?: string;
    eventName?: string;
    /** JSON that replaces the event's own data. */
    body?: string;
    /**
     * Further properties. The host knows `slot`, a text: the name of a notification of its own. It
     * refuses an unknown name.
     */
    options: Attribute[];
  }

  type Verdict =
    | { tag: 'keep' }
    | { tag: 'drop'; val: string }
    | { tag: 'amend'; val: { priority?: Priority; attributes: Attribute[]; options: Attribute[] } };

  /** Thrown by `evaluate` and `resolve`. */
  type Failure = { tag: 'reject'; val: string } | { tag: 'retry'; val: string };

  interface Manifest {
    name: string;
    version: string;
    description: string;
    types: string[];
    reads: { attributes: string[]; fields: string[]; payload: boolean };
    /** A JSON Schema. */
    configSchema?: string;
    /** Further properties; the host knows none. */
    options: Attribute[];
  }

  interface Issue {
    path: string;
    message: string;
  }

  interface Lifecycle {
    describe(): Manifest;
    /** Throws an array of Issue for a configuration that is not valid. */
    configure(config: string): void;
  }

  interface Filter {
    evaluate(event: Event): Verdict;
  }

  interface Router {
    resolve(event: Event): Route[];
  }
}

declare module 'pointsman:plugin/log@0.1.0' {
  export function log(level: 'trace' | 'debug' | 'info' | 'warn' | 'error', message: string): void;
}

declare module 'pointsman:plugin/clock@0.1.0' {
  /** Milliseconds since the Unix epoch; the time stands still during a call. */
  export function nowMs(): number;
}

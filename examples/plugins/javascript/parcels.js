// Tells customers of their parcels: a filter and a router. What it decides is in ../README.md.
//
// Integers of 64 bits are BigInt here. An `err` of the contract is thrown, as the plain value that it is.

import { nowMs } from 'pointsman:plugin/clock@0.1.0';
import { log } from 'pointsman:plugin/log@0.1.0';

const HOUR_MS = 3_600_000n;
const PRIORITIES = ['low', 'normal', 'high', 'urgent'];

let urgentFee = 100;

export const lifecycle = {
  describe: () => ({
    name: 'parcels',
    version: '0.1.0',
    description: 'Tells customers of their parcels',
    types: ['parcel.*'],
    reads: {
      attributes: ['customer', 'depot', 'late', 'test'],
      fields: ['/fee', '/heavier_than', '/hours_late', '/number'],
      payload: true,
    },
    configSchema: JSON.stringify({
      type: 'object',
      additionalProperties: false,
      properties: { urgent_fee: { type: 'number', minimum: 0, default: 100 } },
    }),
  }),

  configure(config) {
    const { urgent_fee = 100, ...unknown } = JSON.parse(config);
    const issues = Object.keys(unknown).map((path) => ({ path, message: 'is unknown; known is urgent_fee' }));
    if (typeof urgent_fee !== 'number' || urgent_fee < 0) {
      issues.push({ path: 'urgent_fee', message: 'give a number, 0 or more' });
    }
    if (issues.length > 0) throw issues;
    urgentFee = urgent_fee;
  },
};

export const filter = {
  evaluate: reporting((event) => {
    const attributes = attributesOf(event);
    const { test } = attributes;
    if (test?.val === true || test?.val === 'true') return { tag: 'drop', val: 'a test' };
    if (nowMs() > event.timeMs + 7n * 24n * HOUR_MS) return { tag: 'drop', val: 'older than 7 days' };
    if (number(attributes['/hours_late']) >= 24) {
      const isUrgentEnough = PRIORITIES.indexOf(event.priority) >= PRIORITIES.indexOf('high');
      const late = { name: 'late', value: { tag: 'flag', val: true } };
      return { tag: 'amend', val: { priority: isUrgentEnough ? undefined : 'high', attributes: [late] } };
    }
    return { tag: 'keep' };
  }),
};

export const router = {
  resolve: reporting((event) => {
    const attributes = attributesOf(event);
    switch (event.type) {
      case 'parcel.moved':
        return [moved(event, attributes)];
      case 'parcel.delivered':
        return [delivered(attributes)];
      case 'parcel.held':
        return held(attributes);
      case 'parcel.recalled':
        return [recalled(attributes)];
      default:
        return [];
    }
  }),
};

function moved(event, attributes) {
  const [customer, parcel] = [customerOf(attributes), numberOf(attributes)];
  const [place, stops] = lastPlace(event.data);
  return {
    targets: [customer],
    priority: attributes.late?.val === true ? undefined : 'low',
    ttlMs: 6n * HOUR_MS,
    collapseKey: `parcel-${parcel}`,
    eventName: 'parcel',
    body: JSON.stringify({ number: parcel, place, stops }),
  };
}

function delivered(attributes) {
  const [customer, parcel] = [customerOf(attributes), numberOf(attributes)];
  const depot = text(attributes.depot);
  const targets = depot ? [customer, { tag: 'group', val: `depot-${depot}` }] : [customer];
  return { targets, collapseKey: `parcel-${parcel}`, eventName: 'parcel' };
}

function held(attributes) {
  const customer = customerOf(attributes);
  const fee = number(attributes['/fee']);
  if (fee === undefined) throw { tag: 'retry', val: 'the fee is not known yet' };
  const onDuty = [
    [{ attribute: 'shift', operator: 'equals', values: [{ tag: 'text', val: 'day' }] }],
    [
      { attribute: 'role', operator: 'one-of', values: ['lead', 'stand-in'].map((val) => ({ tag: 'text', val })) },
      { attribute: 'open', operator: 'less', values: [{ tag: 'integer', val: 50n }] },
    ],
  ];
  return [
    { targets: [customer], priority: fee >= urgentFee ? 'urgent' : 'high', eventName: 'parcel' },
    { targets: [{ tag: 'group', val: 'customs' }], when: { anyOf: onDuty }, ttlMs: 12n * HOUR_MS },
  ];
}

function recalled(attributes) {
  const parcel = numberOf(attributes);
  const weight = attributes['/heavier_than'];
  log('warn', 'a recall goes to everyone');
  const concerned =
    number(weight) === undefined
      ? { attribute: 'parcels', operator: 'greater', values: [{ tag: 'integer', val: 0n }] }
      : { attribute: 'weight', operator: 'greater', values: [weight] };
  return {
    targets: [{ tag: 'everyone' }],
    when: { anyOf: [[{ attribute: 'staff', operator: 'present', values: [] }], [concerned]] },
    priority: 'urgent',
    ttlMs: 24n * HOUR_MS,
    collapseKey: `recall-${parcel}`,
    eventName: 'recall',
  };
}

/** Attributes and fields by their names. */
function attributesOf(event) {
  return Object.fromEntries(event.attributes.map(({ name, value }) => [name, value]));
}

function customerOf({ customer }) {
  const name = nameIn(customer);
  if (!name) throw reject('the event names no customer: give the attribute customer a text or a whole number');
  return { tag: 'user', val: name };
}

function numberOf(attributes) {
  const number = nameIn(attributes['/number']);
  if (!number) throw reject('the payload names no parcel: give /number a text or a whole number');
  return number;
}

/** Where the parcel is, and how many stops it has made. No JSON pointer says "the last one", so the payload is parsed here. */
function lastPlace(data) {
  const steps = data.tag === 'json' ? JSON.parse(data.val)?.steps : undefined;
  const place = Array.isArray(steps) ? steps.at(-1)?.place : undefined;
  if (typeof place !== 'string' || place === '') throw reject('the payload has no place: give the last of /steps a place');
  return [place, steps.length];
}

/** A text, or a whole number as one. Never by way of JSON.parse, which rounds what is beyond 2^53. */
function nameIn(value) {
  return value?.tag === 'integer' ? value.val.toString() : text(value);
}

function text(value) {
  return value?.tag === 'text' ? value.val : undefined;
}

function number(value) {
  return value?.tag === 'integer' || value?.tag === 'decimal' ? Number(value.val) : undefined;
}

function reject(why) {
  return { tag: 'reject', val: why };
}

/** What a bug throws goes to the operator's log; nothing else would say it, since the plugin has no standard error. */
function reporting(decide) {
  return (event) => {
    try {
      return decide(event);
    } catch (thrown) {
      if (thrown instanceof Error) log('error', `${thrown} at ${thrown.stack}`);
      throw thrown;
    }
  };
}

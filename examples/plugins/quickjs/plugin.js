// Notifies customers about their parcels: a filter and a router. ../README.md describes its
// decisions.
//
// 64-bit integers are numbers here, exact up to 2^53; that is the difference from ../javascript. An
// `err` of the contract is thrown as a plain value.

import { nowMs } from 'pointsman:plugin/clock@0.1.0';
import { log } from 'pointsman:plugin/log@0.1.0';

const HOUR_MS = 3_600_000;
const PRIORITIES = ['low', 'normal', 'high', 'urgent'];

let urgentFee = 100;

export const lifecycle = {
  describe: () => ({
    name: 'parcels',
    version: '0.1.0',
    description: 'Notifies customers about their parcels',
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
    options: [],
  }),

  configure(config) {
    const { urgent_fee = 100, ...unknown } = JSON.parse(config);
    const issues = Object.keys(unknown).map((path) => ({ path, message: 'is unknown; the only key is urgent_fee' }));
    if (typeof urgent_fee !== 'number' || urgent_fee < 0) {
      issues.push({ path: 'urgent_fee', message: 'use a number of 0 or more' });
    }
    if (issues.length > 0) throw issues;
    urgentFee = urgent_fee;
  },
};

export const filter = {
  evaluate: reporting((event) => {
    const attributes = attributesOf(event);
    const { test } = attributes;
    if (test?.val === true || test?.val === 'true') return { tag: 'drop', val: 'test event' };
    if (nowMs() > event.timeMs + 7 * 24 * HOUR_MS) return { tag: 'drop', val: 'older than 7 days' };
    if (number(attributes['/hours_late']) >= 24) {
      const isUrgentEnough = PRIORITIES.indexOf(event.priority) >= PRIORITIES.indexOf('high');
      const late = { name: 'late', value: { tag: 'flag', val: true } };
      return { tag: 'amend', val: { priority: isUrgentEnough ? undefined : 'high', attributes: [late], options: [] } };
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
    ttlMs: 6 * HOUR_MS,
    collapseKey: `parcel-${parcel}`,
    eventName: 'parcel',
    body: JSON.stringify({ number: parcel, place, stops }),
    options: [],
  };
}

function delivered(attributes) {
  const [customer, parcel] = [customerOf(attributes), numberOf(attributes)];
  const depot = text(attributes.depot);
  const targets = depot ? [customer, { tag: 'group', val: `depot-${depot}` }] : [customer];
  return { targets, collapseKey: `parcel-${parcel}`, eventName: 'parcel', options: [] };
}

function held(attributes) {
  const customer = customerOf(attributes);
  const fee = number(attributes['/fee']);
  if (fee === undefined) throw { tag: 'retry', val: 'the fee is not known yet' };
  const onDuty = [
    [{ attribute: 'shift', operator: 'equals', values: [{ tag: 'text', val: 'day' }] }],
    [
      { attribute: 'role', operator: 'one-of', values: ['lead', 'stand-in'].map((val) => ({ tag: 'text', val })) },
      { attribute: 'open', operator: 'less', values: [{ tag: 'integer', val: 50 }] },
    ],
  ];
  const slot = { name: 'slot', value: { tag: 'text', val: 'customs' } };
  return [
    { targets: [customer], priority: fee >= urgentFee ? 'urgent' : 'high', eventName: 'parcel', options: [] },
    { targets: [{ tag: 'group', val: 'customs' }], when: { anyOf: onDuty }, ttlMs: 12 * HOUR_MS, options: [slot] },
  ];
}

function recalled(attributes) {
  const parcel = numberOf(attributes);
  const weight = attributes['/heavier_than'];
  log('warn', 'a recall goes to everyone');
  const concerned =
    number(weight) === undefined
      ? { attribute: 'parcels', operator: 'greater', values: [{ tag: 'integer', val: 0 }] }
      : { attribute: 'weight', operator: 'greater', values: [weight] };
  return {
    targets: [{ tag: 'everyone' }],
    when: { anyOf: [[{ attribute: 'staff', operator: 'present', values: [] }], [concerned]] },
    priority: 'urgent',
    ttlMs: 24 * HOUR_MS,
    collapseKey: `recall-${parcel}`,
    eventName: 'recall',
    options: [],
  };
}

/** Returns the attributes and fields by name. */
function attributesOf(event) {
  return Object.fromEntries(event.attributes.map(({ name, value }) => [name, value]));
}

function customerOf({ customer }) {
  const name = nameIn(customer);
  if (!name) throw reject('the event has no customer; set the attribute customer to a text or an integer');
  return { tag: 'user', val: name };
}

function numberOf(attributes) {
  const number = nameIn(attributes['/number']);
  if (!number) throw reject('the payload has no parcel number; set /number to a text or an integer');
  return number;
}

/**
 * Returns the location of the parcel and its number of stops. A JSON pointer cannot select the last
 * element of a list, so the payload is parsed here.
 */
function lastPlace(data) {
  const steps = data.tag === 'json' ? JSON.parse(data.val)?.steps : undefined;
  const place = Array.isArray(steps) ? steps.at(-1)?.place : undefined;
  if (typeof place !== 'string' || place === '') throw reject('the payload has no place; set place in the last element of /steps');
  return [place, steps.length];
}

/** Returns a text, or an integer as text. JSON.parse would round integers beyond 2^53. */
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

/** Logs unexpected exceptions, which would otherwise be lost: a plugin has no standard error. */
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

// A second implementation of the four bundled plugins (discard, prioritize, address and rules),
// written from their documentation in another language, with the part of the host that connects
// them. It shares no code with them; tests/decisions.rs compares both.
//
// node second.js PLUGINS.json EVENTS.jsonl prints one decision per line.

import { readFileSync } from 'node:fs';

import { byCodePoint, isLarge, narrow, parse, plain, write } from './json.js';

const CONTEXT = ['specversion', 'id', 'source', 'type', 'subject', 'time', 'datacontenttype', 'dataschema', 'data', 'data_base64'];
const PRIORITIES = ['low', 'normal', 'high', 'urgent'];

// Publishers write the words in any case, and some write `medium`.
function priorityOf(word) {
  const lower = typeof word === 'string' ? word.replace(/[A-Z]/g, (letter) => letter.toLowerCase()) : undefined;
  if (lower === 'medium') return 'normal';
  return PRIORITIES.includes(lower) ? lower : undefined;
}

// --- Events as a plugin sees them: integers are BigInt, decimals are numbers, lists and objects
// are their JSON text, and null is absent.

function readEvent(text, nowMs) {
  const document = parse(text);
  const attributes = new Map();
  for (const [name, value] of document) {
    if (CONTEXT.includes(name) || value === null) continue;
    attributes.set(name, Array.isArray(value) ? value.raw : narrow(value));
  }
  const type = document.get('datacontenttype') ?? 'application/json';
  const isJson = /(\/|\+)json$/.test(type.split(';')[0].trim().toLowerCase());
  const published = attributes.get('priority');
  return {
    id: document.get('id'),
    source: document.get('source'),
    type: document.get('type'),
    subject: document.get('subject') ?? undefined,
    timeMs: document.has('time') ? Date.parse(document.get('time')) : nowMs,
    priority: priorityOf(published) ?? 'normal',
    attributes,
    payload: isJson && !document.has('data_base64') ? document.get('data') : undefined,
  };
}

function follow(document, pointer) {
  let value = document;
  for (const step of pointer.slice(1).split('/')) {
    const name = step.replaceAll('~1', '/').replaceAll('~0', '~');
    if (value instanceof Map) value = value.get(name);
    else if (Array.isArray(value) && /^(0|[1-9][0-9]*)$/.test(name)) value = value[Number(name)];
    else return undefined;
  }
  return value;
}

function field(event, pointer) {
  const value = follow(event.payload, pointer);
  if (value === undefined || value === null) return undefined;
  return typeof value === 'object' ? write(narrow(value)) : narrow(value);
}

function select(event, selector) {
  if (selector.startsWith('/')) return field(event, selector);
  if (['id', 'source', 'type', 'subject'].includes(selector)) return event[selector];
  return event.attributes.get(selector);
}

// Formats a value within a longer text.
function spell(value) {
  return typeof value === 'number' ? plain(value) : String(value);
}

// --- Tests of values.

const isNumber = (value) => typeof value === 'number' || typeof value === 'bigint';
const kind = (value) => (isNumber(value) ? 'number' : typeof value);

// An attribute is converted to the type of the operand; a field keeps its own type.
function readAs(value, wantedKind, isField) {
  if (isField || kind(value) === wantedKind) return value;
  if (wantedKind === 'string' && typeof value !== 'number') return String(value);
  if (wantedKind === 'number' && typeof value === 'string') return numeral(value);
  if (wantedKind === 'boolean' && ['true', 'false'].includes(value)) return value === 'true';
  return value;
}

function numeral(text) {
  if (!/^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?$/.test(text)) return text;
  const number = parse(text);
  if (!Number.isFinite(Number(number))) return text;
  return isLarge(number) ? Number(number) : number;
}

// Returns a number below 0, 0 or above 0; undefined for values of different kinds. JavaScript
// compares BigInt and number exactly.
function compare(value, wanted, isField) {
  const read = readAs(value, kind(wanted), isField);
  if (kind(read) !== kind(wanted)) return undefined;
  if (typeof read === 'string') return byCodePoint(read, wanted);
  return read < wanted ? -1 : read > wanted ? 1 : 0;
}

function asText(value, isField) {
  const text = readAs(value, 'string', isField);
  return typeof text === 'string' ? text : undefined;
}

const list = (oneOrMore) => (Array.isArray(oneOrMore) ? oneOrMore : [oneOrMore]);

function elements(value) {
  if (typeof value !== 'string' || !value.startsWith('[')) return undefined;
  try {
    return parse(value);
  } catch {
    return undefined;
  }
}

const OPERATORS = {
  equals: (value, wanted, isField) => compare(value, wanted, isField) === 0,
  not_equals: (value, wanted, isField) => ![0, undefined].includes(compare(value, wanted, isField)),
  one_of: (value, wanted, isField) => list(wanted).some((one) => compare(value, one, isField) === 0),
  prefix: (value, wanted, isField) => asText(value, isField)?.startsWith(wanted) ?? false,
  suffix: (value, wanted, isField) => asText(value, isField)?.endsWith(wanted) ?? false,
  contains: (value, wanted, isField) => asText(value, isField)?.includes(wanted) ?? false,
  matches: (value, wanted, isField) => {
    const text = asText(value, isField);
    return text !== undefined && new TextEncoder().encode(text).length <= 16 * 1024 && new RegExp(wanted, 'su').test(text);
  },
  less: (value, wanted, isField) => compare(value, wanted, isField) < 0,
  at_most: (value, wanted, isField) => compare(value, wanted, isField) <= 0,
  greater: (value, wanted, isField) => compare(value, wanted, isField) > 0,
  at_least: (value, wanted, isField) => compare(value, wanted, isField) >= 0,
  includes: (value, wanted) =>
    (elements(value) ?? []).some((element) => element !== null && typeof element !== 'object' && list(wanted).some((one) => compare(narrow(element), one, true) === 0)),
  present: (value, wanted) => wanted,
};

function isWanted(value, wanted, isField) {
  if (Array.isArray(wanted)) return isWanted(value, new Map([['one_of', wanted]]), isField);
  if (!(wanted instanceof Map)) return isWanted(value, new Map([['equals', wanted]]), isField);
  if (value === undefined) return wanted.get('present') === false;
  return [...wanted].every(([operator, argument]) => OPERATORS[operator](value, argument, isField));
}

// --- Conditions and their descriptions.

function glob(pattern, text) {
  const quoted = pattern.replace(/[.+?^${}()|[\]\\/]/g, '\\$&').replaceAll('*', '.*');
  return new RegExp(`^${quoted}$`, 'su').test(text);
}

function holds(condition, event, nowMs) {
  const every = {
    type: (patterns) => list(patterns).some((pattern) => glob(pattern, event.type)),
    source: (wanted) => isWanted(event.source, wanted, false),
    subject: (wanted) => isWanted(event.subject, wanted, false),
    priority: (priorities) => list(priorities).map(priorityOf).includes(event.priority),
    attributes: (table) => [...table].every(([name, wanted]) => isWanted(event.attributes.get(name), wanted, false)),
    payload: (table) => [...table].every(([pointer, wanted]) => isWanted(field(event, pointer), wanted, true)),
    older_than_s: (seconds) => nowMs - event.timeMs > Number(seconds) * 1000,
    all: (conditions) => list(conditions).every((inner) => holds(inner, event, nowMs)),
    any: (conditions) => list(conditions).some((inner) => holds(inner, event, nowMs)),
    not: (inner) => !holds(inner, event, nowMs),
  };
  return [...condition].every(([key, said]) => every[key](said));
}

function tellWanted(name, wanted) {
  if (Array.isArray(wanted)) return tellWanted(name, new Map([['one_of', wanted]]));
  if (!(wanted instanceof Map)) return tellWanted(name, new Map([['equals', wanted]]));
  const or = (values) => list(values).map(spell).join(' or ');
  const words = {
    equals: (value) => `is ${spell(value)}`,
    not_equals: (value) => `is not ${spell(value)}`,
    one_of: (values) => `is ${or(values)}`,
    prefix: (text) => `begins with ${text}`,
    suffix: (text) => `ends with ${text}`,
    contains: (text) => `contains ${text}`,
    matches: (expression) => `matches ${expression}`,
    at_least: (bound) => `is at least ${spell(bound)}`,
    greater: (bound) => `is above ${spell(bound)}`,
    at_most: (bound) => `is at most ${spell(bound)}`,
    less: (bound) => `is below ${spell(bound)}`,
    includes: (values) => `includes ${or(values)}`,
    present: (isThere) => (isThere ? 'is present' : 'is absent'),
  };
  const said = Object.keys(words).filter((operator) => wanted.has(operator));
  return `${name} ${said.map((operator) => words[operator](wanted.get(operator))).join(' and ')}`;
}

function tell(condition) {
  const sorted = (table) => [...table].sort(([a], [b]) => byCodePoint(a, b)).map(([name, wanted]) => tellWanted(name, wanted));
  const joined = (conditions, word) => {
    const told = list(conditions).map(tell).join(word);
    return list(conditions).length > 1 ? `(${told})` : told;
  };
  const words = {
    type: (patterns) => `type is ${list(patterns).join(' or ')}`,
    source: (wanted) => tellWanted('source', wanted),
    subject: (wanted) => tellWanted('subject', wanted),
    priority: (priorities) => `priority is ${list(priorities).map(priorityOf).join(' or ')}`,
    attributes: sorted,
    payload: sorted,
    older_than_s: (seconds) => `older than ${seconds} s`,
    all: (conditions) => joined(conditions, ' and '),
    any: (conditions) => joined(conditions, ' or '),
    not: (inner) => `not (${tell(inner)})`,
  };
  const said = Object.keys(words).filter((key) => condition.has(key));
  return said.flatMap((key) => words[key](condition.get(key))).join(' and ');
}

// --- prioritize and discard.

function prioritize(tables, event, nowMs) {
  let isSet = false;
  for (const table of tables) {
    if (table.has('match') && !holds(table.get('match'), event, nowMs)) continue;
    const by = table.get('by');
    const value = select(event, by);
    const row = (table.get('rows') ?? []).find((one) => isWanted(value, one.get('value'), by.startsWith('/')));
    const change = row ?? table.get('default') ?? new Map();
    isSet ||= change.has('priority');
    event.priority = priorityOf(change.get('priority')) ?? event.priority;
    for (const [name, set] of change.get('attributes') ?? []) event.attributes.set(name, narrow(set));
  }
  // Routers see the priority that a filter set, not the word that it replaced.
  if (isSet && event.attributes.has('priority')) event.attributes.set('priority', event.priority);
}

function discard(rules, event, nowMs) {
  const rule = rules.find((one) => holds(one.get('match'), event, nowMs));
  return rule && (rule.get('reason') ?? tell(rule.get('match')));
}

// --- address.

class Rejected extends Error {}

function address(event) {
  const get = (name) => event.attributes.get(name);
  const reject = (name, fix) => {
    const shown = Array.from(spell(get(name))).slice(0, 64).join('');
    throw new Rejected(`the attribute ${name} is '${shown}'; ${fix}`);
  };
  const name = (attribute) => {
    const value = get(attribute);
    if (typeof value === 'bigint') return String(value);
    if (typeof value === 'string' && value.trim() !== '') return value;
    return reject(attribute, 'use a non-empty text or remove the attribute');
  };
  const names = (attribute) => {
    const value = get(attribute);
    const refuse = () => reject(attribute, 'use comma-separated names (a,b) or a JSON array of strings or integers (["a",42])');
    let found;
    if (typeof value === 'bigint') found = [String(value)];
    else if (typeof value !== 'string') refuse();
    else if (value.trimStart().startsWith('[')) {
      try {
        found = parse(value);
      } catch {
        refuse();
      }
      if (found.some((element) => !['string', 'bigint'].includes(typeof element))) refuse();
      found = found.map(String);
    } else found = value.trim() === '' ? [] : value.split(',').map((one) => one.trim());
    return found.some((one) => one.trim() === '') ? refuse() : found;
  };
  const targets = [];
  for (const [one, several, letter] of [['user', 'users', 'u'], ['group', 'groups', 'g']]) {
    if (get(one) !== undefined) targets.push(`${letter}:${name(one)}`);
    if (get(several) !== undefined) targets.push(...names(several).map((each) => `${letter}:${each}`));
  }
  const everyone = get('everyone');
  if (![undefined, true, false, 'true', 'false'].includes(everyone)) reject('everyone', 'use true or false');
  if (everyone === true || everyone === 'true') targets.push('all');
  const priority = get('priority');
  if (priority !== undefined && priorityOf(priority) === undefined) reject('priority', 'use low, normal, high or urgent');
  let ttl;
  if (get('ttl') !== undefined) {
    ttl = ttlMs(get('ttl'));
    if (!ttl) reject('ttl', 'use a number of seconds above 0 or a number with a unit: 500ms, 30s, 5m, 2h');
  }
  const collapse = get('collapse') === undefined ? undefined : name('collapse');
  return targets.length === 0 ? [] : [{ by: 'address', to: targets, priority: event.priority, ttl_ms: ttl, collapse }];
}

const U64_MAX = 2n ** 64n - 1n;

function ttlMs(value) {
  const units = { ms: 1n, s: 1000n, m: 60000n, h: 3600000n };
  const match = /^([0-9]+)(ms|s|m|h)?$/.exec(String(value));
  if (!match || typeof value === 'number' || typeof value === 'boolean') return undefined;
  const ms = BigInt(match[1]) * units[match[2] ?? 's'];
  return ms > U64_MAX || ms === 0n ? undefined : ms;
}

// --- rules.

// Returns literal texts as strings and selectors as objects.
function templateParts(text) {
  const parts = [];
  let literal = '';
  for (const [whole, selector] of text.matchAll(/\{\{|\}\}|\{([^{}]*)\}|[^{}]+/gu)) {
    if (selector === undefined) {
      literal += whole === '{{' || whole === '}}' ? whole[0] : whole;
    } else {
      if (literal !== '') parts.push(literal);
      parts.push({ selector });
      literal = '';
    }
  }
  return literal === '' ? parts : [...parts, literal];
}

const isUsable = (name) => name !== '' && Buffer.byteLength(name) <= 256 && !/\p{Cc}/u.test(name);

// Leaves out the names that the plugin considers invalid.
function templateNames(text, event, mayBeList) {
  let names = [''];
  let lists = 0;
  for (const part of templateParts(text)) {
    if (typeof part === 'string') {
      names = names.map((name) => name + part);
      continue;
    }
    const value = select(event, part.selector);
    const found = mayBeList ? elements(value) : undefined;
    if (found) {
      lists++;
      const usable = found.filter((element) => (typeof element === 'string' && element !== '') || (typeof element === 'bigint' && element === narrow(element)));
      names = names.flatMap((name) => usable.map((element) => name + element));
    } else if (typeof value === 'bigint' || (typeof value === 'string' && value !== '')) {
      names = names.map((name) => name + value);
    } else {
      return [];
    }
  }
  return lists > 1 ? [] : names.filter(isUsable);
}

const WORDS = ['equals', 'not_equals', 'one_of', 'not_one_of', 'contains', 'not_contains', 'prefix', 'suffix', 'less', 'at_most', 'greater', 'at_least', 'present', 'absent'];

// Returns the tests of a clause, filled in with values of the event; undefined if a value is
// missing.
function recipientTests(clause, event) {
  const tests = [];
  for (const [attribute, said] of [...clause].sort(([a], [b]) => byCodePoint(a, b))) {
    const table = said instanceof Map ? said : new Map([[Array.isArray(said) ? 'one_of' : 'equals', said]]);
    for (const word of WORDS.filter((one) => table.has(one))) {
      const isPresence = word === 'present' || word === 'absent';
      const values = isPresence ? [] : list(table.get(word)).map((term) => recipientValue(term, word, event));
      if (values.includes(undefined)) return undefined;
      // `present = false` and `absent = true` say the same.
      const presence = table.get(word) === (word === 'present') ? 'present' : 'absent';
      const operator = isPresence ? presence : word.replaceAll('_', '-');
      tests.push({ attribute, operator, values: values.length > 0 ? values : undefined });
    }
  }
  return tests;
}

function recipientValue(term, word, event) {
  if (typeof term !== 'string') return narrow(term);
  const parts = templateParts(term);
  const isSingle = parts.length === 1 && typeof parts[0] === 'object';
  const values = parts.map((part) => (typeof part === 'string' ? part : select(event, part.selector)));
  if (values.includes(undefined)) return undefined;
  const value = isSingle ? values[0] : values.map(spell).join('');
  if (word === 'prefix' || word === 'suffix') return spell(value);
  if (!['less', 'at_most', 'greater', 'at_least'].includes(word)) return value;
  const isAttribute = isSingle && !parts[0].selector.startsWith('/') && !['id', 'source', 'type', 'subject'].includes(parts[0].selector);
  const number = isAttribute && typeof value === 'string' ? numeral(value) : value;
  return isNumber(number) ? number : undefined;
}

function fillBody(body, event) {
  if (Array.isArray(body)) return body.map((element) => fillBody(element, event));
  if (body instanceof Map) return new Map([...body].map(([name, member]) => [name, fillBody(member, event)]));
  if (typeof body !== 'string') return body;
  const parts = templateParts(body);
  if (parts.length === 1 && typeof parts[0] === 'object') {
    const { selector } = parts[0];
    return (selector.startsWith('/') ? follow(event.payload, selector) : select(event, selector)) ?? null;
  }
  return parts.map((part) => (typeof part === 'string' ? part : spell(select(event, part.selector) ?? ''))).join('');
}

function rules(list_, event, nowMs) {
  const routes = [];
  for (const rule of list_) {
    if (rule.has('match') && !holds(rule.get('match'), event, nowMs)) continue;
    const route = rule.has('to') ? ruleRoute(rule, event) : undefined;
    if (route) routes.push(route);
    if (rule.get('stop')) break;
  }
  return routes;
}

function ruleRoute(rule, event) {
  const to = [];
  for (const [one, several, letter] of [['user', 'users', 'u'], ['group', 'groups', 'g']]) {
    for (const key of [one, several].filter((each) => rule.get('to').has(each))) {
      for (const template of list(rule.get('to').get(key))) {
        to.push(...templateNames(template, event, true).map((name) => `${letter}:${name}`));
      }
    }
  }
  if (rule.get('to').get('everyone')) to.push('all');
  if (to.length === 0) return undefined;
  let when;
  if (rule.has('when')) {
    when = list(rule.get('when')).map((clause) => recipientTests(clause, event)).filter((tests) => tests !== undefined);
    if (when.length === 0) return undefined;
  }
  return {
    by: 'rules',
    to,
    when,
    priority: priorityOf(rule.get('priority')) ?? event.priority,
    ttl_ms: rule.has('ttl') ? ttlMs(rule.get('ttl')) : undefined,
    collapse: rule.has('collapse') ? templateNames(rule.get('collapse'), event, false)[0] : undefined,
    event_name: rule.get('event_name'),
    body: rule.has('body') ? { is: fillBody(rule.get('body'), event) } : undefined,
    slot: rule.get('slot'),
  };
}

// --- All four plugins, in the order in which the node calls them.

function decide(text, plugins, nowMs) {
  const event = readEvent(text, nowMs);
  const published = { priority: event.priority, attributes: new Map(event.attributes) };
  prioritize(plugins.get('prioritize').get('tables'), event, nowMs);
  const { id } = event;
  const now = () => ({ id, priority: event.priority, attributes: new Map(event.attributes) });
  const reason = discard(plugins.get('discard').get('rules'), event, nowMs);
  if (reason !== undefined) return { ...now(), outcome: 'discarded', plugin: 'discard', reason, routes: [] };
  try {
    const routes = [...address(event), ...rules(plugins.get('rules').get('rules'), event, nowMs)];
    return { ...now(), outcome: routes.length > 0 ? 'committed' : 'unrouted', routes };
  } catch (error) {
    if (!(error instanceof Rejected)) throw error;
    // A dead letter keeps the event as published, so that it can be retried.
    return { ...now(), ...published, outcome: 'dead-lettered', plugin: 'address', reason: error.message, routes: [] };
  }
}

const [pluginsFile, eventsFile] = process.argv.slice(2);
const plugins = parse(readFileSync(pluginsFile, 'utf8'));
const nowMs = Date.now();
for (const line of readFileSync(eventsFile, 'utf8').split('\n').filter((text) => text !== '')) {
  console.log(write(decide(line, plugins, nowMs)));
}

// A JSON parser for this test. Unlike JSON.parse, it reads integers as exact BigInt and decimals as
// numbers, so that 5 and 5.0 differ. Objects are Maps. A list keeps its source text as `raw`.

const I64 = [-(2n ** 63n), 2n ** 63n - 1n];

export function parse(text) {
  let at = 0;

  function value() {
    white();
    const begin = at;
    switch (text[at]) {
      case '{': {
        const members = new Map();
        at++;
        for (white(); text[at] !== '}'; white()) {
          if (members.size > 0) expect(',');
          white();
          const name = string();
          white();
          expect(':');
          members.delete(name);
          members.set(name, value());
        }
        at++;
        return members;
      }
      case '[': {
        const list = [];
        at++;
        for (white(); text[at] !== ']'; white()) {
          if (list.length > 0) expect(',');
          list.push(value());
        }
        at++;
        list.raw = oneLine(text.slice(begin, at));
        return list;
      }
      case '"':
        return string();
      case 't':
        return word('true', true);
      case 'f':
        return word('false', false);
      case 'n':
        return word('null', null);
      default:
        return number();
    }
  }

  function white() {
    while (' \t\r\n'.includes(text[at] ?? 'x')) at++;
  }

  function expect(character) {
    if (text[at] !== character) throw new SyntaxError(`expected ${character} at ${at}, not ${text.slice(at, at + 20)}`);
    at++;
  }

  function word(name, meaning) {
    for (const character of name) expect(character);
    return meaning;
  }

  function string() {
    const begin = at;
    expect('"');
    while (text[at] !== '"') at += text[at] === '\\' ? 2 : 1;
    at++;
    return JSON.parse(text.slice(begin, at));
  }

  function number() {
    const found = /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
    found.lastIndex = at;
    const match = found.exec(text);
    if (!match) throw new SyntaxError(`no number at ${at}: ${text.slice(at, at + 20)}`);
    at += match[0].length;
    return numeral(match[0]);
  }

  const parsed = value();
  white();
  if (at !== text.length) throw new SyntaxError(`more at ${at}`);
  return parsed;
}

// "-0" is a decimal.
function numeral(text) {
  return /[.eE]/.test(text) || text === '-0' ? Number(text) : BigInt(text);
}

// Removes white space outside strings.
function oneLine(text) {
  return text.replace(/("(?:[^"\\]|\\.)*")|[ \t\r\n]+/g, '$1');
}

// Converts to the values of an event, where an integer is a signed 64-bit number. A larger integer
// becomes a text with its digits, also within lists and objects.
export function narrow(value) {
  if (isLarge(value)) return String(value);
  if (Array.isArray(value)) return value.map(narrow);
  if (value instanceof Map) return new Map([...value].map(([name, member]) => [name, narrow(member)]));
  return value;
}

export function isLarge(value) {
  return typeof value === 'bigint' && (value < I64[0] || value > I64[1]);
}

// Writes JSON on one line, with members sorted by code point. Decimals are written so that they
// read back as decimals.
export function write(value) {
  if (value === null || value === undefined) return 'null';
  if (typeof value === 'bigint' || typeof value === 'boolean') return String(value);
  if (typeof value === 'string') return JSON.stringify(value);
  if (typeof value === 'number') return decimal(value);
  if (Array.isArray(value)) return `[${value.map(write).join(',')}]`;
  const members = value instanceof Map ? [...value] : Object.entries(value).filter(([, member]) => member !== undefined);
  members.sort(([a], [b]) => byCodePoint(a, b));
  return `{${members.map(([name, member]) => `${JSON.stringify(name)}:${write(member)}`).join(',')}}`;
}

function decimal(number) {
  if (Object.is(number, -0)) return '-0.0';
  const size = Math.abs(number);
  if (size >= 1e16 || (size < 1e-5 && size > 0)) return number.toExponential().replace('+', '');
  return Number.isInteger(number) ? `${number}.0` : plain(number);
}

// Formats without an exponent: the shortest digits that read back, padded with zeros.
export function plain(number) {
  const sign = number < 0 || Object.is(number, -0) ? '-' : '';
  const [digits, exponent] = Math.abs(number).toExponential().split('e');
  const bare = digits.replace('.', '');
  const point = Number(exponent) + 1;
  if (number === 0) return `${sign}0`;
  if (point <= 0) return `${sign}0.${'0'.repeat(-point)}${bare}`;
  if (point >= bare.length) return `${sign}${bare}${'0'.repeat(point - bare.length)}`;
  return `${sign}${bare.slice(0, point)}.${bare.slice(point)}`;
}

// Compares by code point. JavaScript compares UTF-16 code units, where characters beyond U+FFFF
// sort before U+E000.
export function byCodePoint(a, b) {
  const [x, y] = [Array.from(a), Array.from(b)];
  for (let n = 0; n < Math.min(x.length, y.length); n++) {
    if (x[n] !== y[n]) return x[n].codePointAt(0) - y[n].codePointAt(0);
  }
  return x.length - y.length;
}

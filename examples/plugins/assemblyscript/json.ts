// Reads JSON that is known to be valid, as the host guarantees for payloads and configurations. It
// checks nothing. It has only the functions that plugin.ts needs.

const QUOTE: i32 = 0x22;
const BACKSLASH: i32 = 0x5c;

/** A value in a text. */
export class Json {
  private constructor(private text: string, private at: i32) {}

  static parse(text: string): Json {
    return new Json(text, skipSpace(text, 0));
  }

  /** The member with this name, or the last one if there are several; null if there is none. */
  member(name: string): Json | null {
    let found: Json | null = null;
    const members = this.elements(0x7b /* { */);
    for (let i = 0; i < members.length; i++) {
      if (members[i].string() == name) found = members[i].value();
    }
    return found;
  }

  /** The names of the members; empty if this is not an object. */
  names(): string[] {
    return this.elements(0x7b /* { */).map<string>((member) => member.string()!);
  }

  isList(): bool {
    return this.text.charCodeAt(this.at) == 0x5b /* [ */;
  }

  /** The elements of a list; empty if this is not a list. */
  items(): Json[] {
    return this.elements(0x5b /* [ */);
  }

  /** Null if this is not a string. */
  string(): string | null {
    if (this.text.charCodeAt(this.at) != QUOTE) return null;
    let decoded = "";
    let from = this.at + 1;
    let at = from;
    for (; this.text.charCodeAt(at) != QUOTE; at++) {
      if (this.text.charCodeAt(at) != BACKSLASH) continue;
      decoded += this.text.substring(from, at);
      at++;
      const c = this.text.charCodeAt(at);
      const escape = "bfnrt".indexOf(String.fromCharCode(c));
      if (c == 0x75 /* u */) {
        decoded += String.fromCharCode(<i32>parseInt(this.text.substring(at + 1, at + 5), 16));
        at += 4;
      } else {
        decoded += escape < 0 ? String.fromCharCode(c) : "\b\f\n\r\t".charAt(escape);
      }
      from = at + 1;
    }
    return decoded + this.text.substring(from, at);
  }

  /** NaN if this is not a number. */
  number(): f64 {
    const c = this.text.charCodeAt(this.at);
    if (c != 0x2d /* - */ && (c < 0x30 /* 0 */ || c > 0x39 /* 9 */)) return NaN;
    return parseFloat(this.text.substring(this.at, skipValue(this.text, this.at)));
  }

  /** The value of a member that begins here. */
  private value(): Json {
    const colon = skipSpace(this.text, skipString(this.text, this.at));
    return new Json(this.text, skipSpace(this.text, colon + 1));
  }

  /** The elements of a list, or the members of an object. */
  private elements(open: i32): Json[] {
    const elements: Json[] = [];
    if (this.text.charCodeAt(this.at) != open) return elements;
    let at = skipSpace(this.text, this.at + 1);
    // The closing bracket has the code of the opening one plus 2.
    while (this.text.charCodeAt(at) != open + 2) {
      const element = new Json(this.text, at);
      elements.push(element);
      at = skipValue(this.text, open == 0x7b ? element.value().at : at);
      at = skipSpace(this.text, at);
      if (this.text.charCodeAt(at) == 0x2c /* , */) at = skipSpace(this.text, at + 1);
    }
    return elements;
  }
}

/** A text as JSON. */
export function quoted(text: string): string {
  let json = '"';
  for (let i = 0; i < text.length; i++) {
    const c = text.charCodeAt(i);
    if (c == QUOTE || c == BACKSLASH) json += "\\" + String.fromCharCode(c);
    else if (c < 0x20) json += "\\u" + c.toString(16).padStart(4, "0");
    else json += String.fromCharCode(c);
  }
  return json + '"';
}

function skipSpace(text: string, from: i32): i32 {
  let at = from;
  while (at < text.length && text.charCodeAt(at) <= 0x20) at++;
  return at;
}

function skipString(text: string, from: i32): i32 {
  let at = from + 1;
  for (; text.charCodeAt(at) != QUOTE; at++) {
    if (text.charCodeAt(at) == BACKSLASH) at++;
  }
  return at + 1;
}

/** Iterative, so that deep nesting cannot overflow the stack. */
function skipValue(text: string, from: i32): i32 {
  let at = from;
  let depth = 0;
  while (at < text.length) {
    const c = text.charCodeAt(at);
    if (c == QUOTE) {
      at = skipString(text, at);
      if (depth == 0) break;
      continue;
    }
    if (c == 0x7b || c == 0x5b) depth++;
    else if (c == 0x7d || c == 0x5d) {
      // The end of the list or object that a number or a word is in.
      if (depth == 0) break;
      depth--;
      if (depth == 0) return at + 1;
    } else if (depth == 0 && (c == 0x2c || c <= 0x20)) break;
    at++;
  }
  return at;
}

// One device on the page: the stream of a user, the notifications that arrived, and counts of their
// fate. Two devices of the same user are independent.
//
// The page computes all counts from the notifications that arrive. The exception is `lost`, which
// compares them with GET /v1/notifications.

import { connect } from "./pointsman.js";
import { clock, element, words } from "./words.js";

const MOST_SHOWN = 250;         // entries in the list; older ones are removed
const MOST_REMEMBERED = 20_000; // notifications remembered in order to detect duplicates
const MOST_AHEAD = 8;           // urgent notifications whose overtaken ones are counted
const LOOK_EVERY = 5_000;       // milliseconds between two comparisons with the log
const LOOK_AGAIN = 3_000;       // milliseconds until a logged but missing notification is lost
const TYPING = 4_000;           // milliseconds for which "is typing" is shown

const RANK = { low: 0, normal: 1, high: 2, urgent: 3 };
/** Transient states: a newer one replaces an older one, or they expire. Neither is a loss. */
const PASSING = new Set(["match.score", "chat.typing"]);

export class Device {
  #name;
  #at;     // elements by name
  #announce;
  #stream = null;      // the connection; null while the device is cut
  #positions = null;   // where a cut device resumes
  #user = null;
  #seen = new Set();
  #lost = new Set();
  #counts = {};
  #score = {};         // the latest update of a match
  #ahead = [];         // { time, rank, n, badge } of urgent notifications
  #away = null;        // { from, until, late, replaced, mark } of the last interruption
  #row = null;         // the entry that collects the rows of a report
  #aside = "";         // the text next to the score while no one is typing
  #typing = 0;         // the timer that clears the typing text
  #looked = "";        // the cursor up to which the log has been compared

  /** Fills in the section. `announce(text)` announces a text to users of screen readers. */
  constructor(name, section, people, announce) {
    this.#name = name;
    this.#announce = announce;
    const find = (selector) => section.querySelector(selector);
    this.#at = {
      state: find(".state"), user: find(".user"), other: find(".other"), traits: find(".traits"), cut: find(".cut"),
      score: find(".score"), notes: find(".notes"), empty: find(".empty"),
      counts: Object.fromEntries([...section.querySelectorAll("[data-count]")].map((count) => [count.dataset.count, count])),
    };
    const title = find("h2");
    title.textContent = `Device ${name}`;
    title.id = `device-${name}`;
    section.setAttribute("aria-labelledby", title.id);
    this.#at.notes.setAttribute("aria-label", `Notifications on device ${name}, newest first`);
    this.#at.user.setAttribute("aria-label", `User of device ${name}`);
    this.#at.user.append(...people.map((person) => new Option(person)), new Option("another user …", ""));
    this.#at.user.onchange = () => (this.#at.user.value ? this.listen(this.#at.user.value) : this.#askWho());
    this.#at.other.onsubmit = (event) => {
      event.preventDefault();
      this.listen(new FormData(this.#at.other).get("user"));
    };
    this.#at.cut.onclick = () => (this.#stream ? this.#cut() : this.#resume());
    setInterval(() => this.#look(), LOOK_EVERY);
  }

  /** The user whose stream the device follows; `null` before the first. */
  get user() {
    return this.#user;
  }

  /** Opens the stream of a user. A device that has read it before continues where it stopped. */
  listen(user) {
    const before = this.#stream;
    this.#stream = null;
    before?.close();
    this.#user = user;
    const { user: select, other, state, notes, empty, score } = this.#at;
    if (![...select.options].some((option) => option.value === user)) select.add(new Option(user), select.options.length - 1);
    select.value = user;
    other.hidden = true;
    this.#seen.clear();
    this.#lost.clear();
    this.#score = {};
    this.#counts = { received: 0, late: 0, replaced: 0, twice: 0, lost: 0 };
    this.#ahead = [];
    this.#row = null;
    state.dataset.state = "";
    notes.replaceChildren();
    score.hidden = true;
    empty.textContent = "Nothing has arrived yet.";
    empty.hidden = false;
    this.#showCounts();
    this.#showTraits(user);
    this.#looked = "";
    this.#away = wentAway(-Infinity);
    // Not in `localStorage`: a page that is opened again resumes at the device cursor of the node,
    // which a node that was started with an empty log does not have.
    const kept = new Map();
    this.#positions = { getItem: (name) => kept.get(name), setItem: (name, id) => kept.set(name, id) };
    this.#resume();
  }

  #resume() {
    const stream = connect(`/v1/stream?user=${encodeURIComponent(this.#user)}`, {
      device: `demo-${this.#name}`,
      storage: this.#positions,
      onNotification: (note, { id }) => {
        this.#looked ||= id;
        this.#take(note, id);
      },
      onGap: ({ reason }) => this.#mark(`history may be incomplete: ${reason}`, "gap"),
      onState: (state, { reason }) => {
        this.#looked ||= stream.position;
        if (this.#stream === stream) this.#becomes(state, reason);
      },
    });
    this.#stream = stream;
    this.#becomes(stream.state);
  }

  /** Closes the connection. Notifications published in the meantime wait in the log. */
  #cut() {
    const stream = this.#stream;
    this.#stream = null;
    stream.close();
    this.#becomes("cut");
  }

  #askWho() {
    this.#at.other.hidden = false;
    this.#at.other.elements.user.focus();
  }

  async #showTraits(user) {
    this.#at.traits.textContent = "";
    const answer = await fetch(`/v1/users/${encodeURIComponent(user)}/attributes`).catch(() => null);
    const traits = answer?.ok ? Object.entries(await answer.json()) : [];
    if (this.#user === user) this.#at.traits.textContent = traits.map(([name, value]) => `${name} ${value}`).join(" · ");
  }

  #becomes(state, reason) {
    const { state: pill, cut } = this.#at;
    const before = pill.dataset.state;
    pill.dataset.state = state;
    pill.textContent = state;
    cut.textContent = this.#stream ? "Cut" : "Resume";
    cut.setAttribute("aria-label", `${cut.textContent} device ${this.#name}`);
    if (before === "live" && state !== "live") this.#away = wentAway(Date.now());
    if (before === "live" && this.#stream) this.#mark(reason ? `the node closed the connection: ${reason}` : "connection lost");
    if (state === "cut") this.#mark("cut; new notifications wait in the log");
    if (state === "live" && this.#away?.until === Infinity) this.#returns();
  }

  #returns() {
    const away = this.#away;
    away.until = Date.now();
    // A page that was just opened shows a return only if notifications were waiting for it.
    if (away.from > 0) this.#showReturn();
    // Waits for the backlog to arrive, so that one announcement covers it.
    setTimeout(() => { if (away.mark) this.#announce(`Device ${this.#name}: ${away.mark.textContent}`); }, 1_500);
  }

  #showReturn() {
    this.#away.mark ??= this.#mark("");
    const { from, until, late, replaced, mark } = this.#away;
    const parts = [from > 0 ? `back after ${((until - from) / 1_000).toFixed(1)} s` : "back", `${late} arrived late`];
    if (replaced) parts.push(`${replaced} replaced by newer`);
    mark.textContent = parts.join(" · ");
  }

  #take(note, id) {
    const key = `${note.source} ${note.id} ${note.slot ?? ""}`;
    const counts = this.#counts;
    this.#lost.delete(key);
    if (this.#seen.has(key)) {
      counts.twice++;
      this.#showCounts();
      return;
    }
    remember(this.#seen, key);
    counts.received++;
    const time = Date.parse(note.time);
    const isLate = this.#away && time >= this.#away.from && time <= this.#away.until;
    if (isLate) {
      counts.late++;
      this.#away.late++;
      this.#showReturn();
    }
    if (note.type === "match.score" && note.data?.match) this.#showScore(note, isLate);
    else if (note.type === "chat.typing" && note.data?.from) this.#showTyping(note.data);
    else this.#show(note, id, time, isLate);
    this.#showCounts();
  }

  #show(note, id, time, isLate) {
    this.#overtaken(note, time);
    if (note.type === "report.row" && this.#row && this.#row.item === this.#at.notes.firstChild) {
      this.#row.n++;
      this.#row.title.textContent = `${this.#row.n} rows of a report`;
      return;
    }
    const { title, text } = words(note);
    const heading = element("span.title", title);
    const line = element("div.line", heading);
    if (isLate) line.append(element("span.badge.late", "late"));
    const stamp = element("time", clock(time));
    stamp.dateTime = note.time;
    line.append(stamp);
    const item = element("li.note", line);
    item.dataset.priority = note.priority;
    item.dataset.event = note.id;
    item.dataset.cursor = id;
    if (text) item.append(element("p.text", text));
    item.append(element("div.meta", element("span.priority", note.priority), element("span", note.type), element("span.route", `${note.by} → ${note.to}`)));
    this.#put(item);
    if (note.type === "report.row") this.#row = { item, title: heading, n: 1 };
    if (RANK[note.priority] >= RANK.high) {
      const badge = element("span.badge.overtook");
      badge.hidden = true;
      heading.after(badge);
      this.#ahead.push({ time, rank: RANK[note.priority], n: 0, badge });
      if (this.#ahead.length > MOST_AHEAD) this.#ahead.shift();
    }
    if (note.priority === "urgent") this.#announce(`Device ${this.#name}, urgent: ${title}`);
  }

  /** Counts the notification for each urgent one that was published later but arrived first. */
  #overtaken(note, time) {
    for (const ahead of this.#ahead) {
      if (time >= ahead.time || RANK[note.priority] >= ahead.rank) continue;
      ahead.n++;
      ahead.badge.textContent = `overtook ${ahead.n}`;
      ahead.badge.hidden = false;
    }
  }

  /** Shows only the latest score and counts those that were replaced before they arrived. */
  #showScore({ data, priority, by, to }, isLate) {
    const { match, home, away, goals, minute, update } = data;
    const n = match === this.#score.match ? Math.max(0, update - this.#score.update - 1) : 0;
    this.#score = { match, update };
    this.#counts.replaced += n;
    if (isLate) {
      this.#away.replaced += n;
      this.#showReturn();
    }
    const [teams, time, aside] = this.#at.score.children;
    teams.textContent = `${home} ${[goals].flat().join(" : ")} ${away}`;
    time.textContent = `${minute}′ · update ${update}`;
    this.#aside = `${priority} · ${by} → ${to}`;
    if (!this.#typing) aside.textContent = this.#aside;
    this.#at.score.hidden = false;
  }

  /** Typing events have a time to live: a device that reconnects does not receive them late. */
  #showTyping({ from }) {
    const aside = this.#at.score.lastElementChild;
    aside.textContent = `${from} is typing …`;
    clearTimeout(this.#typing);
    this.#typing = setTimeout(() => {
      this.#typing = 0;
      aside.textContent = this.#aside;
    }, TYPING);
  }

  #put(item) {
    const { notes, empty } = this.#at;
    empty.hidden = true;
    notes.prepend(item);
    while (notes.children.length > MOST_SHOWN) notes.lastChild.remove();
  }

  #mark(text, kind) {
    const item = element("li.mark", text);
    if (kind) item.classList.add(kind);
    this.#put(item);
    return item;
  }

  #showCounts() {
    this.#counts.lost = this.#lost.size;
    for (const [name, count] of Object.entries(this.#at.counts)) {
      count.textContent = this.#counts[name];
      count.classList.toggle("bad", this.#counts[name] > 0 && (name === "lost" || name === "twice"));
    }
  }

  /**
   * Compares with the log. A logged notification counts as lost if it has not arrived after
   * `LOOK_AGAIN`, provided that the stream was open all the time.
   */
  async #look() {
    const [stream, user, away] = [this.#stream, this.#user, this.#away];
    const isUndisturbed = () => this.#stream === stream && this.#away === away && this.#at.state.dataset.state === "live";
    if (!stream || !this.#looked || !isUndisturbed()) return;
    try {
      const answer = await fetch(`/v1/notifications?${new URLSearchParams({ user, after: this.#looked, limit: 200 })}`);
      if (!answer.ok) return;
      const { notifications, cursor } = await answer.json();
      await new Promise((resolve) => setTimeout(resolve, LOOK_AGAIN));
      if (!isUndisturbed()) return;
      this.#looked = cursor;
      const keys = notifications.filter(({ data }) => !PASSING.has(data.type)).map(({ data }) => `${data.source} ${data.id} ${data.slot ?? ""}`);
      for (const key of keys) if (!this.#seen.has(key)) this.#lost.add(key);
      this.#showCounts();
    } catch {
      // The node is unavailable; the next comparison starts from the same cursor.
    }
  }
}

/** A period without a connection, which starts at `from`. */
const wentAway = (from) => ({ from, until: Infinity, late: 0, replaced: 0, mark: null });

function remember(seen, key) {
  seen.add(key);
  if (seen.size > MOST_REMEMBERED) seen.delete(seen.values().next().value);
}

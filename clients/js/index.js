// The notifications of one user, each once and in order; index.d.ts describes the interface.
//
// Tabs share one connection: the one that holds a Web Lock leads, reads the stream and passes each
// frame on by a BroadcastChannel. When it closes, freezes or hangs, the next tab leads and resumes
// at the last frame that it received. Frames of two leaders may overlap, so each tab remembers what
// it has shown.

const MOST_DELAY = 30_000;       // milliseconds, unless the node demands more
const ACKNOWLEDGE_AFTER = 1_000; // milliseconds; only the newest id needs it
const MOST_REMEMBERED = 2_000;   // notifications, more than two leaders have in common
const MOST_WAITING = 100;        // frames that wait for a slow handler before reading pauses
const TICKS = 9;                 // checks within the time that a silent connection is given
const TICKS_OF_LEADER = 24;      // checks without a message of the leader until another tab leads

/** Besides `gap`; all other frames are notifications. */
const RESERVED = ['cursor', 'close', 'reauth', 'open', 'error', 'heartbeat'];

export const connect = (url, options) => new Connection(url, options);

export class Connection {
  #at;            // the URL of the stream
  #options;
  #name;          // of the lock, the channel and the stored position
  #channel;       // to the other tabs, if this one shares
  #state = 'connecting';
  #position = ''; // the handler ran up to this id
  #received = ''; // the next stream starts at this id
  #queue = [];    // frames for the handler
  #isBusy = false;
  #emptied;       // wakes the reader that waits for the queue
  #seen = new Set();
  #turn;          // aborts this tab's waiting for the lock, or leading
  #attempt;       // aborts one request
  #isLeading = false;
  #isPlanned = false; // the next request follows at once
  #wake;          // ends the pause before the next attempt
  #heardAt = 0;   // when bytes arrived
  #silent = 0;    // ticks since the leader was heard
  #retry = 2_000;
  #token;
  #mustRenew = false;
  #owed = '';         // the newest id that is not acknowledged
  #ackTimer;
  #timer;
  #events = new AbortController();

  constructor(url, options = {}) {
    this.#at = new URL(url, globalThis.location?.href);
    this.#options = { timeout: 45_000, shared: true, storage: localStorageIfAny(), ...options };
    const { user = this.#at.searchParams.get('user'), shared, timeout, signal } = this.#options;
    if (!user) throw new TypeError('the user is missing; pass options.user, under which the position is stored');
    const device = this.#options.device;
    if (device) this.#at.searchParams.set('device', device);
    // The node or the token may choose the data alone.
    this.#at.searchParams.set('format', 'notification');
    this.#name = `pointsman ${user} ${this.#at}`;
    if (signal?.aborted) return void (this.#state = 'closed');
    if (shared && globalThis.navigator?.locks && globalThis.BroadcastChannel) {
      this.#channel = new BroadcastChannel(this.#name);
      this.#channel.onmessage = ({ data }) => this.#hear(data);
      this.#channel.postMessage({ isNew: true });
    }
    const on = (target, names, act) => {
      for (const name of names) target?.addEventListener?.(name, act, { signal: this.#events.signal });
    };
    const { document } = globalThis;
    on(signal, ['abort'], () => this.close());
    on(document, ['freeze'], () => this.#leave());
    on(document, ['resume'], () => this.#join());
    on(document, ['visibilitychange'], () => document.visibilityState === 'visible' && this.#wake?.());
    if (document) {
      on(globalThis, ['pagehide'], () => this.#leave());
      on(globalThis, ['pageshow'], (event) => event.persisted && this.#join());
    }
    on(globalThis, ['offline', 'online'], ({ type }) => (type === 'online' ? this.#wake?.() : this.#attempt?.abort()));
    this.#timer = setInterval(() => this.#tick(), timeout / TICKS);
    // Handlers may use the connection that the caller does not have yet.
    queueMicrotask(() => this.#join());
  }

  get state() { return this.#state; }

  get position() { return this.#position; }

  async markRead(id = this.#position) {
    const status = await this.#acknowledge({ id, read: true });
    if (status !== 204) throw new Error(`the read marker is not stored: status ${status}`);
  }

  async close() {
    if (this.#state === 'closed') return;
    const acknowledged = this.#leave();
    this.#become('closed');
    clearInterval(this.#timer);
    this.#events.abort();
    this.#channel?.close();
    await acknowledged;
  }

  // --- tabs

  async #join(steal) {
    if (this.#state === 'closed' || this.#turn?.signal.aborted === false) return;
    const turn = (this.#turn = new AbortController());
    const { signal } = turn;
    this.#silent = 0;
    // Frees the lock when the turn is over, even if a token never comes.
    const lead = () => signal.aborted || new Promise((done) => {
      signal.addEventListener('abort', done);
      this.#lead(signal);
    });
    if (!this.#channel) return lead();
    try {
      await navigator.locks.request(this.#name, steal ? { steal } : { signal }, lead);
    } catch (error) {
      if (signal.aborted) return;
      // Without the right to use locks, lead; without the lock, which was stolen, wait again.
      if (error.name !== 'AbortError') return lead();
      this.#leave();
      this.#join();
    }
  }

  #leave() {
    this.#isLeading = false;
    this.#turn?.abort();
    this.#attempt?.abort();
    this.#wake?.();
    return this.#owed && this.#acknowledgeNow();
  }

  #tick() {
    if (this.#isLeading) {
      this.#post({ state: this.#state });
      if (Date.now() - this.#heardAt > this.#options.timeout && !this.#emptied) this.#attempt?.abort();
    } else if (this.#channel && this.#turn?.signal.aborted === false && ++this.#silent > TICKS_OF_LEADER) {
      this.#leave();
      this.#join(true);
    }
  }

  #hear({ frame, state, isNew }) {
    if (isNew) return this.#isLeading && this.#post({ state: this.#state });
    this.#silent = 0;
    if (frame) this.#take(frame);
    else if (!this.#isLeading) this.#become(state);
  }

  #post(message) {
    if (this.#state !== 'closed') this.#channel?.postMessage(message);
  }

  #become(state, detail = {}) {
    if (this.#state === state || this.#state === 'closed') return;
    this.#state = state;
    if (this.#isLeading) this.#post({ state });
    this.#call(() => this.#options.onState?.(state, detail));
  }

  // --- the stream

  async #lead(signal) {
    this.#isLeading = true;
    // The last leader may not have stored what this tab has shown.
    if (this.#position) this.#keep(this.#position);
    this.#received ||= this.#read() ?? '';
    for (let [n, wasExpired] = [0, false]; !signal.aborted;) {
      const attempt = (this.#attempt = new AbortController());
      const end = { liveAt: 0 };
      this.#isPlanned = false;
      try {
        await this.#stream(attempt.signal, end);
      } catch (error) {
        end.error = error;
      }
      attempt.abort();
      if (signal.aborted) return;
      n = end.liveAt && Date.now() - end.liveAt >= this.#retry ? 0 : n + 1;
      const isExpired = end.reason === 'token-expired' || end.status === 401;
      this.#mustRenew ||= isExpired;
      // At once with a new token, but not again and again.
      const canRenew = isExpired && this.#options.token && !wasExpired;
      wasExpired = isExpired && n > 0;
      if (this.#isPlanned || canRenew) continue;
      const delay = Math.max(this.#retry, Math.min(MOST_DELAY, this.#retry * 2 ** Math.max(0, n - 1))) * (1 + Math.random() / 2);
      const isClient = end.status >= 400 && end.status < 500 && end.status !== 429;
      const state = isClient ? 'refused' : end.reason || (end.liveAt && globalThis.navigator?.onLine !== false) ? 'connecting' : 'offline';
      this.#become(state, { ...end, delay });
      await new Promise((done) => {
        const timer = setTimeout(done, delay);
        this.#wake = () => { clearTimeout(timer); done(); };
      });
      this.#wake = undefined;
    }
  }

  async #stream(signal, end) {
    this.#heardAt = Date.now();
    const at = new URL(this.#at);
    if (this.#received) at.searchParams.set('last_event_id', this.#received);
    const aborted = new Promise((_, reject) => signal.addEventListener('abort', () => reject(signal.reason)));
    const headers = await Promise.race([this.#authorize(), aborted]);
    const answer = await fetch(at, { ...headers, cache: 'no-store', signal });
    if (answer.status !== 200 || !answer.headers.get('content-type')?.startsWith('text/event-stream')) {
      end.status = answer.status;
      const wait = answer.headers.get('retry-after');
      if (/^\d+$/.test(wait)) this.#retry = wait * 1_000;
      throw new Error(`the node answered with status ${answer.status}`);
    }
    const [reader, decoder, frames] = [answer.body.getReader(), new TextDecoder(), parser()];
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      this.#heardAt = Date.now();
      for (const frame of frames(decoder.decode(value, { stream: true }))) this.#receive(frame, end);
      if (signal.aborted) return;
      if (this.#queue.length > MOST_WAITING) {
        await Promise.race([new Promise((emptied) => { this.#emptied = emptied; }), aborted]).finally(() => { this.#emptied = undefined; });
        this.#heardAt = Date.now();
      }
    }
  }

  #receive(frame, end) {
    const { event, data, retry } = frame;
    if (/^\d+$/.test(retry)) this.#retry = Number(retry);
    if (event === 'close') end.reason = parse(data)?.reason ?? 'unknown';
    else end.liveAt ||= Date.now();
    // A stream that has just begun ends with tokens of a short life: this could not help.
    if (event === 'reauth' && this.#options.token && Date.now() - end.liveAt > this.#retry) this.#reauthorize();
    this.#post({ frame });
    this.#take(frame);
    if (event !== 'close') this.#become('live');
  }

  /** Opens a stream with a new token, if there is one, before the old token expires. */
  async #reauthorize() {
    const attempt = this.#attempt;
    this.#mustRenew = true;
    if (!(await this.#authorize().catch(() => null)) || this.#attempt !== attempt) return;
    this.#isPlanned = true;
    attempt.abort();
  }

  async #authorize() {
    const { token } = this.#options;
    if (token && (this.#mustRenew || this.#token === undefined)) {
      this.#token = (await token({ isRenewal: this.#mustRenew })) ?? null;
      this.#mustRenew = false;
    }
    return this.#token
      ? { headers: { Accept: 'text/event-stream', Authorization: `Bearer ${this.#token}` } }
      : { headers: { Accept: 'text/event-stream' }, credentials: 'include' };
  }

  // --- notifications

  #take(frame) {
    if (frame.id) this.#received = frame.id;
    this.#queue.push(frame);
    if (!this.#isBusy) this.#empty();
  }

  /** Calls the handler for one frame after another, at once unless it returns a promise. */
  async #empty() {
    this.#isBusy = true;
    for (let frame; this.#state !== 'closed' && (frame = this.#queue.shift());) {
      const ran = this.#call(() => this.#show(frame));
      if (ran) await ran;
      // Only now: a tab closed while the handler runs must show it again.
      if (frame.id && this.#state !== 'closed') {
        this.#position = frame.id;
        if (this.#isLeading) this.#keep(frame.id);
      }
    }
    this.#isBusy = false;
    this.#emptied?.();
  }

  #show({ id, event = 'message', data = '' }) {
    if (RESERVED.includes(event)) return;
    const { onGap, onNotification } = this.#options;
    const value = parse(data);
    if (event === 'gap') return onGap?.(value);
    // Ids differ between streams.
    const key = value?.source && value.by ? JSON.stringify([value.source, value.id, value.slot]) : id;
    if (key && this.#seen.has(key)) return;
    this.#seen.add(key);
    if (this.#seen.size > MOST_REMEMBERED) this.#seen.delete(this.#seen.values().next().value);
    return onNotification?.(value, { id, event, isLeading: this.#isLeading });
  }

  /** Calls the application, whose errors must not end the connection. */
  #call(act) {
    const report = (error) => (globalThis.reportError ?? console.error)(error);
    try {
      const ran = act();
      return ran?.then ? ran.then(undefined, report) : undefined;
    } catch (error) {
      report(error);
    }
  }

  // --- the stored position and acknowledgements

  #read() {
    try { return this.#options.storage?.getItem(this.#name); } catch { /* blocked by the browser */ }
  }

  #keep(id) {
    try { this.#options.storage?.setItem(this.#name, id); } catch { /* full, or blocked */ }
    if (!this.#options.device) return;
    this.#owed = id;
    this.#ackTimer ??= setTimeout(() => this.#acknowledgeNow(), ACKNOWLEDGE_AFTER);
  }

  async #acknowledgeNow() {
    clearTimeout(this.#ackTimer);
    this.#ackTimer = undefined;
    const id = this.#owed;
    this.#owed = '';
    const status = await this.#acknowledge({ id, device: this.#options.device }).catch(() => 0);
    // The next leader or notification acknowledges more.
    if ((status && status < 500 && status !== 401) || !this.#isLeading || this.#owed) return;
    this.#keep(id);
  }

  async #acknowledge(body) {
    const at = new URL(this.#at.href.replace(/stream(\?.*)?$/, 'acks'));
    const user = this.#at.searchParams.get('user');
    if (user) at.searchParams.set('user', user);
    const request = await this.#authorize();
    request.headers['Content-Type'] = 'application/json';
    // `keepalive`: the page may be closing.
    return (await fetch(at, { ...request, method: 'POST', body: JSON.stringify(body), keepalive: true })).status;
  }
}

/** Returns a function that returns the frames that a text completes. */
function parser() {
  let [rest, frame] = ['', {}];
  return (text) => {
    const frames = [];
    const lines = (rest + text).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      const [, field, value] = /^([^:]*):? ?(.*)/s.exec(line);
      if (line === '') {
        if (Object.keys(frame).length) frames.push(frame);
        frame = {};
      } else if (field === 'data') frame.data = 'data' in frame ? `${frame.data}\n${value}` : value;
      else if (['id', 'event', 'retry'].includes(field)) frame[field] = value;
    }
    return frames;
  };
}

function parse(text) {
  try { return JSON.parse(text); } catch { return text; }
}

/** Even reading the property throws where storage is blocked. */
function localStorageIfAny() {
  try { return globalThis.localStorage; } catch { return undefined; }
}

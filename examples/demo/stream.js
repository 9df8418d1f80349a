// One user's stream on one device, as a page wants it: it comes back by itself, can be cut, and survives that the page is closed, because
// the node is told what this device has had. Knows no document.
//
// The standard `EventSource` does most of that. It only forgets its last event id when it is closed, so this keeps it; and a page that is
// opened anew has none, so this names its device and acknowledges what came: the node remembers where it was.

const ACKNOWLEDGE_AFTER = 1_000; // milliseconds: the newest id is enough, so not each is acknowledged

/**
 * Tells `heard` what happens:
 * `state(name)` connecting, live, cut or refused · `notification(data, id)` · `cursor(id)` whenever there is a new last event id ·
 * `gap(data)` history is not whole · `close(data)` the node ends this connection and says why.
 */
export class Stream {
  #user;
  #device;
  #heard;
  #cursor = "";
  #source = null;
  #owed = "";  // the newest id that was not acknowledged yet
  #timer = 0;
  #isOver = false;
  #leave = () => this.#acknowledge();

  constructor(user, device, heard) {
    this.#user = user;
    this.#device = device;
    this.#heard = heard;
    addEventListener("pagehide", this.#leave);
    this.resume();
  }

  get isOpen() {
    return this.#source !== null;
  }

  /** Closes the connection. What is published meanwhile waits in the log. */
  cut() {
    this.#disconnect();
    this.#heard.state("cut");
  }

  /** Ends it for good, without a word. */
  close() {
    this.#isOver = true;
    this.#disconnect();
    this.#acknowledge();
    removeEventListener("pagehide", this.#leave);
  }

  /** Comes back with the last event id; without one, where the node says that this device was. */
  resume() {
    if (this.#source) return;
    const query = new URLSearchParams({ user: this.#user, device: this.#device });
    if (this.#cursor) query.set("last_event_id", this.#cursor);
    const source = new EventSource(`/v1/stream?${query}`);
    this.#source = source;
    this.#heard.state("connecting");
    // A late event of a source that was closed must not count for the next one.
    const on = (name, act) => source.addEventListener(name, (event) => { if (this.#source === source) act(event); });
    on("open", () => this.#heard.state("live"));
    on("error", () => {
      // A browser comes back by itself, unless the answer was no stream at all.
      const isOver = source.readyState === EventSource.CLOSED;
      if (isOver) this.#disconnect();
      this.#heard.state(isOver ? "refused" : "connecting");
    });
    on("message", (event) => {
      this.#keep(event);
      this.#heard.notification(JSON.parse(event.data), event.lastEventId);
      this.#owed = event.lastEventId;
      this.#acknowledgeSoon();
    });
    on("cursor", (event) => this.#keep(event));
    for (const name of ["gap", "close"]) {
      on(name, (event) => {
        this.#keep(event);
        this.#heard[name](JSON.parse(event.data));
      });
    }
  }

  #disconnect() {
    this.#source?.close();
    this.#source = null;
  }

  #keep({ lastEventId }) {
    if (!lastEventId || lastEventId === this.#cursor) return;
    this.#cursor = lastEventId;
    this.#heard.cursor(lastEventId);
  }

  /** Says how far this device is. If that is not heard, it is said again, unless there is a newer id by then. */
  async #acknowledge() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    if (!this.#owed) return;
    const id = this.#owed;
    const body = JSON.stringify({ id, device: this.#device });
    this.#owed = "";
    const headers = { "Content-Type": "application/json" };
    // `keepalive`: also while the page goes away.
    const sent = fetch(`/v1/acks?${new URLSearchParams({ user: this.#user })}`, { method: "POST", headers, body, keepalive: true });
    const isHeard = await sent.then((answer) => answer.status < 500, () => false);
    if (isHeard || this.#isOver) return;
    this.#owed ||= id;
    this.#acknowledgeSoon();
  }

  #acknowledgeSoon() {
    this.#timer ||= setTimeout(() => this.#acknowledge(), ACKNOWLEDGE_AFTER);
  }
}

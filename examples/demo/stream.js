// The stream of one user on one device. It reconnects on its own, can be cut, and survives closing
// the page, because it acknowledges to the node what this device has received. It does not touch
// the document.
//
// The standard `EventSource` does most of this. But it forgets its last event id when it is closed,
// so this class keeps it. And a newly opened page has no last event id, so this class names its
// device and acknowledges notifications: the node stores the device cursor.

const ACKNOWLEDGE_AFTER = 1_000; // milliseconds; acknowledging only the newest id is enough

/**
 * Calls these methods of `heard`:
 * - `state(name)`: connecting, live, cut or refused
 * - `notification(data, id)`
 * - `cursor(id)`: there is a new last event id
 * - `gap(data)`: history may be incomplete
 * - `close(data)`: the node closes this connection; `data` has the reason
 */
export class Stream {
  #user;
  #device;
  #heard;
  #cursor = "";
  #source = null;
  #owed = "";  // the newest id that is not acknowledged yet
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

  /** Closes the connection. Notifications published in the meantime wait in the log. */
  cut() {
    this.#disconnect();
    this.#heard.state("cut");
  }

  /** Closes the stream permanently, without reporting a state. */
  close() {
    this.#isOver = true;
    this.#disconnect();
    this.#acknowledge();
    removeEventListener("pagehide", this.#leave);
  }

  /** Resumes from the last event id or, without one, from the stored device cursor. */
  resume() {
    if (this.#source) return;
    const query = new URLSearchParams({ user: this.#user, device: this.#device });
    if (this.#cursor) query.set("last_event_id", this.#cursor);
    const source = new EventSource(`/v1/stream?${query}`);
    this.#source = source;
    this.#heard.state("connecting");
    // Ignores late events of a source that has already been replaced.
    const on = (name, act) => source.addEventListener(name, (event) => { if (this.#source === source) act(event); });
    on("open", () => this.#heard.state("live"));
    on("error", () => {
      // The browser reconnects on its own, unless the response was not an event stream.
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

  /** Acknowledges the newest id. If that fails, retries with the newest id at that time. */
  async #acknowledge() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    if (!this.#owed) return;
    const id = this.#owed;
    const body = JSON.stringify({ id, device: this.#device });
    this.#owed = "";
    const headers = { "Content-Type": "application/json" };
    // `keepalive` completes the request even if the page is closed.
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

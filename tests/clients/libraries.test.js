// A client that is cut before its first notification and reconnects misses nothing, because the
// `cursor` frame gave it an id. Tests the client libraries used where `EventSource` is missing or
// cannot send headers.
import assert from "node:assert/strict";
import test from "node:test";
import polyfill from "event-source-polyfill";
import { EventSource } from "eventsource";
import { address, eventually, publish } from "./node-under-test.js";
import { proxy } from "./proxy.js";

const libraries = {
  "eventsource": (url) => new EventSource(url),
  // Its heartbeat timeout (45 s) is longer than this test should take.
  "event-source-polyfill": (url) => new polyfill.EventSourcePolyfill(url),
};

for (const [name, open] of Object.entries(libraries)) {
  test(`a client of ${name} that is cut before its first notification misses nothing`, { timeout: 120_000 }, async (t) => {
    const user = `reader-of-${name}`;
    // An id identifies one event for all users, so the libraries' events need different ids.
    const say = (what) => publish(user, `${name}/${what}`, { data: what });
    const line = await proxy(address);
    t.after(() => line.close());
    const source = open(`${line.url}/v1/stream?user=${user}`);
    t.after(() => source.close());
    const had = [];
    let cursors = 0;
    let errors = 0;
    source.addEventListener("cursor", () => cursors++);
    source.onmessage = (e) => had.push(JSON.parse(e.data).data);
    source.onerror = () => errors++;

    await eventually("a cursor before any notification", () => cursors > 0);
    assert.deepEqual(had, []);
    for (const round of [1, 2]) {
      const before = { cursors, errors };
      line.cut();
      await eventually("the client notices that it is cut", () => errors > before.errors);
      await say(`missed-${round}a`);
      await say(`missed-${round}b`);
      line.mend();
      await eventually("the client is back", () => cursors > before.cursors);
      // By now, every earlier event could have been delivered twice.
      await say(`live-${round}`);
      await eventually(`live-${round} arrives`, () => had.includes(`live-${round}`));
    }
    assert.deepEqual(had, ["missed-1a", "missed-1b", "live-1", "missed-2a", "missed-2b", "live-2"]);
  });
}

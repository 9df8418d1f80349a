// A client that never received anything, is cut and comes back, misses nothing: the `cursor` frame gave it an id. With the client
// libraries that are used where there is no EventSource, or where it cannot send headers.
import assert from "node:assert/strict";
import test from "node:test";
import polyfill from "event-source-polyfill";
import { EventSource } from "eventsource";
import { address, eventually, publish } from "./node-under-test.js";
import { proxy } from "./proxy.js";

const libraries = {
  "eventsource": (url) => new EventSource(url),
  // Its heartbeat timeout (45 s) is longer than this test is meant to take.
  "event-source-polyfill": (url) => new polyfill.EventSourcePolyfill(url),
};

for (const [name, open] of Object.entries(libraries)) {
  test(`a client of ${name} that never received anything is cut, comes back and misses nothing`, { timeout: 120_000 }, async (t) => {
    const user = `reader-of-${name}`;
    // One id names one event, whoever it is for: the libraries' events must differ in it.
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
      // Everything before this one was there to be had twice.
      await say(`live-${round}`);
      await eventually(`live-${round} arrives`, () => had.includes(`live-${round}`));
    }
    assert.deepEqual(had, ["missed-1a", "missed-1b", "live-1", "missed-2a", "missed-2b", "live-2"]);
  });
}

// The requests of the CloudEvents SDK for JavaScript (npm `cloudevents`) in each content mode,
// compressed and not.
import assert from "node:assert/strict";
import test from "node:test";
import { deflateSync, gzipSync } from "node:zlib";
import { CloudEvent, emitterFor, HTTP, Mode } from "cloudevents";
import { address, eventually, publish } from "./node-under-test.js";

const user = "reader-of-npm-cloudevents";
const url = `http://${address}/v1/events`;
const source = `/npm/${"s".repeat(2000)}`;
const dataschema = `https://shop.example/${"s".repeat(2000)}`;

/** Every notification of the user, once everything that was published is decided. */
async function notifications() {
  const last = `last-${process.hrtime.bigint()}`;
  await publish(user, last);
  let found;
  await eventually("everything is decided", async () => {
    const page = await (await fetch(`http://${address}/v1/notifications?user=${user}&limit=1000`)).json();
    found = page.notifications.map(({ data }) => data);
    return found.some(({ id }) => id === last);
  });
  return found;
}

/** An emitter of the SDK, as its README shows it. */
const emitter = (mode, coding, compress) =>
  emitterFor(({ headers, body }) => {
    const compressed = coding ? { body: compress(body), headers: { ...headers, "Content-Encoding": coding } } : { headers, body };
    return fetch(url, { method: "POST", ...compressed });
  }, { binding: HTTP, mode });

for (const mode of [Mode.STRUCTURED, Mode.BINARY]) {
  for (const [coding, compress] of [[undefined], ["gzip", gzipSync], ["deflate", deflateSync]]) {
    test(`an event in ${mode} mode, ${coding ?? "not compressed"}, is delivered as it was made`, async () => {
      const id = `${mode}-${coding}`;
      const event = new CloudEvent({ id, source, type: "client.test", subject: "a/b", dataschema, datacontenttype: "application/json", data: { text: "zwölf" }, user });
      const answer = await emitter(mode, coding, compress)(event);
      assert.equal(answer.status, 202, await answer.text());
      const { id: _id, priority, by, to, ...read } = (await notifications()).find((one) => one.id === id);
      // The notification is an event again.
      const again = new CloudEvent({ id, ...read });
      assert.deepEqual([again.source, again.subject, again.dataschema, again.datacontenttype, again.data], [source, "a/b", dataschema, "application/json", { text: "zwölf" }]);
      assert.deepEqual([priority, by, to], ["normal", "address", `u:${user}`]);
    });
  }
}

test("bytes are delivered as bytes", async () => {
  const bytes = new Uint8Array([0, 159, 146, 150]);
  for (const mode of [Mode.STRUCTURED, Mode.BINARY]) {
    const event = new CloudEvent({ id: `bytes-${mode}`, source, type: "client.test", datacontenttype: "application/octet-stream", data: bytes, user });
    assert.equal((await emitter(mode)(event)).status, 202);
  }
  const untyped = new CloudEvent({ id: "untyped", source, type: "client.test", data: bytes, user });
  assert.equal((await emitter(Mode.STRUCTURED)(untyped)).status, 202);
  const read = (await notifications()).filter(({ id }) => ["bytes-structured", "bytes-binary", "untyped"].includes(id));
  assert.deepEqual(read.map(({ data_base64 }) => data_base64), Array(3).fill("AJ+Slg=="));
});

test("a batch is answered by what happened to its events", async () => {
  const of = (id, more) => new CloudEvent({ id, source, type: "client.test", user, ...more });
  const post = (events, headers = {}) => fetch(url, { method: "POST", headers: { "Content-Type": "application/cloudevents-batch+json", ...headers }, body: JSON.stringify(events) });
  const minimal = await post([of("batch-1"), of("batch-2")], { Prefer: "return=minimal" });
  assert.deepEqual([minimal.status, await minimal.text(), minimal.headers.get("preference-applied")], [204, "", "return=minimal"]);
  const partly = await post([of("batch-3"), of("refused", { user: "a\nb" })], { Prefer: "return=minimal" });
  assert.deepEqual([partly.status, (await partly.json()).events.map(({ status }) => status)], [200, ["stored", "refused"]]);
  const refused = await post([of("refused", { user: "a\nb" })]);
  assert.deepEqual([refused.status, (await refused.json()).events.length], [400, 1]);
});

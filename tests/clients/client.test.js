// The package `pointsman` in Node.js, against a real node and against a server that answers as
// proxies and broken networks do.
import assert from "node:assert/strict";
import http from "node:http";
import test from "node:test";
import { connect } from "../../clients/js/index.js";
import { eventually } from "./eventually.js";
import { startNode, tokenOf } from "./installation.js";
import { proxy } from "./proxy.js";

const memory = () => {
  const kept = new Map();
  return { getItem: (name) => kept.get(name) ?? null, setItem: (name, value) => kept.set(name, value), kept };
};

/** Follows a user and records what the handlers were called with. */
function follow(t, url, options) {
  const log = { shown: [], states: [], gaps: [] };
  const connection = connect(url, {
    onNotification: ({ data }) => log.shown.push(data.n),
    onState: (state, detail) => log.states.push([state, detail]),
    onGap: (gap) => log.gaps.push(gap),
    ...options,
  });
  t.after(() => connection.close());
  return Object.assign(connection, log);
}

const isLive = (connection) => eventually("the connection is live", () => connection.state === "live");
const shows = (connection, ids) => eventually(`${ids} are shown`, () => connection.shown.length >= ids.length).then(
  () => assert.deepEqual(connection.shown, ids),
  () => assert.deepEqual(connection.shown, ids),
);

/** A server that answers each request for a stream by the next of these functions, then the last. */
async function script(t, ...answers) {
  const requests = [];
  const server = http.createServer((request, answer) => {
    let hasHead = false;
    const chunks = [];
    request.on("data", (chunk) => chunks.push(chunk)).on("end", () => {
      requests.push({ at: Date.now(), url: new URL(request.url, "http://localhost"), headers: request.headers, body: Buffer.concat(chunks).toString() });
      const stream = (text) => {
        if (!hasHead) answer.writeHead(200, { "Content-Type": "text/event-stream" });
        hasHead = true;
        answer.write(text);
      };
      (answers.length > 1 ? answers.shift() : answers[0])(answer, stream);
    });
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => { server.closeAllConnections(); server.close(); });
  return { url: `http://127.0.0.1:${server.address().port}/v1/stream`, requests };
}

const notification = (n) => `data: ${JSON.stringify({ source: "/s", id: String(n), by: "address", data: { n } })}\n`;

test("a client in Node.js shows each notification once through restarts, cuts and a hanging network", { timeout: 300_000 }, async (t) => {
  const node = await startNode(t);
  const line = await proxy(node.address);
  t.after(() => line.close());
  const connection = follow(t, `${line.url}/v1/stream?user=ada`, { timeout: 4_000 });
  await isLive(connection);
  let n = 0;
  const publish = async () => { for (let i = 0; i < 3; i++) await node.publish("ada", ++n); };
  const interruptions = [
    () => node.restart("SIGTERM"),
    () => node.restart("SIGKILL"),
    () => { line.cut(); return eventually("the connection is offline", () => connection.state === "offline"); },
    () => line.hang(),
  ];
  for (const interrupt of interruptions) {
    await publish();
    await interrupt();
    await publish();
    line.mend();
    await publish();
    await shows(connection, Array.from({ length: n }, (_, i) => i + 1));
  }
  // Another user's notifications stay away, and a closed connection shows nothing.
  await node.publish("bo", 1_000);
  connection.close();
  await eventually("the stream is closed", async () => (await node.openStreams()) === 0);
  assert.equal(connection.shown.length, n);
});

test("a stored position is the start of the next connection, per user", { timeout: 120_000 }, async (t) => {
  const node = await startNode(t);
  const storage = memory();
  const open = (user) => follow(t, `${node.url}/v1/stream?user=${user}`, { storage });
  const [ada, bo] = [open("ada"), open("bo")];
  await Promise.all([isLive(ada), isLive(bo)]);
  await node.publish("ada", 1);
  await shows(ada, [1]);
  ada.close();
  assert.equal(ada.state, "closed");
  await node.publish("ada", 2);
  await node.publish("bo", 3);
  await shows(bo, [3]);
  await shows(open("ada"), [2]);
  assert.equal(storage.kept.size, 2);
});

test("a notification is shown again if the client ends while its handler runs, and only then", { timeout: 120_000 }, async (t) => {
  const node = await startNode(t);
  const storage = memory();
  const url = `${node.url}/v1/stream?user=ada`;
  const begun = [];
  const first = follow(t, url, { storage, onNotification: ({ data: { n } }) => { begun.push(n); return n === 2 ? new Promise(() => {}) : undefined; } });
  await isLive(first);
  for (const n of [1, 2, 3]) await node.publish("ada", n);
  await eventually("the second handler runs", () => begun.includes(2));
  first.close();
  await shows(follow(t, url, { storage }), [2, 3]);
  assert.deepEqual(begun, [1, 2]);
});

test("a browser that blocks storage or locks leaves the position in memory", { timeout: 120_000 }, async (t) => {
  const node = await startNode(t);
  const line = await proxy(node.address);
  t.after(() => line.close());
  const refuse = () => { throw new DOMException("blocked", "SecurityError"); };
  const before = Object.getOwnPropertyDescriptor(globalThis, "navigator");
  Object.defineProperty(globalThis, "navigator", { value: { onLine: true, locks: { request: async () => refuse() } }, configurable: true });
  t.after(() => (before ? Object.defineProperty(globalThis, "navigator", before) : delete globalThis.navigator));
  const connection = follow(t, `${line.url}/v1/stream?user=ada`, { storage: { getItem: refuse, setItem: refuse } });
  await isLive(connection);
  await node.publish("ada", 1);
  await shows(connection, [1]);
  line.cut();
  await node.publish("ada", 2);
  line.mend();
  await shows(connection, [1, 2]);
});

test("a handler that fails is reported and does not end the connection", { timeout: 120_000 }, async (t) => {
  const node = await startNode(t);
  const reported = t.mock.method(console, "error", () => {});
  const shown = [];
  const connection = follow(t, `${node.url}/v1/stream?user=ada`, {
    onNotification: async ({ data: { n } }) => { shown.push(n); throw new Error(`cannot show ${n}`); },
  });
  await isLive(connection);
  for (const n of [1, 2]) await node.publish("ada", n);
  await eventually("both are shown", () => shown.length === 2);
  await eventually("both errors are reported", () => reported.mock.callCount() === 2);
});

test("an expired token is renewed by the callback, and acknowledgements use it", { timeout: 120_000 }, async (t) => {
  const node = await startNode(t, { isProduction: true });
  const asked = [];
  const token = async ({ isRenewal }) => { asked.push(isRenewal); return tokenOf("ada", 2); };
  const connection = follow(t, `${node.url}/v1/stream`, { user: "ada", token, device: "laptop" });
  await isLive(connection);
  for (let n = 1; n <= 3; n++) {
    await node.publish("ada", n);
    await shows(connection, Array.from({ length: n }, (_, i) => i + 1));
    const before = asked.length;
    await eventually("the token is renewed", () => asked.length > before);
    await isLive(connection);
  }
  assert.equal(asked[0], false);
  assert.ok(asked.slice(1).every(Boolean));
  await connection.markRead();
  const page = await fetch(`${node.url}/v1/notifications`, { headers: { Authorization: `Bearer ${tokenOf("ada")}` } });
  assert.equal((await page.json()).unread.count, 0);
  // A device without a stored position resumes at its acknowledgement.
  await connection.close();
  await node.publish("ada", 4);
  await shows(follow(t, `${node.url}/v1/stream`, { user: "ada", token, device: "laptop", storage: null }), [4]);
});

test("no answer of a proxy or a node is final, and each is a state", { timeout: 120_000 }, async (t) => {
  const reply = (status, headers = {}, body = "") => (answer) => answer.writeHead(status, headers).end(body);
  const server = await script(t,
    reply(401), reply(403), reply(404), reply(429, { "Retry-After": "0" }), reply(502, {}, "<html>"), reply(503),
    reply(200, { "Content-Type": "text/html" }, "log in"), reply(204),
    (answer) => answer.destroy(),
    (_, stream) => stream(`retry: 1\nid: a\nevent: cursor\ndata:\n\nid: b\n${notification(1)}\n`),
  );
  // The delays of eight failures from 1 ms on.
  const connection = follow(t, server.url, { user: "ada" });
  t.mock.method(Math, "random", () => 0);
  const real = globalThis.setTimeout;
  t.mock.method(globalThis, "setTimeout", (act, ms, ...more) => real(act, Math.min(ms, 5), ...more));
  await shows(connection, [1]);
  assert.deepEqual(connection.states.map(([state]) => state), ["refused", "offline", "live"]);
  assert.deepEqual(connection.states[0][1].status, 401);
});

test("the delay doubles from the one of the node with jitter, and Retry-After counts", { timeout: 120_000 }, async (t) => {
  const delays = [];
  const real = globalThis.setTimeout;
  t.mock.method(globalThis, "setTimeout", (act, ms, ...more) => { delays.push(ms); return real(act, Math.min(ms, 2), ...more); });
  const end = (text) => (answer) => answer.writeHead(200, { "Content-Type": "text/event-stream" }).end(text);
  const server = await script(t,
    end("retry: 1000\nid: a\nevent: cursor\ndata:\n\n"), ...Array.from({ length: 7 }, () => (answer) => answer.destroy()),
    (answer) => answer.writeHead(503, { "Retry-After": "70" }).end(),
    end("retry: 60000\nevent: close\ndata: {\"reason\":\"too-many-streams\"}\n\n"),
    (_, stream) => stream("id: b\nevent: cursor\ndata:\n\n"),
  );
  const connection = follow(t, server.url, { user: "ada" });
  await eventually("the client is back", () => server.requests.length === 11 && connection.state === "live");
  // Whole numbers are timers of others.
  const waits = delays.filter((ms) => !Number.isInteger(ms));
  const least = [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000, 30_000, 70_000, 60_000];
  assert.equal(waits.length, least.length);
  waits.forEach((ms, i) => assert.ok(ms >= least[i] && ms <= least[i] * 1.5, `wait ${i}: ${ms} is not within ${least[i]} and half as much again`));
});

test("frames in any pieces, gaps, named events, payloads alone and long lines are read", { timeout: 120_000 }, async (t) => {
  const long = "x".repeat(300_000);
  const text = [
    ": a comment\n\nretry: 5\nid: a\nevent: cursor\ndata:\n\n",
    `id: b\nevent: gap\ndata: {"reason":"trimmed","partition":0}\n\n`,
    `id: c\r\nevent: order\r\n${notification(1).trimEnd()}\r\n\r\n`,
    `id: d\rdata: two\rdata: lines\r\r`,
    `id: e\ndata: {"id":7}\n\nid: f\ndata: {"id":7}\n\n`,
    `event: heartbeat\ndata: x\n\n: äöü 😀\nid: g\ndata:${long}\n\n`,
    // The event of `c` on a later stream.
    `id: h\nevent: order\n${notification(1)}\n`,
    `id: i\n${notification(2)}\n`,
  ].join("");
  const bytes = Buffer.from(text);
  const server = await script(t, async (_, stream) => {
    // The frames up to the long line byte by byte.
    const head = bytes.indexOf("😀") + 8;
    for (let i = 0; i < head; i++) {
      stream(bytes.subarray(i, i + 1));
      await new Promise(setImmediate);
    }
    stream(bytes.subarray(head));
  });
  const shown = [];
  const connection = follow(t, server.url, { user: "ada", onNotification: (value, { id, event }) => shown.push([id, event, value?.data?.n ?? value]) });
  await eventually("the last one is shown", () => connection.position === "i");
  assert.deepEqual(shown, [
    ["c", "order", 1], ["d", "message", "two\nlines"], ["e", "message", { id: 7 }], ["f", "message", { id: 7 }], ["g", "message", long], ["i", "message", 2],
  ]);
  assert.deepEqual(connection.gaps, [{ reason: "trimmed", partition: 0 }]);
});

test("a node that asks for a new token gets a stream with it at once, which resumes", { timeout: 120_000 }, async (t) => {
  const server = await script(t,
    (answer, stream) => { stream("retry: 1\nid: a\nevent: cursor\ndata:\n\n"); setTimeout(() => answer.write(`id: b\nevent: reauth\ndata: {}\n\n`), 20); },
    (_, stream) => stream(`id: c\nevent: cursor\ndata:\n\nid: d\n${notification(1)}\n`),
  );
  let n = 0;
  const connection = follow(t, server.url, { user: "ada", token: ({ isRenewal }) => `token-${isRenewal}-${++n}` });
  await shows(connection, [1]);
  assert.deepEqual(server.requests.map(({ headers, url }) => [headers.authorization, url.searchParams.get("last_event_id")]), [["Bearer token-false-1", null], ["Bearer token-true-2", "b"]]);
  assert.deepEqual(connection.states.map(([state]) => state), ["live"]);
});

test("a node that answers an expired token in band gets a new one at once", { timeout: 120_000 }, async (t) => {
  const expired = (answer, stream) => { stream('retry: 10000\nevent: close\ndata: {"reason":"token-expired"}\n\n'); answer.end(); };
  const server = await script(t, expired, (_, stream) => stream(`id: c\nevent: cursor\ndata:\n\nid: d\n${notification(1)}\n`));
  const connection = follow(t, server.url, { user: "ada", token: ({ isRenewal }) => `token-${isRenewal}` });
  await shows(connection, [1]);
  assert.deepEqual(server.requests.map(({ headers }) => headers.authorization), ["Bearer token-false", "Bearer token-true"]);
});

test("an AbortSignal ends the connection, and one that was aborted before opens none", { timeout: 120_000 }, async (t) => {
  const server = await script(t, (_, stream) => stream("id: a\nevent: cursor\ndata:\n\n"));
  const [now, later] = [new AbortController(), new AbortController()];
  now.abort();
  assert.equal(follow(t, server.url, { user: "ada", signal: now.signal }).state, "closed");
  const connection = follow(t, server.url, { user: "ada", signal: later.signal });
  await isLive(connection);
  later.abort();
  assert.equal(connection.state, "closed");
  assert.equal(server.requests.length, 1);
  assert.throws(() => connect(server.url), /user is missing/);
  assert.throws(() => connect("/v1/stream", { user: "ada" }), TypeError);
});

test("a slow handler stops reading instead of filling the memory, and misses nothing", { timeout: 120_000 }, async (t) => {
  const all = Array.from({ length: 2_000 }, (_, n) => n);
  const server = await script(t, (_, stream) => stream(["retry: 1\n", ...all.map((n) => `id: ${n}\n${notification(n)}\n`)].join("")));
  const shown = [];
  const connection = follow(t, server.url, { user: "ada", onNotification: async ({ data: { n } }) => { shown.push(n); await null; } });
  await eventually("all are shown", () => connection.position === "1999");
  assert.deepEqual(shown, all);
});

// Nodes that a test starts, stops, kills and restarts itself, and a web server for its pages. Tests
// enter as users do: `POST /v1/events` in, streams out.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createHmac } from "node:crypto";
import { openSync } from "node:fs";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import http from "node:http";
import net from "node:net";
import { tmpdir } from "node:os";
import { extname, join } from "node:path";
import { eventually } from "./eventually.js";

const SECRET = "a secret of at least thirty-two bytes";
export const KEY = "a key of publishers";

/** Ports that tests/harness/ports.rs reserved for this process. */
const ports = (process.env.POINTSMAN_PORTS ?? "").split(",").filter(Boolean).map(Number);

/** A port that no other process takes before it is bound, also while a node restarts. */
export async function freePort() {
  const port = ports.shift();
  if (port) return port;
  assert.equal(process.env.POINTSMAN_PORTS, undefined, "tests/clients.rs reserved too few ports");
  const server = net.createServer().listen(0, "127.0.0.1");
  await new Promise((resolve) => server.once("listening", resolve));
  const { port: any } = server.address();
  await new Promise((resolve) => server.close(resolve));
  return any;
}

/** A folder that is removed after the test. */
export async function folder(t) {
  const path = await mkdtemp(join(process.env.POINTSMAN_TMP ?? tmpdir(), "clients-"));
  // Browsers and nodes may still be writing to it.
  t.after(() => rm(path, { recursive: true, force: true, maxRetries: 20 }));
  return path;
}

/** A token of a user that expires after `life` seconds, with further claims. */
export function tokenOf(user, life = 3_600, more = {}) {
  const part = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
  const head = `${part({ alg: "HS256", typ: "JWT" })}.${part({ sub: user, exp: Math.floor(Date.now() / 1_000) + life, ...more })}`;
  return `${head}.${createHmac("sha256", SECRET).update(head).digest("base64url")}`;
}

/**
 * A node in a process of its own, with stored data or with the Redis of this URL. In production mode
 * it takes the tokens of `tokenOf`, also in the cookie `token`. `listen` is TOML below `[listen]`,
 * `more` below `[stream]`.
 */
export async function startNode(t, { origins = [], isProduction = false, redis = null, listen = "", more = "" } = {}) {
  const [home, port, admin] = [await folder(t), await freePort(), await freePort()];
  const auth = isProduction ? `[auth]\njwt_secret = "${SECRET}"\napi_key = "${KEY}"\ncookie = "token"\nleeway = "0s"\n` : "";
  const config = `[listen]\norigins = ${JSON.stringify(origins)}\nshutdown_grace = "1s"\n${listen}\n${auth}[stream]\nretry = "300ms"\nheartbeat_interval = "1s"\n${more}`;
  await writeFile(join(home, "pointsman.toml"), config);
  const log = openSync(join(home, "node.log"), "a");
  const options = ["--listen", `127.0.0.1:${port}`, "--admin", `127.0.0.1:${admin}`, ...(redis ? ["--redis", redis] : ["--data", join(home, "data")]), "--config", join(home, "pointsman.toml"), "--plugins", process.env.POINTSMAN_PLUGINS, ...(isProduction ? [] : ["--dev"])];
  // The environment of the person who runs the tests must not configure the node.
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith("POINTSMAN_")));
  env.POINTSMAN_PLUGINS_CACHE = process.env.POINTSMAN_CACHE;
  let child;
  const ask = (path) => fetch(`http://127.0.0.1:${admin}${path}`, { headers: { Connection: "close" } });
  const node = {
    address: `127.0.0.1:${port}`,
    url: `http://127.0.0.1:${port}`,
    async start() {
      child = spawn(process.env.POINTSMAN_BINARY, ["serve", ...options], { stdio: ["ignore", log, log], env });
      const ended = new Promise((resolve) => child.once("exit", resolve));
      child.ended = ended;
      await eventually("the node is ready", async () => {
        assert.equal(child.exitCode, null, "the node exited");
        return (await ask("/readyz").catch(() => null))?.status === 200;
      });
    },
    /** Ends the process by `SIGTERM` or `SIGKILL`. */
    async stop(signal) {
      child.kill(signal);
      await child.ended;
    },
    async restart(signal) {
      await node.stop(signal);
      await node.start();
    },
    /** Publishes one event, with its number as id, to a user or to everyone. */
    async publish(user, id, more = {}) {
      const event = { specversion: "1.0", id: String(id), source: "/clients", type: "client.test", ...(user ? { user } : { everyone: true }), data: { n: id }, ...more };
      const answer = await fetch(`${node.url}/v1/events`, {
        method: "POST",
        headers: { "Content-Type": "application/cloudevents+json", Authorization: `Bearer ${KEY}`, Connection: "close" },
        body: JSON.stringify(event),
      });
      assert.ok(answer.ok, `POST /v1/events: ${answer.status} ${await answer.text()}`);
    },
    /** A JSON answer of the admin listener. */
    ask: async (path) => (await ask(path)).json(),
    async openStreams() {
      const page = await (await ask("/metrics")).text();
      return Number(/^pointsman_streams_open (\d+)/m.exec(page)[1]);
    },
    log: () => readFile(join(home, "node.log"), "utf8"),
  };
  t.after(() => child?.kill("SIGKILL"));
  await node.start();
  return node;
}

const PAGE = `<!doctype html><title>a page</title><script type="importmap">${JSON.stringify({ imports: {
  "pointsman": "/pointsman/index.js",
  "@microsoft/fetch-event-source": "/npm/@microsoft/fetch-event-source/lib/esm/index.js",
  "sse.js": "/npm/sse.js/lib/sse.js",
  "reconnecting-eventsource": "/npm/reconnecting-eventsource/build/esm/reconnecting-eventsource.js",
} })}</script>`;
const TYPES = { ".js": "text/javascript", ".mjs": "text/javascript", ".html": "text/html" };

/**
 * Serves the package, the libraries of npm, an empty page, and tokens as an application's server.
 * `/hang` is answered when the test calls `release()`.
 */
export async function startSite(t, port = 0) {
  const [hanging, tokens] = [[], new Map()];
  const roots = { "/pointsman/": "../../clients/js/", "/npm/": "node_modules/", "/tests/": "./" };
  const server = http.createServer(async (request, answer) => {
    const { pathname, searchParams } = new URL(request.url, "http://localhost");
    if (pathname === "/token") {
      const client = searchParams.get("client");
      tokens.set(client, (tokens.get(client) ?? 0) + 1);
      return answer.end(tokenOf(searchParams.get("user"), Number(searchParams.get("life"))));
    }
    if (pathname === "/hang") return hanging.push(answer);
    if (pathname === "/") return answer.writeHead(200, { "Content-Type": "text/html" }).end(PAGE);
    const root = Object.keys(roots).find((root) => pathname.startsWith(root));
    // Bundlers add the ending, and some libraries rely on it.
    const path = root && roots[root] + pathname.slice(root.length);
    const file = root && new URL(extname(path) ? path : `${path}.js`, import.meta.url);
    const content = file && (await readFile(file).catch(() => null));
    if (!content) return answer.writeHead(404).end();
    answer.writeHead(200, { "Content-Type": TYPES[extname(file.pathname)] ?? "application/octet-stream" }).end(content);
  });
  await new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  t.after(() => { server.closeAllConnections(); server.close(); });
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    hanging,
    /** The number of tokens by client. */
    tokens,
    release: () => hanging.splice(0).forEach((answer) => answer.end()),
  };
}

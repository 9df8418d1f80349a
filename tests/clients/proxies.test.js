// The files of examples/proxies, which docs/proxies.md explains, with ports and paths of the test:
// each proxy in front of the same two nodes. Streams pass unbuffered and survive kills, drains and the
// absence of both nodes, by themselves.
import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { openSync } from "node:fs";
import { chmod, copyFile, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import http from "node:http";
import http2 from "node:http2";
import https from "node:https";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Readable } from "node:stream";
import test from "node:test";
import { EventSource } from "eventsource";
import { eventually } from "./eventually.js";
import { KEY, freePort, startNode, tokenOf } from "./installation.js";

const EXAMPLES = new URL("../../examples/proxies/", import.meta.url);
const NAME = "notify.example";
// Debian installs servers where only root has them in PATH.
const PATH = `${process.env.PATH}:/usr/sbin`;
const IS_ROOT = process.getuid() === 0;
/** What no client may pass off as its address. */
const FORGED = "203.0.113.7";

/** A folder that the unprivileged processes of the proxies can read. */
async function openFolder(t) {
  const path = await mkdtemp(join(tmpdir(), "pointsman-proxy-"));
  await chmod(path, 0o755);
  t.after(() => rm(path, { recursive: true, force: true, maxRetries: 20 }));
  return path;
}

/** A certificate and its key in one file. */
async function certificate(t) {
  const file = join(await openFolder(t), "tls.pem");
  execFileSync("openssl", ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", `/CN=${NAME}`, "-addext", `subjectAltName=DNS:${NAME}`, "-keyout", `${file}.key`, "-out", file], { stdio: "ignore" });
  const content = (await readFile(file, "utf8")) + (await readFile(`${file}.key`, "utf8"));
  await writeFile(file, content);
  return { file, ca: content };
}

/** One proxy: its processes, and how requests are sent through it. */
class Proxy {
  #ends = [];

  constructor(t, name, home, nodes, certificate, port) {
    Object.assign(this, { name, home, nodes, certificate, port });
    t.after(() => this.stop());
  }

  get url() {
    return `http${this.isPlain ? "" : "s"}://${NAME}:${this.port}`;
  }

  /** Writes a file of examples/proxies with other addresses and paths into the folder of the proxy. */
  async write(file, changes) {
    const path = join(this.home, file);
    let text = await readFile(new URL(file, EXAMPLES), "utf8");
    const own = { "/etc/pointsman/tls.pem": this.certificate.file, "10.0.0.11:8080": this.nodes[0].address, "10.0.0.12:8080": this.nodes.at(-1).address };
    for (const [from, to] of Object.entries(own)) text = text.replaceAll(from, to);
    for (const [from, to] of Object.entries(changes)) {
      assert.ok(text.includes(from), `${file} does not contain: ${from}`);
      text = text.replaceAll(from, to);
    }
    await writeFile(path, text);
    return path;
  }

  run(program, ...args) {
    const log = openSync(join(this.home, "log"), "a");
    // In a group of its own: some of these programs leave their workers when they are killed.
    const child = spawn(program, args, { stdio: ["ignore", log, log], env: { ...process.env, PATH, HOME: this.home, XDG_DATA_HOME: this.home, XDG_CONFIG_HOME: this.home }, detached: true });
    const ended = new Promise((resolve) => child.once("exit", resolve).once("error", resolve));
    ended.then(() => { this.hasExited = true; });
    this.#ends.push(async () => {
      if (child.pid === undefined) return;
      // SIGTERM reaches the processes that have left the group.
      child.kill("SIGTERM");
      await Promise.race([ended, new Promise((resolve) => setTimeout(resolve, 2_000).unref())]);
      try { process.kill(-child.pid, "SIGKILL"); } catch { /* all have ended */ }
    });
  }

  stop = () => Promise.all(this.#ends.splice(0).map((end) => end()));

  async answers() {
    const isReady = async () => this.hasExited || (await this.fetch(1)("/v1/ready").catch(() => null))?.status === 200;
    const error = await eventually(`${this.name} answers`, isReady).catch((error) => error);
    if (error || this.hasExited) throw new Error(`${this.name} does not answer: ${error?.message ?? "it exited"}\n${await readFile(join(this.home, "log"), "utf8")}`);
  }

  /** A `fetch` through this proxy by HTTP/1 or HTTP/2, from an address of the client's own. */
  fetch(version, localAddress = "127.0.0.1") {
    const lookup = (_, options, found) => options.all ? found(null, [{ address: "127.0.0.1", family: 4 }]) : found(null, "127.0.0.1", 4);
    const options = { ca: this.certificate.ca, lookup, localAddress, servername: NAME };
    return (path, { method = "GET", headers = {}, body, signal } = {}) => new Promise((resolve, reject) => {
      const url = new URL(path, this.url);
      const answer = (stream, status, headers) => resolve(new Response(Readable.toWeb(stream), { status, headers }));
      if (version === 2) {
        const session = http2.connect(url.origin, options).once("error", reject);
        session.once("connect", () => session.alpnProtocol === "h2" || reject(new Error(`${this.name} has not negotiated HTTP/2`)));
        const stream = session.request({ ":method": method, ":path": url.pathname + url.search, ...headers }, { signal });
        stream.once("error", reject).once("close", () => session.destroy());
        stream.once("response", (all) => answer(stream, all[":status"], Object.fromEntries(Object.entries(all).filter(([name]) => !name.startsWith(":")))));
        stream.end(body);
      } else {
        const request = (this.isPlain ? http : https).request(url, { ...options, method, headers, signal, agent: false }).once("error", reject);
        request.once("response", (response) => answer(response, response.statusCode, response.headers));
        request.end(body);
      }
    });
  }

  async publish(events) {
    const [type, body] = Array.isArray(events) ? ["application/cloudevents-batch+json", events] : ["application/cloudevents+json", events];
    const answer = await this.fetch(this.isPlain ? 1 : 2)("/v1/events", { method: "POST", headers: { "Content-Type": type, Authorization: `Bearer ${KEY}` }, body: JSON.stringify(body) });
    const text = await answer.text();
    assert.ok(answer.ok, `POST /v1/events through ${this.name}: ${answer.status} ${text}`);
  }
}

/** How each proxy is started with its files. */
const PROXIES = {
  async nginx(proxy) {
    const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((name) => `${name}_temp_path ${proxy.home}/${name};`);
    const file = await proxy.write("nginx.conf", {
      "/run/nginx.pid": join(proxy.home, "pid"),
      "http {": `http { access_log off; ${temporary.join(" ")}`,
      "listen 443": `listen 127.0.0.1:${proxy.port}`,
    });
    proxy.run("nginx", "-c", file, "-e", join(proxy.home, "log"), "-g", "daemon off;");
  },
  async haproxy(proxy, changes = {}) {
    await copyFile(new URL("haproxy-retry.http", EXAMPLES), join(proxy.home, "haproxy-retry.http"));
    const file = await proxy.write("haproxy.cfg", {
      // The tests may open fewer files.
      "maxconn 20000": "maxconn 500",
      "bind :443": `bind 127.0.0.1:${proxy.port}`,
      "/etc/pointsman/haproxy-retry.http": join(proxy.home, "haproxy-retry.http"),
      ...changes,
    });
    proxy.run("haproxy", "-db", "-f", file);
  },
  async caddy(proxy) {
    const file = await proxy.write("Caddyfile", { "admin localhost:2019": "admin off", "https://notify.example {": `https://${NAME}:${proxy.port} {\n\tbind 127.0.0.1` });
    proxy.run("caddy", "run", "--adapter", "caddyfile", "--config", file);
  },
  async apache(proxy) {
    await copyFile(new URL("apache-retry.asis", EXAMPLES), join(proxy.home, "apache-retry.asis"));
    const site = await proxy.write("apache.conf", { "*:443": `127.0.0.1:${proxy.port}`, "/etc/pointsman/apache-retry.asis": join(proxy.home, "apache-retry.asis") });
    // Debian enables the first four, and a2enmod adds what a module depends on.
    const [, named] = /^# a2enmod (.+)$/m.exec(await readFile(site, "utf8"));
    const modules = ["mpm_event", "authz_core", "mime", "setenvif", "slotmem_shm", "socache_shmcb", ...named.split(" ")];
    await writeFile(join(proxy.home, "main.conf"), [
      `ServerRoot ${proxy.home}`, `DefaultRuntimeDir ${proxy.home}`, `PidFile ${proxy.home}/pid`, `ErrorLog ${proxy.home}/log`, `ServerName ${NAME}`,
      ...(IS_ROOT ? ["User www-data", "Group www-data"] : []),
      ...modules.map((name) => `LoadModule ${name}_module /usr/lib/apache2/modules/mod_${name}.so`),
      "TypesConfig /dev/null", `Listen 127.0.0.1:${proxy.port}`, `Include ${site}`,
    ].join("\n"));
    proxy.run("apache2", "-D", "FOREGROUND", "-f", join(proxy.home, "main.conf"));
  },
  async varnish(proxy) {
    const port = await freePort();
    const file = await proxy.write("varnish.vcl", {});
    const [, first, second] = /^# varnishd -f \S+ -a 127.0.0.1:6086,PROXY (.+)\n# +(.+)$/m.exec(await readFile(file, "utf8"));
    proxy.run("varnishd", "-F", "-j", "none", "-n", join(proxy.home, "varnish"), "-T", "none", "-s", "malloc,64m", "-f", file, "-a", `127.0.0.1:${port},PROXY`, ...`${first} ${second}`.split(" "));
    const hitch = await proxy.write("hitch.conf", { "[*]:443": `[127.0.0.1]:${proxy.port}`, "[127.0.0.1]:6086": `[127.0.0.1]:${port}`, ...(IS_ROOT ? {} : { 'user = "_hitch"\ngroup = "_hitch"': "" }) });
    proxy.run("hitch", `--config=${hitch}`);
  },
};

/** An `EventSource` that records what it receives, and what each of its attempts was answered. */
class Client {
  shown = [];
  attempts = [];
  heartbeats = 0;
  isEnded = false;

  constructor(t, name, url, fetch, more = {}) {
    this.name = name;
    const authorized = async (url, init) => {
      const attempt = { text: "" };
      this.attempts.push(attempt);
      const headers = { ...init.headers, Authorization: `Bearer ${tokenOf(name)}`, ...more };
      const answer = await fetch(url, { ...init, headers });
      Object.assign(attempt, { status: answer.status, type: answer.headers.get("content-type") });
      const text = new TextDecoder();
      const body = answer.body.pipeThrough(new TransformStream({
        transform: (chunk, controller) => {
          const piece = text.decode(chunk, { stream: true });
          if (attempt.text.length < 1_000) attempt.text += piece;
          this.heartbeats += piece.match(/^:/gm)?.length ?? 0;
          controller.enqueue(chunk);
        },
      }));
      return new Response(body, { status: answer.status, headers: answer.headers });
    };
    const source = new EventSource(url, { fetch: authorized });
    source.onmessage = ({ data }) => this.shown.push(JSON.parse(data).data.n);
    source.onerror = () => { this.isEnded ||= source.readyState === EventSource.CLOSED; };
    this.close = () => source.close();
    t.after(this.close);
  }

  get isOpen() {
    return this.attempts.at(-1)?.text.includes("event: cursor") ?? false;
  }

  /** The attempts that the proxy answered by itself. */
  get byProxy() {
    return this.attempts.filter(({ text }) => text === "retry: 2000\n\n");
  }
}

test("each documented proxy carries streams through all that nodes do", { timeout: 300_000 }, async (t) => {
  const more = `[ingest]\nlease_ttl = "1s"\n[log]\nfilter = "info,pointsman::access=debug"\n`;
  const listen = 'trusted_proxies = ["127.0.0.1"]';
  const start = (options) => startNode(t, { isProduction: true, more, listen, ...options });
  const redis = process.env.POINTSMAN_TEST_REDIS;
  const pem = await certificate(t);
  const [nodes, behindHeader] = await Promise.all([
    Promise.all([start({ redis }), start({ redis })]),
    start({ listen: `${listen}\nproxy_protocol = true` }),
  ]);
  const startProxy = async (name, nodes, begin) => {
    const proxy = new Proxy(t, name, await openFolder(t), nodes, pem, await freePort());
    await begin(proxy);
    await proxy.answers();
    return proxy;
  };
  const proxies = await Promise.all(Object.entries(PROXIES).map(([name, begin]) => startProxy(name, nodes, begin)));

  // Each client has an address of its own.
  const clients = proxies.flatMap((proxy, i) => [1, 2].map((version) => {
    const address = `127.0.${version}.${i + 1}`;
    const client = new Client(t, `${proxy.name}-${version}`, `${proxy.url}/v1/stream`, proxy.fetch(version, address), { "X-Forwarded-For": FORGED });
    return Object.assign(client, { proxy, address });
  }));
  await eventually("every client has a stream", () => clients.every((client) => client.isOpen));

  let n = 0;
  const publish = async (more = {}) => {
    const id = ++n;
    // Through each proxy in turn.
    await proxies[id % proxies.length].publish({ specversion: "1.0", id: String(id), source: "/proxies", type: "client.test", everyone: true, data: { n: id }, ...more });
  };
  /** Every client shows all notifications, each once and in order. */
  const showAll = async () => {
    const late = () => clients.filter(({ shown }) => shown.length < n);
    await eventually(`all clients show ${n} notifications`, () => late().length === 0).catch((error) => {
      throw new Error(`${error.message}; not shown by ${late().map(({ name, shown, attempts, isEnded }) => `${name}: ${shown}; ${isEnded ? "ended" : ""} ${JSON.stringify(attempts.at(-1))}`).join("\n")}`);
    });
    const wanted = Array.from({ length: n }, (_, i) => i + 1);
    for (const { name, shown, isEnded } of clients) {
      assert.deepEqual(shown, wanted, name);
      assert.ok(!isEnded, `${name} has ended for good`);
    }
  };
  /** No proxy answered in the place of a node since the test began. */
  const isInvisible = () => {
    for (const { name, attempts, byProxy } of clients) {
      assert.deepEqual(byProxy, [], name);
      for (const { status } of attempts) assert.equal(status, 200, name);
    }
  };

  await t.test("a frame arrives before the next one is published, within few round trips", async (t) => {
    const direct = new Client(t, "direct", `${nodes[0].url}/v1/stream`, fetch);
    // HAProxy delays frames on connections without TLS only.
    const plain = await startProxy("haproxy without TLS", nodes, (proxy) => {
      proxy.isPlain = true;
      return PROXIES.haproxy(proxy, { [` ssl crt ${pem.file} alpn h2,http/1.1`]: "" });
    });
    const more = Object.assign(new Client(t, "haproxy without TLS", `${plain.url}/v1/stream`, plain.fetch(1)), { proxy: plain });
    await eventually("the direct clients have streams", () => direct.isOpen && more.isOpen);
    const trips = new Map([...clients, more].map(({ name }) => [name, []]));
    for (let i = 1; i <= 9; i++) {
      await publish();
      await eventually("the direct client shows it", () => direct.shown.length === i);
      // Round trips are the clock of this test: on a loaded machine, it goes slower as well.
      for (let trip = 0; trip < 1_000; trip++) {
        const waiting = [...clients, more].filter(({ shown }) => shown.length < i);
        if (waiting.length === 0) break;
        for (const { name } of waiting) trips.get(name)[i] = trip;
        await (await fetch(`${nodes[0].url}/v1/ready`)).text();
      }
      await showAll();
    }
    for (const [name, counts] of trips) {
      // A proxy that delays frames delays all of them.
      const fewest = Math.min(...Array.from({ length: 9 }, (_, i) => counts[i + 1] ?? 0));
      assert.ok(fewest < 4, `${name}: each frame took ${fewest} round trips more than directly`);
    }
    direct.close();
    more.close();
    await plain.stop();
  });

  await t.test("urgent frames and heartbeats pass", async () => {
    const before = clients.map(({ heartbeats, attempts }) => ({ heartbeats, attempts: attempts.length }));
    await eventually("heartbeats pass", () => clients.every(({ heartbeats }, i) => heartbeats >= before[i].heartbeats + 2));
    for (const [i, { name, attempts }] of clients.entries()) assert.equal(attempts.length, before[i].attempts, `${name}: a stream with heartbeats ended`);
    await publish({ priority: "urgent" });
    await showAll();
  });

  await t.test("the node sees the address of the client, which cannot forge it", async () => {
    const log = (await Promise.all(nodes.map((node) => node.log()))).join("");
    for (const { name, address } of clients) assert.match(log, new RegExp(`client=${address.replaceAll(".", "\\.")} .*/v1/stream`), name);
    assert.ok(!log.includes(`client=${FORGED}`), "a client has forged its address");
  });

  await t.test("a token of 32 KiB in a cookie and a batch of 4 MiB pass", async () => {
    await Promise.all(proxies.map(async (proxy) => {
      const token = tokenOf("ada", 3_600, { pad: "x".repeat(24_420) });
      assert.ok(token.length > 32_000 && token.length < 32_768);
      for (const version of [1, 2]) {
        const answer = await proxy.fetch(version)("/v1/notifications", { headers: { Cookie: `token=${token}` } });
        assert.equal(answer.status, 200, `${proxy.name}, HTTP/${version}: ${await answer.text()}`);
      }
      // The batches of the others are duplicates of the first, which cost a node little.
      await proxy.publish(Array.from({ length: 16 }, (_, i) => ({ specversion: "1.0", id: `${i}`, source: "/large", type: "client.large", user: "ada", data: "x".repeat(250_000) })));
    }));
  });

  for (const signal of ["SIGKILL", "SIGTERM"]) {
    await t.test(`${signal} of one node after the other is invisible`, async () => {
      for (const node of nodes) {
        await node.stop(signal);
        for (const proxy of proxies) {
          for (let i = 0; i < 4; i++) {
            const answer = await proxy.fetch(2)("/v1/ready");
            assert.equal(answer.status, 200, `${proxy.name}, without one node: ${await answer.text()}`);
          }
        }
        for (let i = 0; i < 3; i++) await publish();
        await showAll();
        await node.start();
      }
      for (let i = 0; i < 3; i++) await publish();
      await showAll();
      isInvisible();
    });
  }

  await t.test("without a node, an EventSource waits and comes back by itself", async () => {
    await publish();
    await showAll();
    await Promise.all(nodes.map((node) => node.stop("SIGKILL")));
    // 2 s each, so that the nodes are away for about 5 s.
    await eventually("each proxy answers each client in place of a node", () => clients.every(({ byProxy }) => byProxy.length >= 2)).catch((error) => {
      throw new Error(`${error.message}: ${clients.filter(({ byProxy }) => byProxy.length < 2).map(({ name, attempts }) => `${name} ${JSON.stringify(attempts.slice(-2))}`).join("\n")}`);
    });
    for (const { name, byProxy } of clients) {
      for (const { type } of byProxy) assert.match(type, /^text\/event-stream\b/, name);
    }
    await Promise.all(proxies.map(async (proxy) => {
      const answer = await proxy.fetch(2)("/v1/notifications");
      assert.ok([502, 503, 504].includes(answer.status), `${proxy.name} answers other requests with ${answer.status}`);
      await answer.text();
    }));
    await Promise.all(nodes.map((node) => node.start()));
    // Health checks find the nodes within seconds; publishers are answered 503 until then.
    await Promise.all(proxies.map((proxy) => proxy.answers()));
    for (let i = 0; i < 3; i++) await publish();
    await showAll();
  });

  await t.test("HAProxy names the client by the PROXY protocol", async (t) => {
    const proxy = await startProxy("haproxy with PROXY", [behindHeader], (proxy) => PROXIES.haproxy(proxy, { "# default-server send-proxy-v2": "default-server send-proxy-v2", "    option forwardfor\n": "" }));
    const client = new Client(t, "header", `${proxy.url}/v1/stream`, proxy.fetch(2, "127.0.3.1"));
    await eventually("the client has a stream", () => client.isOpen);
    await proxy.publish({ specversion: "1.0", id: "1", source: "/proxies", type: "client.test", everyone: true, data: { n: 1 } });
    await eventually("the client shows it", () => client.shown.length === 1);
    assert.match(await behindHeader.log(), /client=127\.0\.3\.1 .*\/v1\/stream/);
    client.close();
  });
});

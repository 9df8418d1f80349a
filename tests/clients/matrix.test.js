// Every library of docs/clients.md, with the lines of that page and no others, directly and behind
// nginx: through SIGTERM, SIGKILL, five seconds without a node and expired tokens, each shows nine
// of nine notifications once and in order.
import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { access, mkdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import test from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { launch } from "./browsers.js";
import { eventually } from "./eventually.js";
import { folder, freePort, startNode, startSite } from "./installation.js";

const MODULES = fileURLToPath(new URL("node_modules", import.meta.url));
const PACKAGE = fileURLToPath(new URL("../../clients/js", import.meta.url));

/** Where each section of the page runs. `eventsource` is what a version is called in package.json. */
const CLIENTS = {
  "pointsman": ["node", "chromium", "firefox"],
  "EventSource of browsers": ["chromium", "firefox"],
  "eventsource 3 and 4": [{ eventsource: "eventsource3" }, { eventsource: "eventsource" }],
  "eventsource 2": [{ eventsource: "eventsource2" }],
  "event-source-polyfill": ["node"],
  "@microsoft/fetch-event-source": ["chromium"],
  "sse.js": ["chromium"],
  "reconnecting-eventsource": ["chromium"],
  "launchdarkly-eventsource": ["node"],
  "httpx-sse": ["python"],
  "sseclient-py": ["python"],
};

/** The lines of each section that has some. */
async function sections() {
  const page = await readFile(new URL("../../docs/clients.md", import.meta.url), "utf8");
  const parts = page.split(/^### /m).slice(1);
  return new Map(parts.map((part) => [part.slice(0, part.indexOf("\n")), /^```\w+\n([^]*?)^```/m.exec(part)[1]]));
}

/** nginx in front of a node, with its defaults. */
async function startNginx(t, node) {
  const [home, port] = [await folder(t), await freePort()];
  const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((name) => `${name}_temp_path ${home}/${name};`);
  await writeFile(join(home, "nginx.conf"), `
    daemon off; master_process off; pid ${home}/pid; error_log ${home}/error.log;
    events {}
    http {
      access_log off; ${temporary.join(" ")}
      server {
        listen 127.0.0.1:${port};
        location / {
          proxy_pass http://${node.address};
          proxy_http_version 1.1;
          proxy_set_header Connection "";
          proxy_set_header Host $host;
        }
      }
    }`);
  const nginx = spawn("nginx", ["-p", home, "-c", join(home, "nginx.conf"), "-e", join(home, "error.log")], { stdio: "inherit", env: { ...process.env, PATH: `${process.env.PATH}:/usr/sbin` } });
  t.after(() => nginx.kill("SIGKILL"));
  await eventually("nginx answers", async () => (await fetch(`http://127.0.0.1:${port}/v1/ready`).catch(() => null))?.ok);
  return `http://127.0.0.1:${port}`;
}

/** Python with the libraries, kept between runs of the tests. */
async function python() {
  const list = new URL("requirements.txt", import.meta.url);
  const hash = createHash("sha256").update(await readFile(list)).digest("hex").slice(0, 12);
  const home = join(process.env.POINTSMAN_TMP ?? tmpdir(), `clients-python-${hash}`);
  const program = join(home, "bin/python");
  if (await access(join(home, "complete")).then(() => false, () => true)) {
    await rm(home, { recursive: true, force: true });
    const run = promisify(execFile);
    await run("python3", ["-m", "venv", home]);
    await run(program, ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", fileURLToPath(list)]);
    await writeFile(join(home, "complete"), "");
  }
  return program;
}

// The output of each client: a line of JSON, ["shown", client, n].
const PYTHON = `
import json, sys, threading, urllib.request
clients = json.load(open(sys.argv[1]))
lock = threading.Lock()
def run(client):
    def token():
        return urllib.request.urlopen(client['token']).read().decode()
    def show(notification):
        # In one piece: print() writes the end of the line by itself.
        with lock: print(json.dumps(['shown', client['name'], notification['data']['n']]), flush=True)
    exec(compile(client['lines'], client['name'], 'exec'), {'url': client['url'], 'token': token, 'show': show})
threads = [threading.Thread(target=run, args=(client,)) for client in clients]
for thread in threads: thread.start()
for thread in threads: thread.join()
`;
const GIVEN = "const { url, user, token, renewCookie, show } = globalThis.given(import.meta.url);\n";

/** One run of all clients: what each has shown. */
class Run {
  shown = new Map();
  #ends = [];
  #clients;

  constructor(clients) {
    this.#clients = clients;
    for (const { name } of clients) this.shown.set(name, []);
  }

  report = (kind, name, value) => {
    if (kind === "shown") this.shown.get(name).push(value);
  };

  #spawn(program, args) {
    const child = spawn(program, args, { stdio: ["ignore", "pipe", "inherit"] });
    createInterface({ input: child.stdout }).on("line", (line) => this.report(...JSON.parse(line)));
    this.#ends.push(() => child.kill("SIGKILL"));
  }

  async start(t, lines, site, browsers) {
    const home = await folder(t);
    const of = (kind) => this.#clients.filter((client) => client.runs === kind);
    await writeFile(join(home, "python.json"), JSON.stringify(of("python").map((client) => ({ ...client, lines: lines.get(client.section) }))));
    await writeFile(join(home, "clients.py"), PYTHON);
    this.#spawn(await python(), [join(home, "clients.py"), join(home, "python.json")]);

    // Each client of Node.js has a folder of its own, in which the library has its plain name.
    const inNode = this.#clients.filter(({ runs }) => runs === "node" || typeof runs === "object");
    const files = await Promise.all(inNode.map(async (client, i) => {
      const own = join(home, `client-${i}`);
      await mkdir(join(own, "node_modules"), { recursive: true });
      const packages = { pointsman: PACKAGE, ...Object.fromEntries(["event-source-polyfill", "launchdarkly-eventsource"].map((name) => [name, join(MODULES, name)])) };
      for (const [name, alias] of Object.entries(client.runs === "node" ? {} : client.runs)) packages[name] = join(MODULES, alias);
      for (const [name, target] of Object.entries(packages)) await symlink(target, join(own, "node_modules", name));
      await writeFile(join(own, "client.mjs"), GIVEN + lines.get(client.section));
      return [join(own, "client.mjs"), client];
    }));
    await writeFile(join(home, "clients.mjs"), `
      import { pathToFileURL } from "node:url";
      const clients = new Map(${JSON.stringify(files)}.map(([file, client]) => [pathToFileURL(file).href, client]));
      globalThis.given = (file) => {
        const { name, url, user, token } = clients.get(file);
        return { url, user, token: async () => (await fetch(token)).text(), show: ({ data }) => console.log(JSON.stringify(["shown", name, data.n])) };
      };
      for (const file of clients.keys()) import(file);
    `);
    this.#spawn(process.execPath, [join(home, "clients.mjs")]);

    for (const [name, browser] of Object.entries(browsers)) {
      // A page of its own for each path: a browser opens six connections to a host.
      for (const path of ["direct", "nginx"]) {
        const page = await browser.newPage();
        this.#ends.push(() => page.close());
        await page.exposeFunction("report", this.report);
        await page.goto(site.url);
        for (const client of of(name).filter((client) => client.path === path)) {
          await page.evaluate(async (client, given, lines) => {
            const token = async () => (await fetch(client.token)).text();
            const renewCookie = async () => { document.cookie = `token=${await token()}`; };
            await renewCookie();
            window.clients ??= {};
            window.clients[client.name] = { ...client, token, renewCookie, show: ({ data }) => window.report("shown", client.name, data.n) };
            window.given = (name) => window.clients[name];
            const script = document.createElement("script");
            script.type = "module";
            script.textContent = given.replace("import.meta.url", JSON.stringify(client.name)) + lines;
            document.head.append(script);
          }, client, GIVEN, lines.get(client.section));
        }
      }
    }
  }

  async stop() {
    for (const end of this.#ends.splice(0)) await end();
  }

  /** Waits until every client has shown the notifications up to `n`, each once and in order. */
  async shows(n, from = 1) {
    const wanted = Array.from({ length: n - from + 1 }, (_, i) => from + i);
    const late = () => [...this.shown].filter(([, ids]) => ids.length < wanted.length).map(([name, ids]) => `${name}: ${ids}`);
    await eventually("all clients show all", () => late().length === 0, 120_000).catch((error) => {
      throw new Error(`${error.message}; up to ${n}, these do not:\n${late().join("\n")}`);
    });
    for (const [name, ids] of this.shown) assert.deepEqual(ids, wanted, name);
  }
}

test("with the lines of docs/clients.md, no client loses, repeats or reorders a notification", { timeout: 600_000 }, async (t) => {
  const lines = await sections();
  assert.deepEqual([...lines.keys()], Object.keys(CLIENTS), "the sections of docs/clients.md");
  const site = await startSite(t, await freePort());
  const node = await startNode(t, { origins: [site.url], isProduction: true });
  const paths = { direct: node.url, nginx: await startNginx(t, node) };
  const browsers = Object.fromEntries(await Promise.all(["chromium", "firefox"].map(async (name) => [name, await launch(t, name)])));

  const clients = (life) => Object.entries(CLIENTS).flatMap(([section, places]) => places.flatMap((runs) => Object.entries(paths).map(([path, origin]) => {
    const name = `${section} in ${typeof runs === "object" ? Object.values(runs) : runs}, ${path}`;
    const query = new URLSearchParams({ user: "ada", life, client: name });
    return { section, runs, path, name, user: "ada", url: `${origin}/v1/stream`, token: `${site.url}/token?${query}` };
  })));
  /** Opens all clients; the first notification that one shows is the first that is published. */
  const start = async (life) => {
    const run = new Run(clients(life));
    await run.start(t, lines, site, browsers);
    await eventually("every client has a stream", async () => (await node.openStreams()) >= run.shown.size);
    return run;
  };
  let n = 0;
  const publish = async () => { for (let i = 0; i < 3; i++) await node.publish(null, ++n); };

  const interruptions = {
    SIGTERM: () => node.restart("SIGTERM"),
    SIGKILL: () => node.restart("SIGKILL"),
    "five seconds": async () => {
      await node.stop("SIGKILL");
      await new Promise((resolve) => setTimeout(resolve, 5_000));
      await node.start();
    },
  };
  const run = await start(3_600);
  t.after(() => run.stop());
  for (const [name, interrupt] of Object.entries(interruptions)) {
    await t.test(name, async () => {
      await publish();
      await run.shows(n);
      await interrupt();
      await publish();
      await run.shows(n);
      await publish();
      await run.shows(n);
    });
  }
  await run.stop();

  await t.test("expired tokens", async () => {
    await eventually("no stream is open", async () => (await node.openStreams()) === 0);
    const before = n;
    const expiring = await start(4);
    const renewals = () => clients(4).map(({ name }) => site.tokens.get(name) ?? 0);
    for (let round = 0; round < 3; round++) {
      const had = renewals();
      await publish();
      await eventually("every client has a new token", () => renewals().every((count, i) => count > had[i]), 120_000)
        .catch((error) => { throw new Error(`${error.message}: ${clients(4).map(({ name }, i) => `${name} ${had[i]} ${renewals()[i]}`)}`); });
    }
    await expiring.shows(n, before + 1);
    await expiring.stop();
  });
});

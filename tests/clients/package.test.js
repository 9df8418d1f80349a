// The package `pointsman` as npm publishes it: its files, its size, its types, and the hook of React.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { cp, mkdir, readFile, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import test from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { gzipSync } from "node:zlib";
import { eventually } from "./eventually.js";
import { folder, startNode } from "./installation.js";

const PACKAGE = fileURLToPath(new URL("../../clients/js", import.meta.url));
const MODULES = fileURLToPath(new URL("node_modules", import.meta.url));

const run = async (program, args, options) => (await promisify(execFile)(program, args, options)).stdout;

const SAMPLE = `
import { connect, type Notification, type State } from "pointsman";
import { useNotifications } from "pointsman/react";

interface Order { order: number }
const controller = new AbortController();
const connection = connect<Order>("/v1/stream?types=order.*", {
  user: "42",
  device: "laptop",
  signal: controller.signal,
  timeout: 60_000,
  shared: false,
  storage: sessionStorage,
  token: async ({ isRenewal }) => (await fetch(isRenewal ? "/renew" : "/token")).text(),
  onNotification: ({ data, priority }: Notification<Order>, { id, event, isLeading }) => console.log(data?.order, priority, id, event, isLeading),
  onGap: ({ reason }) => console.log(reason),
  onState: (state: State, { status, delay }) => console.log(state, status, delay),
});
await connection.markRead(connection.position);
connect("/v1/stream", { user: "42", token: async () => { await fetch("/cookie"); } });
connection.close();
// @ts-expect-error: the state is read-only.
connection.state = "live";
// @ts-expect-error: there is no such option.
connect("/v1/stream", { users: "42" });

export function Bell({ user }: { user: string | null }) {
  const { notifications, state, markRead, clear } = useNotifications<Order>("/v1/stream", { user, limit: 20 });
  return [notifications.map(({ data }) => data?.order), state, markRead, clear];
}
`;

test("the client is smaller than 5 KB compressed, as it is published", async () => {
  const size = gzipSync(await readFile(join(PACKAGE, "index.js")), { level: 9 }).length;
  assert.ok(size < 5_000, `it has ${size} bytes`);
});

test("npm packs the package with its types, which applications import", { timeout: 240_000 }, async (t) => {
  const home = await folder(t);
  const [packed] = JSON.parse(await run("npm", ["pack", "--json", "--pack-destination", home], { cwd: PACKAGE }));
  assert.deepEqual(packed.files.map(({ path }) => path).sort(), ["LICENSE", "README.md", "index.d.ts", "index.js", "package.json", "react.d.ts", "react.js"]);
  const about = JSON.parse(await readFile(join(PACKAGE, "package.json"), "utf8"));
  assert.equal(about.dependencies, undefined);
  const cargo = await readFile(new URL("../../Cargo.toml", import.meta.url), "utf8");
  assert.equal(about.version, /^version = "(.*)"/m.exec(cargo)[1], "the package has the version of the node");

  await writeFile(join(home, "package.json"), JSON.stringify({ private: true, type: "module" }));
  await mkdir(join(home, "node_modules/pointsman"), { recursive: true });
  await run("tar", ["xf", join(home, packed.filename), "--strip-components=1", "-C", join(home, "node_modules/pointsman")]);
  for (const name of ["react", "@types"]) await symlink(join(MODULES, name), join(home, "node_modules", name));
  const names = await run(process.execPath, ["-e", 'Promise.all(["pointsman", "pointsman/react"].map((name) => import(name))).then((all) => console.log(all.flatMap(Object.keys).join()))'], { cwd: home });
  assert.equal(names.trim(), "Connection,connect,useNotifications");
  await writeFile(join(home, "sample.ts"), SAMPLE);
  const options = ["--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom", "--types", "react", "--skipLibCheck", "false"];
  await run(process.execPath, [join(MODULES, "typescript/bin/tsc"), ...options, "sample.ts"], { cwd: home }).catch(({ stdout }) => assert.fail(stdout));
});

test("the hook of React follows the user who is signed in", { timeout: 120_000 }, async (t) => {
  globalThis.IS_REACT_ACT_ENVIRONMENT = false;
  const { StrictMode, createElement } = await import("react");
  const { create } = await import("react-test-renderer");
  // Where the package finds React.
  const home = join(await folder(t), "node_modules");
  await cp(PACKAGE, join(home, "pointsman"), { recursive: true });
  await symlink(join(MODULES, "react"), join(home, "react"));
  const { useNotifications } = await import(join(home, "pointsman/react.js"));
  const node = await startNode(t);
  let view;
  const handled = [];
  function Bell({ user, tag }) {
    view = useNotifications(user && `${node.url}/v1/stream?user=${user}`, { user, limit: 2, onNotification: ({ id }) => handled.push(`${tag} ${id}`) });
    return null;
  }
  // Strict mode mounts each effect twice.
  const render = (user, tag) => createElement(StrictMode, null, createElement(Bell, { user, tag }));
  const ids = () => view.notifications.map(({ id }) => id);
  const root = create(render("ada", "first"));
  t.after(() => root.unmount());
  await eventually("ada is live", () => view?.state === "live");
  await node.publish("ada", 1);
  await eventually("ada has one", () => ids().join() === "1");
  // A new handler does not open a new connection.
  root.update(render("ada", "second"));
  for (const n of [2, 3]) await node.publish("ada", n);
  await eventually("ada has the newest two", () => ids().join() === "3,2");
  assert.deepEqual(handled, ["first 1", "second 2", "second 3"]);
  await view.markRead();
  const page = await (await fetch(`${node.url}/v1/notifications?user=ada`)).json();
  assert.equal(page.unread.count, 0);
  view.clear();
  await eventually("the list is empty", () => ids().length === 0);

  root.update(render("bo", "second"));
  await eventually("bo is live", () => view?.state === "live");
  await node.publish("ada", 4);
  await node.publish("bo", 5);
  await eventually("bo has one", () => ids().join() === "5");
  root.update(render(null));
  await eventually("no stream is open", async () => (await node.openStreams()) === 0);
  assert.deepEqual(view.notifications, []);
  root.update(render("bo", "third"));
  await eventually("bo is live again", () => view?.state === "live");
  root.unmount();
  await eventually("the stream is closed", async () => (await node.openStreams()) === 0);
});

// Clients that generators make from the document of a node are valid TypeScript, publish and read;
// and the document has no fault that a linter knows.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import test, { after } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";
import { promisify } from "node:util";
import { address } from "./node-under-test.js";

const here = fileURLToPath(new URL(".", import.meta.url));
const folder = await mkdtemp(join(tmpdir(), "pointsman-generated-"));
after(() => rm(folder, { recursive: true }));
const document = join(folder, "openapi.json");
await writeFile(document, await (await fetch(`http://${address}/v1/openapi.json`)).text());
await symlink(join(here, "node_modules"), join(folder, "node_modules"));
// Node runs CommonJS without the file extensions that one of the generators leaves out.
await writeFile(join(folder, "package.json"), '{ "type": "commonjs" }');

/** Runs a tool of node_modules; its output is in the error if it fails. */
async function run(tool, ...args) {
  const command = join(here, "node_modules/.bin", tool);
  return promisify(execFile)(process.execPath, [command, ...args], { cwd: folder }).catch(({ message, stdout, stderr }) => {
    throw new Error(`${message}\n${stdout}\n${stderr}`);
  });
}

/** What a page of an application would have, for each of the two clients. */
const OPENAPI_FETCH = `
import createClient from "openapi-fetch";
import type { paths } from "./openapi-typescript";

export async function publishAndRead(baseUrl: string, user: string): Promise<unknown[]> {
  const client = createClient<paths>({ baseUrl });
  const { data, error } = await client.POST("/v1/events", { body: { type: "client.test", id: "a", source: \`/generated/\${user}\`, user, data: { n: 1 } } });
  if (error) throw new Error(error.error);
  const headers = { "Content-Type": "application/cloudevents-batch+json" };
  const batch = await client.POST("/v1/events", { body: [{ type: "client.test", id: "b", source: \`/generated/\${user}\`, user }], headers });
  if (batch.error) throw new Error(batch.error.error);
  if (data && !("entry" in data)) throw new Error("not stored");
  for (;;) {
    // In dev mode the user is a parameter; otherwise it is in the token.
    const asUser = (query: object) => new URLSearchParams({ ...query, user }).toString();
    const page = await client.GET("/v1/notifications", { params: { query: { limit: 10 } }, querySerializer: asUser });
    if (page.error) throw new Error(page.error.error);
    if (page.data.notifications.length >= 2) return page.data.notifications.map(({ data }) => data.data);
  }
}
`;

const HEY_API = `
import { createClient } from "./hey-api/client";
import { publishEvents, readNotifications } from "./hey-api";

export async function publishAndRead(baseUrl: string, user: string): Promise<unknown[]> {
  const client = createClient({ baseUrl });
  const stored = await publishEvents({ client, body: { type: "client.test", id: "a", source: \`/generated/\${user}\`, user, data: { n: 1 } } });
  if (stored.error) throw new Error(stored.error.error);
  const second = await publishEvents({ client, body: { type: "client.test", id: "b", source: \`/generated/\${user}\`, user } });
  if (second.error) throw new Error(second.error.error);
  // In dev mode the user is a parameter; otherwise it is in the token.
  const asUser = (query: object) => new URLSearchParams({ ...query, user }).toString();
  for (;;) {
    const page = await readNotifications({ client, query: { limit: 10 }, querySerializer: asUser });
    if (page.error) throw new Error(page.error.error);
    if (page.data.notifications.length >= 2) return page.data.notifications.map(({ data }) => data.data);
  }
}
`;

const CLIENTS = { "openapi-fetch": OPENAPI_FETCH, "hey-api-client": HEY_API };

test("generated clients are valid TypeScript, publish and read", { timeout: 300_000 }, async () => {
  await Promise.all([
    run("openapi-typescript", document, "--output", "openapi-typescript.ts"),
    run("openapi-ts", "--input", document, "--output", "hey-api", "--client", "@hey-api/client-fetch", "--no-log-file", "--silent"),
  ]);
  for (const [name, source] of Object.entries(CLIENTS)) await writeFile(join(folder, `${name}.ts`), source);
  const options = { strict: true, target: "es2022", module: "commonjs", moduleResolution: "node10", outDir: "js", skipLibCheck: true, types: [], lib: ["es2022", "dom", "dom.iterable"] };
  await writeFile(join(folder, "tsconfig.json"), JSON.stringify({ compilerOptions: options, files: Object.keys(CLIENTS).map((name) => `${name}.ts`) }));
  await run("tsc", "--project", "tsconfig.json");
  for (const name of Object.keys(CLIENTS)) {
    const { publishAndRead } = await import(pathToFileURL(join(folder, `js/${name}.js`)));
    assert.deepEqual(await publishAndRead(`http://${address}`, `reader-of-${name}`), [{ n: 1 }, null], name);
  }
});

test("a linter finds no fault in the document", { timeout: 300_000 }, async () => {
  await run("redocly", "lint", document, "--config", join(here, "redocly.yaml"));
});

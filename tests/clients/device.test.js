// A page that was closed in the evening and is reopened in the morning, in a browser with an empty
// profile, shows the notifications in between.
import { readFile } from "node:fs/promises";
import http from "node:http";
import test from "node:test";
import { chromium } from "playwright-core";
import { address, eventually, publish } from "./node-under-test.js";

/** Serves the page from an origin other than the node's. */
async function serve() {
  const page = await readFile(new URL("device-page.html", import.meta.url));
  const server = http.createServer((_, answer) => answer.writeHead(200, { "Content-Type": "text/html" }).end(page));
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  return { url: `http://127.0.0.1:${server.address().port}/`, close: () => { server.closeAllConnections(); server.close(); } };
}

test("a closed page misses nothing and shows nothing twice", { timeout: 240_000 }, async (t) => {
  const site = await serve();
  t.after(() => site.close());

  /** Opens the page of a device in a new browser with an empty profile. */
  const open = async (device) => {
    const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-dev-shm-usage"], timeout: 60_000 });
    t.after(() => browser.close());
    const page = await browser.newPage();
    await page.goto(`${site.url}?node=http://${address}&user=ada&device=${device}`);
    const notes = () => page.locator("#notes li").evaluateAll((items) => items.map(({ dataset }) => [dataset.event, dataset.acknowledged]));
    await eventually(`${device} is live`, async () => (await page.locator("#notes").getAttribute("data-state")) === "live");
    return {
      close: () => browser.close(),
      /** Waits until exactly these are shown and acknowledged, in any order: urgent ones overtake. */
      shows: async (...ids) => {
        const wanted = JSON.stringify(ids.map((id) => [id, "204"]).sort());
        let shown;
        await eventually(`${device} shows ${ids}`, async () => (shown = JSON.stringify((await notes()).sort())) === wanted)
          .catch((error) => { throw new Error(`${error.message}; it shows ${shown}`); });
      },
    };
  };

  let laptop = await open("laptop");
  await publish("ada", "evening-1");
  await publish("ada", "evening-2");
  await laptop.shows("evening-1", "evening-2");
  await laptop.close();

  // Another device connects for the first time and receives nothing before it is closed.
  await (await open("phone")).close();

  await publish("ada", "night-1");
  await publish("bo", "not-for-ada");
  await publish("ada", "night-2", { priority: "urgent" });
  await publish("ada", "night-3");

  laptop = await open("laptop");
  const phone = await open("phone");
  for (const device of [laptop, phone]) await device.shows("night-1", "night-2", "night-3");
  await laptop.close();
  await publish("ada", "later");
  laptop = await open("laptop");
  await laptop.shows("later");
  await phone.shows("night-1", "night-2", "night-3", "later");
});

// The demo page in a real browser: notifications arrive once, through a cut by hand and one of the network.
import assert from "node:assert/strict";
import { mkdir } from "node:fs/promises";
import test from "node:test";
import { chromium } from "playwright-core";
import { address, eventually, publish } from "./node-under-test.js";
import { proxy } from "./proxy.js";

const BUILD = new URL("../../build/", import.meta.url);

test("the demo page shows each notification once, through cuts", { timeout: 240_000 }, async (t) => {
  const line = await proxy(address);
  t.after(() => line.close());
  // Without a sandbox of its own: tests often run as root, where Chromium refuses to make one, and the page is ours.
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-dev-shm-usage"], timeout: 60_000 });
  t.after(() => browser.close());
  const page = await browser.newPage({ viewport: { width: 1200, height: 800 }, colorScheme: "light" });
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("request", (request) => {
    const { origin, pathname } = new URL(request.url());
    if (request.url().startsWith("data:") || (origin === line.url && (pathname === "/" || pathname.startsWith("/v1/")))) return;
    complaints.push(`the page asked for ${request.url()}`);
  });
  const state = (wanted) => eventually(`the state '${wanted}'`, async () => (await page.locator("#state").getAttribute("data-state")) === wanted);
  const cursor = () => page.locator("#cursor").textContent();
  const shown = () => page.locator("li.note").evaluateAll((items) => items.map((item) => item.dataset.event).reverse());
  const arrives = (id) => eventually(`${id} on the page`, async () => (await shown()).includes(id));

  await page.goto(`${line.url}/`);
  await page.getByRole("button", { name: "ada", exact: true }).click();
  await state("live");
  await eventually("a cursor", async () => (await cursor()) !== "none");

  await page.getByLabel("Text").fill("hello from the page");
  await page.getByRole("button", { name: "Publish" }).click();
  await page.getByText("hello from the page").waitFor();
  const [own] = await shown();

  // Cut by hand, published to, resumed with the last event id.
  await page.getByRole("button", { name: "Cut the connection" }).click();
  await state("cut");
  await publish("ada", "missed-by-hand", { priority: "urgent", data: { text: "missed by hand" } });
  await page.getByRole("button", { name: "Resume" }).click();
  await arrives("missed-by-hand");
  assert.equal(await page.getByText("while you were away").count(), 1);

  // Cut by the network; the browser comes back by itself.
  line.cut();
  await state("connecting");
  await publish("ada", "missed-by-network");
  line.mend();
  await arrives("missed-by-network");

  // A reload forgets everything but the cursor, which the page keeps.
  await publish("bo", "not-for-ada");
  await publish("ada", "before-reload", { priority: "low" });
  await arrives("before-reload");
  assert.deepEqual(await shown(), [own, "missed-by-hand", "missed-by-network", "before-reload"]);
  assert.equal(await page.locator("#twice").textContent(), "0");
  assert.equal(await page.locator("#gaps").textContent(), "0");
  await mkdir(BUILD, { recursive: true });
  await page.screenshot({ path: new URL("demo-page.png", BUILD).pathname });

  await page.setViewportSize({ width: 360, height: 740 });
  await page.emulateMedia({ colorScheme: "dark" });
  const overflow = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  assert.equal(overflow, 0, "the page is wider than a phone");
  await page.screenshot({ path: new URL("demo-page-phone.png", BUILD).pathname, fullPage: true });

  await page.goto("about:blank");
  await publish("ada", "while-closed");
  await page.goto(`${line.url}/?user=ada`);
  await arrives("while-closed");
  assert.deepEqual(await shown(), ["while-closed"]);

  assert.deepEqual(complaints, []);
});

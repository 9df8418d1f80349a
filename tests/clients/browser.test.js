// The demo page in a real browser, on a node with the plugins of the demo: two users on two devices
// see each notification once and in words, through a manual cut, a network cut and a closed page;
// an alert overtakes waiting notifications, and a newer state replaces older ones.
import assert from "node:assert/strict";
import { mkdir } from "node:fs/promises";
import test from "node:test";
import { chromium } from "playwright-core";
import { address, eventually, publish, settle } from "./node-under-test.js";
import { proxy } from "./proxy.js";

const BUILD = new URL("../../build/", import.meta.url);

test("the demo page", { timeout: 300_000 }, async (t) => {
  await settle("ada", ["ops", "lobby"], { plan: "pro", locale: "en" });
  await settle("chen", ["shop", "lobby"], { plan: "pro", locale: "de" });
  const line = await proxy(address);
  t.after(() => line.close());
  // Without a sandbox: tests often run as root, where Chromium refuses to create one, and the page
  // is trusted.
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-dev-shm-usage"], timeout: 60_000 });
  t.after(() => browser.close());
  const page = await browser.newPage({ viewport: { width: 1280, height: 800 }, colorScheme: "light" });
  page.setDefaultTimeout(60_000);
  const [complaints, acknowledged] = [[], []];
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("response", (answer) => {
    if (answer.url().includes("/v1/acks") && answer.ok()) acknowledged.push(answer.request().postDataJSON().id);
  });
  page.on("request", (request) => {
    const { origin, pathname } = new URL(request.url());
    if (request.url().startsWith("data:") || (origin === line.url && /^\/($|demo\/|v1\/)/.test(pathname))) return;
    complaints.push(`the page requested ${request.url()}`);
  });

  const device = (name) => {
    const region = page.getByRole("region", { name: `Device ${name}` });
    const shown = () => region.locator(".note").evaluateAll((notes) => notes.map((note) => note.dataset.event).reverse());
    return {
      region,
      shown,
      state: (wanted) => eventually(`${name} is '${wanted}'`, async () => (await region.locator(".state").getAttribute("data-state")) === wanted),
      arrives: (id) => eventually(`${id} on ${name}`, async () => (await shown()).includes(id)),
      note: (id) => region.locator(`[data-event="${id}"]`),
      count: async (what) => Number(await region.locator(`[data-count="${what}"]`).textContent()),
      press: (what) => region.getByRole("button", { name: `${what} device ${name}` }).click(),
    };
  };
  const [a, b] = [device("A"), device("B")];
  const both = (act) => Promise.all([a, b].map(act));
  const scene = (title) => page.getByRole("button", { name: title }).click();
  const said = () => page.locator("#said").textContent();

  await t.test("a notification shows its router and its target", async () => {
    await page.goto(`${line.url}/?a=ada&b=chen`);
    await both((one) => one.state("live"));
    await page.getByText("Write your own").click();
    await page.getByRole("combobox", { name: "To", exact: true }).selectOption("group");
    await page.getByRole("textbox", { name: "Name", exact: true }).fill("lobby");
    await page.getByRole("textbox", { name: "Text", exact: true }).fill("hello from the page");
    await page.getByRole("button", { name: "Dry run" }).click();
    await page.getByText("Dry run: address → g:lobby, normal").waitFor();
    await page.getByRole("button", { name: "Publish" }).click();
    await both(({ region }) => region.getByText("hello from the page").waitFor());
    assert.equal(await b.region.locator(".route").textContent(), "address → g:lobby");

    // Texts are in each user's language, and the payload can name the recipient.
    await publish(null, "promotion", { type: "shop.promotion", data: { percent: 15, collection: "Tide" } });
    await both((one) => one.arrives("promotion"));
    assert.match(await a.note("promotion").textContent(), /15 % off for Pro.*rules → all/);
    assert.match(await b.note("promotion").textContent(), /15 % Rabatt für Pro.*rules → all/);
    await publish(null, "order", { type: "order.shipped", data: { order: 7, customer: "ada", parcels: 2, carrier: "Kite" } });
    await a.arrives("order");
    assert.match(await a.note("order").textContent(), /Order 7 is on its way.*rules → u:ada/);
    await publish(null, "mention", { type: "chat.mention", group: "lobby", data: { room: "lobby", from: "bo", mentioned: "ada", text: "your turn" } });
    await both((one) => one.arrives("mention"));
    assert.match(await a.note("mention").textContent(), /high.*rules → u:ada/);
    assert.match(await b.note("mention").textContent(), /normal.*address → g:lobby/);
    assert.equal((await b.shown()).includes("order"), false, "ada's notification must not reach chen");
  });

  await t.test("a resumed device receives what it missed, the alert first and only the newest score", async () => {
    const score = (update) => publish(null, `score-${update}`, {
      type: "match.score", data: { match: "m", home: "Harbour", away: "Hill", goals: [update, 0], minute: update, update },
    });
    await score(1);
    await both(({ region }) => region.getByText("Harbour 1 : 0 Hill").waitFor());
    await a.press("Cut");
    await a.state("cut");
    const before = (await a.shown()).length;
    for (const update of [2, 3, 4, 5]) await score(update);
    await scene("A batch, then an alert");
    await page.getByText("51 stored").waitFor();
    await b.region.getByText("Harbour 5 : 0 Hill").waitFor();
    assert.equal((await a.shown()).length, before, "a cut device must receive nothing");
    await a.press("Resume");
    await a.region.getByText("50 rows of a report").waitFor();
    await a.region.getByText("Harbour 5 : 0 Hill").waitFor();
    const missed = await a.region.locator(".note").evaluateAll((notes) => notes.map((note) => note.querySelector(".title").textContent).reverse());
    assert.deepEqual(missed.slice(before), ["Reports: the disk is full", "50 rows of a report"]);
    await a.region.getByText("overtook 50").waitFor();
    assert.equal(await a.count("late"), 52);
    assert.equal(await a.count("replaced"), 3);
    await a.region.getByText(/back after .* 52 arrived late · 3 replaced by newer/).waitFor();
    await eventually("the alert and the return are announced to screen readers", async () => (await said()).includes("52 arrived late"));
    assert.equal((await b.shown()).length, 3, "the batch was for ada only");
  });

  await t.test("a browser reconnects by itself after a network cut", async () => {
    line.cut();
    await both((one) => one.state("connecting"));
    await publish(null, "missed-by-network", { users: "ada,chen" });
    // Acknowledgements lost to a bad network are sent again.
    let n_lost = 0;
    await page.route("**/v1/acks?*", (route) => (n_lost++ < 4 ? route.abort() : route.fallback()));
    line.mend();
    await both((one) => one.arrives("missed-by-network"));
    await both((one) => one.state("live"));
    await eventually("acknowledgements were lost", () => n_lost > 4);
    await page.unroute("**/v1/acks?*");
  });

  await t.test("the page fits a desktop and a phone, light and dark", async () => {
    await mkdir(BUILD, { recursive: true });
    for (const [name, width, height] of [["", 1280, 800], ["-phone", 390, 844]]) {
      for (const colorScheme of ["light", "dark"]) {
        await page.setViewportSize({ width, height });
        await page.emulateMedia({ colorScheme });
        assert.equal(await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth), 0, `the page is wider than ${width} pixels`);
        await page.screenshot({ path: new URL(`demo-page${name}-${colorScheme}.png`, BUILD).pathname, fullPage: width < 1000 });
      }
    }
  });

  await t.test("the page compares with the log and reports lost notifications", async () => {
    assert.deepEqual(await both(async (one) => [await one.count("lost"), await one.count("twice")]), [[0, 0], [0, 0]]);
    // A notification that is in the log but was never sent.
    await page.route("**/v1/notifications?*user=ada*", async (route) => {
      const answer = await route.fetch();
      const log = await answer.json();
      log.notifications.push({ id: "x", data: { id: "never-sent", source: "/clients", type: "client.test" } });
      await route.fulfill({ response: answer, json: log });
    });
    await eventually("one is lost", async () => (await a.count("lost")) === 1);
    assert.equal(await b.count("lost"), 0);
    await page.unroute("**/v1/notifications?*user=ada*");
  });

  await t.test("a reopened page resumes where it was", async () => {
    const last = await a.note("missed-by-network").getAttribute("data-cursor");
    await eventually("the cursor of device A is acknowledged", () => acknowledged.includes(last));
    await page.goto("about:blank");
    await publish("ada", "while-closed");
    await page.goto(`${line.url}/?a=ada&b=chen`);
    await a.arrives("while-closed");
    assert.deepEqual(await a.shown(), ["while-closed"]);
    assert.equal(await a.count("late"), 1);
    await a.region.getByText("back · 1 arrived late").waitFor();
  });

  assert.deepEqual(complaints, []);
});

// Libraries that expect the payload of their application in `data:`, as installed from npm, in a real
// browser: each shows the event's data alone, and after a network cut what it missed, once.
import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import test from "node:test";
import { chromium } from "playwright-core";
import { address, eventually, publish } from "./node-under-test.js";
import { proxy } from "./proxy.js";

/** A file of a package. Datastar is written for bundlers, which complete the names of modules. */
async function library(path) {
  const file = new URL(`node_modules/${path}`, import.meta.url);
  const complete = (name) => [`${name}.js`, `${name}/index.js`].find((one) => existsSync(new URL(one, file))) ?? name;
  return (await readFile(file, "utf8")).replaceAll(/(from ')(\.[^']*)'/g, (_, from, name) => `${from}${complete(name)}'`);
}
const html = (data) => ({ type: "cart.changed", datacontenttype: "text/html", data });

/** Each page adds an element of the class `note` for each notification of its user. */
const PAGES = {
  htmx: {
    scripts: ["htmx.org/dist/htmx.js", "htmx-ext-sse/sse.js"],
    body: (user) => `<div hx-ext="sse" sse-connect="/v1/stream?user=${user}&format=data&event=type" sse-swap="cart.changed" hx-swap="beforeend"></div>`,
    event: (text) => html(`<p\r\n  class="note">\n${text}</p>`),
  },
  turbo: {
    scripts: ["@hotwired/turbo/dist/turbo.es2017-umd.js"],
    body: (user) => `<ul id="list"></ul><turbo-stream-source src="/v1/stream?user=${user}&format=data"></turbo-stream-source>`,
    event: (text) => html(`<turbo-stream action="append" target="list">\n<template><li class="note">${text}</li></template>\n</turbo-stream>`),
  },
  datastar: {
    modules: ["@starfederation/datastar/dist/bundles/datastar.js"],
    body: (user) => `<ul id="list"></ul><div data-on-load="@get('/v1/stream?user=${user}&format=data&event=type')"></div>`,
    event: (text) => ({
      type: "datastar-merge-fragments",
      datacontenttype: "text/plain",
      data: `selector #list\nmergeMode append\nfragments <li class="note">${text}</li>`,
    }),
  },
  json: {
    body: (user) => `<ul id="list"></ul><script>
      new EventSource("/v1/stream?user=${user}&format=data").onmessage = (e) => {
        const note = document.createElement("li");
        note.className = "note";
        note.textContent = JSON.parse(e.data).text;
        document.getElementById("list").append(note);
      };
    </script>`,
    event: (text) => ({ type: "chat", data: { text } }),
  },
};

test("pages that expect their own payload", { timeout: 300_000 }, async (t) => {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-dev-shm-usage"], timeout: 60_000 });
  t.after(() => browser.close());
  for (const [name, { scripts = [], modules = [], body, event }] of Object.entries(PAGES)) {
    await t.test(`${name} shows each payload once, through a network cut`, async (t) => {
      const line = await proxy(address);
      t.after(() => line.close());
      const page = await browser.newPage();
      t.after(() => page.close());
      page.setDefaultTimeout(60_000);
      const complaints = [];
      page.on("pageerror", (error) => complaints.push(String(error)));
      // The page and its libraries have the origin of the node, as behind a proxy of an application.
      await page.route("**/page/**", async (route) => {
        const path = decodeURIComponent(new URL(route.request().url()).pathname.slice("/page/".length));
        if (path) return route.fulfill({ contentType: "text/javascript", body: await library(path) });
        const tags = [...scripts.map((one) => `<script src="/page/${one}"></script>`), ...modules.map((one) => `<script type="module" src="/page/${one}"></script>`)];
        return route.fulfill({ contentType: "text/html", body: `<!doctype html><meta charset="utf-8">${tags.join("")}<body>${body(name)}` });
      });
      const opened = page.waitForResponse((answer) => answer.url().includes("/v1/stream"));
      await page.goto(`${line.url}/page/`);
      assert.equal((await opened).status(), 200);
      const shown = () => page.locator(".note").evaluateAll((notes) => notes.map((note) => note.textContent.trim()));
      const arrives = (text) => eventually(`'${text}' in ${name}`, async () => (await shown()).includes(text));
      await publish(name, `${name}-1`, event("one"));
      await arrives("one");
      line.cut();
      await publish(name, `${name}-2`, event("two"));
      line.mend();
      await arrives("two");
      await publish(name, `${name}-3`, event("three"));
      await arrives("three");
      assert.deepEqual(await shown(), ["one", "two", "three"]);
      assert.deepEqual(complaints, []);
    });
  }
});

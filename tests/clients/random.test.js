// The package `pointsman` in three tabs of Chromium through random cuts, restarts, closed tabs and
// expired tokens: nothing is lost or shown twice, and there is one connection. The seed repeats a
// run.
import assert from "node:assert/strict";
import test from "node:test";
import { launch, openTab } from "./browsers.js";
import { eventually } from "./eventually.js";
import { freePort, startNode, startSite } from "./installation.js";
import { proxy } from "./proxy.js";

const TABS = 3;
const LIFE = 3; // seconds of a token
const STEPS = (process.env.LONG ?? "0") === "0" ? 20 : 200;

/** Random numbers below `n`, by the generator mulberry32. */
function generator(seed) {
  let state = seed >>> 0;
  return (n) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) % n;
  };
}

test(`${STEPS} random interruptions of three tabs`, { timeout: 1_800_000 }, async (t) => {
  const seed = Number(BigInt(process.env.POINTSMAN_TEST_SEED ?? Date.now()) & 0xffffffffn);
  console.log(`POINTSMAN_TEST_SEED=${seed}`);
  const below = generator(seed);
  const site = await startSite(t, await freePort());
  const node = await startNode(t, { origins: [site.url], isProduction: true });
  const line = await proxy(node.address);
  t.after(() => line.close());
  const browser = await launch(t, "chromium");
  const [tabs, eras] = [[], new Map()];
  let [n, opened, era] = [0, 0, 0];
  const open = async () => {
    const name = `tab ${++opened}`;
    const tab = await openTab(browser, site.url, name, { url: `${line.url}/v1/stream`, user: "ada", life: LIFE, timeout: 3_000 });
    tabs.push(tab);
    eras.set(name, era);
  };
  const close = async () => {
    const [tab] = tabs.splice(below(tabs.length), 1);
    await tab.close();
  };
  const publish = async () => { for (let i = below(3); i >= 0; i--) await node.publish("ada", ++n); };

  const steps = {
    cut: async () => { line.cut(); await publish(); line.mend(); },
    "cut until the page is offline": async () => { line.cut(); await tabs[0].state("offline"); await publish(); line.mend(); },
    hang: async () => { line.hang(); await publish(); },
    offline: async () => { for (const { read } of tabs) await read("void dispatchEvent(new Event('offline'))"); },
    terminate: () => node.restart("SIGTERM"),
    kill: () => node.restart("SIGKILL"),
    "close a tab": async () => { await close(); await publish(); await open(); },
    "close two tabs": async () => { await close(); await close(); await open(); await publish(); await open(); },
    "close all tabs": async () => {
      while (tabs.length) await close();
      await publish();
      era++;
      while (tabs.length < TABS) await open();
    },
    "let a token expire": async () => {
      const renewals = async () => (await Promise.all(tabs.map(({ read }) => read("renewals")))).reduce((a, b) => a + b);
      const before = await renewals();
      await eventually("the token is renewed", async () => (await renewals()) > before);
    },
  };
  const settle = async (what) => {
    const state = async () => JSON.stringify(await Promise.all(tabs.map(async ({ name, read }) => [name, await read("[shown.at(-1), connection.state, states.slice(-8)]")])));
    await eventually(what, async () => {
      const last = await Promise.all(tabs.map(({ read }) => read("shown.at(-1)")));
      return last.every((id) => id === n) && (await node.openStreams()) === 1;
    }, 120_000).catch(async (error) => { throw new Error(`${error.message}: ${n} were published; ${await state()}`); });
  };

  while (tabs.length < TABS) await open();
  await Promise.all(tabs.map((tab) => tab.state("live")));
  const history = [];
  try {
    for (let i = 0; i < STEPS; i++) {
      const names = Object.keys(steps);
      const name = names[below(names.length)];
      history.push(name);
      if (below(2)) await publish();
      await steps[name]();
      // Otherwise the next interruption hits a client that has not recovered.
      if (below(3)) {
        await publish();
        await settle(`step ${i}, ${name}`);
      }
    }
    await publish();
    await settle("the end");

    const fresh = await browser.newPage();
    await fresh.goto(site.url);
    const shown = await fresh.evaluate(() => Object.entries(localStorage).filter(([key]) => key.startsWith("log ")).map(([key, log]) => [key.slice(4), JSON.parse(log)]));
    const eraOf = new Map();
    for (const [name, ids] of shown) {
      assert.deepEqual(ids, ids.map((_, i) => ids[0] + i), `${name}: each in order, once, without a hole`);
      for (const id of ids) {
        // A browser that is opened again does not show again what it has shown.
        assert.equal(eraOf.get(id) ?? eras.get(name), eras.get(name), `${id} on ${name}`);
        eraOf.set(id, eras.get(name));
      }
    }
    const missed = Array.from({ length: n }, (_, i) => i + 1).filter((id) => !eraOf.has(id));
    assert.deepEqual(missed, [], "every notification is shown");
    console.log(`${n} notifications, ${opened} tabs, ${era} restarts of the browser's tabs`);
  } catch (error) {
    error.message += `\nseed ${seed}, steps: ${history.join(", ")}`;
    throw error;
  }
});

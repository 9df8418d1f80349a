// The package `pointsman` in the tabs of Chromium and Firefox: one connection for all of them,
// through restarts behind a proxy, closed, frozen and hanging tabs, expired tokens, a lost network,
// sleep, and a browser that is started again.
import assert from "node:assert/strict";
import test, { after, describe } from "node:test";
import { launch, openTab } from "./browsers.js";
import { eventually } from "./eventually.js";
import { folder, freePort, startNode, startSite } from "./installation.js";
import { proxy } from "./proxy.js";

const upTo = (n, from = 1) => Array.from({ length: n - from + 1 }, (_, i) => from + i);

const browsers = {};
const ends = [];
after(async () => { for (const end of ends.reverse()) await end(); });

/** A node behind a proxy, a site of its own and a browser, which all tests share. */
async function setUp(t, name, options) {
  const site = await startSite(t, await freePort());
  const node = await startNode(t, { origins: [site.url], ...options });
  const line = await proxy(node.address);
  t.after(() => line.close());
  const url = `${line.url}/v1/stream`;
  const browser = await (browsers[name] ??= launch({ after: (end) => ends.push(end) }, name));
  // Pages of earlier tests would take memory and time.
  t.after(async () => Promise.all((await browser.pages()).slice(1).map((page) => page.close())));
  return { site, node, line, url, browser };
}

const hasOneStream = (node) => eventually("there is one stream", async () => (await node.openStreams()) === 1);
const leader = async (tabs) => {
  for (const tab of tabs) if (await tab.read("window.isLeading")) return tab;
  throw new Error("no tab leads");
};

describe("the tabs of a browser", { concurrency: 2 }, () => {
  for (const name of ["chromium", "firefox"]) describe(name, { concurrency: 1 }, () => {
    test(`three tabs of ${name} share one connection that survives restarts, cuts, sleep and closed tabs`, { timeout: 400_000 }, async (t) => {
      const { site, node, line, url, browser } = await setUp(t, name);
      const open = (tab) => openTab(browser, site.url, tab, { url: `${url}?user=ada`, user: "ada", timeout: 5_000 });
      let tabs = [await open("one"), await open("two"), await open("three")];
      await Promise.all(tabs.map((tab) => tab.state("live")));
      let n = 0;
      const publish = async (count = 1) => { for (let i = 0; i < count; i++) await node.publish("ada", ++n); };
      const all = () => Promise.all(tabs.map((tab) => tab.shows(n)));
      await publish(2);
      await all();
      await hasOneStream(node);

      const offline = () => Promise.all(tabs.map((tab) => tab.state("offline")));
      const stop = (signal) => process.kill(-browser.process().pid, signal);
      const interruptions = [
        async () => { await node.restart("SIGTERM"); },
        async () => { await node.stop("SIGKILL"); await offline(); await node.start(); },
        async () => { line.cut(); await offline(); await publish(2); },
        // The computer sleeps: the network forgets its connections without ending them.
        async () => { stop("SIGSTOP"); line.hang(); await publish(2); stop("SIGCONT"); },
        async () => { await Promise.all(tabs.map(({ read }) => read("void dispatchEvent(new Event('offline'))"))); },
        async () => {
          // WebDriver cannot take Firefox offline.
          if (name === "firefox") return;
          const sessions = await Promise.all(tabs.map(({ page }) => page.createCDPSession()));
          const setOffline = (offline) => Promise.all(sessions.map((session) => session.send("Network.emulateNetworkConditions", { offline, latency: 0, downloadThroughput: -1, uploadThroughput: -1 })));
          await setOffline(true);
          await offline();
          await publish(2);
          await setOffline(false);
        },
      ];
      for (const interrupt of interruptions) {
        await publish();
        await interrupt();
        await publish();
        line.mend();
        await publish();
        await all();
        await hasOneStream(node);
      }
      for (const tab of tabs) assert.deepEqual(await tab.shown(), upTo(n), tab.name);

      // The leading tab is closed, twice; a new tab begins where it was opened.
      for (const left of [2, 1]) {
        const leading = await leader(tabs);
        tabs = tabs.filter((tab) => tab !== leading);
        await publish();
        await leading.close();
        await publish(2);
        await all();
        await hasOneStream(node);
        assert.equal(tabs.length, left);
      }
      assert.deepEqual(await tabs[0].shown(), upTo(n));
      const late = await open("four");
      await late.state("live");
      tabs.push(late);
      await publish();
      await all();
      assert.deepEqual(await late.shown(), [n]);
    });

    test(`an expired token is renewed in ${name}, as a header and as a cookie`, { timeout: 400_000 }, async (t) => {
      const { site, node, url, browser } = await setUp(t, name, { isProduction: true });
      const tabs = [];
      for (const tab of ["one", "two"]) tabs.push(await openTab(browser, site.url, tab, { url, user: "ada", life: 3 }));
      await Promise.all(tabs.map((tab) => tab.state("live")));
      const cookie = await browser.newPage();
      await cookie.goto(site.url);
      await cookie.evaluate(async (url) => {
        const { connect } = await import("/pointsman/index.js");
        Object.assign(window, { shown: [], renewals: 0 });
        window.connection = connect(url, {
          user: "bo",
          token: async ({ isRenewal }) => {
            window.renewals += isRenewal;
            document.cookie = `token=${await (await fetch("/token?user=bo&life=3")).text()}`;
          },
          onNotification: ({ data }) => window.shown.push(data.n),
        });
      }, url);
      await eventually("the cookie opens a stream", () => cookie.evaluate(() => window.connection.state === "live"));
      for (let n = 1; n <= 6; n++) {
        await node.publish(null, n);
        await Promise.all(tabs.map((tab) => tab.shows(n)));
        await eventually(`${n} arrives by a cookie`, () => cookie.evaluate((n) => window.shown.includes(n), n));
        if (n % 2) continue;
        const renewals = async () => [(await Promise.all(tabs.map(({ read }) => read("renewals")))).reduce((a, b) => a + b), await cookie.evaluate("renewals")];
        const before = await renewals();
        await eventually("both are renewed", async () => (await renewals()).every((n, i) => n > before[i]));
      }
      for (const tab of tabs) assert.deepEqual(await tab.shown(), upTo(6));
      assert.deepEqual(await cookie.evaluate("shown"), upTo(6));
    });

    test(`${name}, started again, shows what it missed once, also without its storage`, { timeout: 400_000 }, async (t) => {
      const { site, node, url } = await setUp(t, name);
      const profile = await folder(t);
      const start = async () => {
        const browser = await launch(t, name, profile);
        const open = (tab, options = {}) => openTab(browser, site.url, tab, { url: `${url}?user=ada`, user: "ada", ...options });
        const tabs = [await open("stored"), await open("device", { device: "laptop", storage: null, shared: false })];
        await Promise.all(tabs.map((tab) => tab.state("live")));
        return { browser, tabs };
      };
      let n = 0;
      for (let round = 0; round < 2; round++) {
        const from = n + 1;
        if (round) await node.publish("ada", ++n);
        const { browser, tabs } = await start();
        await node.publish("ada", ++n);
        for (const tab of tabs) {
          await tab.shows(n);
          assert.deepEqual(await tab.shown(), upTo(n, from), tab.name);
        }
        // Closing a page acknowledges what it showed.
        for (const tab of tabs) await tab.page.goto("about:blank");
        await eventually("the device has acknowledged what it showed", async () => {
          const { recipient } = await node.ask(`/v1/explain?event_id=${n}&user=ada`);
          return recipient.devices[0].at === "acknowledged";
        });
        await browser.close();
      }
    });

    if (name === "chromium") onlyInChromium();
  });
});

/** Tests that need the DevTools protocol, or a process for each tab. */
function onlyInChromium() {
  test("a tab that hangs hands over, and misses nothing when it is back", { timeout: 400_000 }, async (t) => {
    const { site, node, url, browser } = await setUp(t, "chromium");
    const tabs = [];
    for (const tab of ["one", "two"]) tabs.push(await openTab(browser, site.url, tab, { url: `${url}?user=ada`, user: "ada", timeout: 2_000 }));
    await Promise.all(tabs.map((tab) => tab.state("live")));
    const [one, two] = tabs;
    await node.publish("ada", 1);
    await Promise.all(tabs.map((tab) => tab.shows(1)));
    // Nothing runs in a tab while it waits for this request, and its lock stays.
    const isBack = one.read('{ const request = new XMLHttpRequest(); request.open("GET", "/hang", false); request.send(); }');
    await eventually("the tab hangs", () => site.hanging.length > 0);
    for (const n of [2, 3]) await node.publish("ada", n);
    await two.shows(3);
    site.release();
    await isBack;
    await node.publish("ada", 4);
    await Promise.all(tabs.map((tab) => tab.shows(4)));
    for (const tab of tabs) assert.deepEqual(await tab.shown(), upTo(4), tab.name);
    await hasOneStream(node);
  });

  test("a frozen tab hands over, and shows what it missed when it thaws", { timeout: 400_000 }, async (t) => {
    const { site, node, url, browser } = await setUp(t, "chromium");
    const tabs = [];
    for (const tab of ["one", "two"]) tabs.push(await openTab(browser, site.url, tab, { url: `${url}?user=ada`, user: "ada" }));
    await Promise.all(tabs.map((tab) => tab.state("live")));
    await node.publish("ada", 1);
    await Promise.all(tabs.map((tab) => tab.shows(1)));
    const [one, two] = tabs;
    assert.ok(await one.read("isLeading"));
    const session = await one.page.createCDPSession();
    await session.send("Page.setWebLifecycleState", { state: "frozen" });
    for (const n of [2, 3]) await node.publish("ada", n);
    await two.shows(3);
    assert.ok(await two.read("isLeading"));
    await session.send("Page.setWebLifecycleState", { state: "active" });
    await node.publish("ada", 4);
    await Promise.all(tabs.map((tab) => tab.shows(4)));
    for (const tab of tabs) assert.deepEqual(await tab.shown(), upTo(4), tab.name);
    await hasOneStream(node);
  });

  test("a tab without storage takes over where the last one was", { timeout: 400_000 }, async (t) => {
    const { site, node, line, url, browser } = await setUp(t, "chromium");
    const tabs = [];
    for (const tab of ["one", "two"]) tabs.push(await openTab(browser, site.url, tab, { url: `${url}?user=ada`, user: "ada", storage: null }));
    await Promise.all(tabs.map((tab) => tab.state("live")));
    await node.publish("ada", 1);
    await Promise.all(tabs.map((tab) => tab.shows(1)));
    line.cut();
    await tabs[0].close();
    await node.publish("ada", 2);
    line.mend();
    await tabs[1].shows(2);
    assert.deepEqual(await tabs[1].shown(), [1, 2]);
  });

  test("a page without Web Locks has its own connection", { timeout: 400_000 }, async (t) => {
    const { site, node, url, browser } = await setUp(t, "chromium");
    const prepare = (page) => page.evaluateOnNewDocument(() => Object.defineProperty(Navigator.prototype, "locks", { value: undefined }));
    const tabs = [];
    for (const tab of ["one", "two"]) tabs.push(await openTab(browser, site.url, tab, { url: `${url}?user=ada`, user: "ada", prepare }));
    await Promise.all(tabs.map((tab) => tab.state("live")));
    await eventually("there are two streams", async () => (await node.openStreams()) === 2);
    await node.publish("ada", 1);
    for (const tab of tabs) {
      await tab.shows(1);
      assert.deepEqual(await tab.shown(), [1]);
    }
  });
}

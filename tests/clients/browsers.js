// Chromium and Firefox with pages that use the package, driven by the DevTools protocol and by
// WebDriver BiDi.
import puppeteer from "puppeteer-core";
import { eventually } from "./eventually.js";
import { folder } from "./installation.js";

const LAUNCH = {
  // Without a sandbox: tests often run as root, where Chromium refuses to create one.
  chromium: { browser: "chrome", executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-dev-shm-usage"] },
  firefox: { browser: "firefox", executablePath: process.env.FIREFOX ?? "/usr/bin/firefox-esr" },
};

/** Starts a browser; with `profile`, a folder, it remembers what it stored there. */
export async function launch(t, name, profile) {
  const browser = await puppeteer.launch({ ...LAUNCH[name], userDataDir: profile ?? (await folder(t)), timeout: 120_000, protocolTimeout: 120_000 });
  t.after(() => browser.close().catch(() => {}));
  return browser;
}

/**
 * A tab that follows a user with the package. All that it shows is in `localStorage` at once, so
 * that the other tabs know it when this one is closed. `life` is that of its tokens in seconds;
 * `prepare` is called with the page before it is loaded.
 */
export async function openTab(browser, site, name, { url, life, prepare, ...options }) {
  const page = await browser.newPage();
  await prepare?.(page);
  await page.goto(site);
  await page.evaluate(async (name, url, options, life) => {
    const { connect } = await import("/pointsman/index.js");
    Object.assign(window, { shown: [], gaps: [], states: [], renewals: 0 });
    const keep = (log, value) => {
      log.push(value);
      localStorage.setItem(`log ${name}`, JSON.stringify(window.shown));
    };
    const token = life && (async ({ isRenewal }) => {
      window.renewals += isRenewal;
      return (await fetch(`/token?user=${options.user}&life=${life}`)).text();
    });
    window.connection = connect(url, {
      ...options,
      token,
      onNotification: ({ data }, { isLeading }) => { window.isLeading = isLeading; keep(window.shown, data.n); },
      onGap: (gap) => window.gaps.push(gap),
      onState: (state, detail) => window.states.push(detail.reason ?? detail.status ?? state),
    });
  }, name, url, options, life);
  const read = (expression) => page.evaluate(expression);
  return {
    name,
    page,
    read,
    shown: () => read("shown"),
    state: (state) => eventually(`${name} is ${state}`, async () => (await read("connection.state")) === state),
    shows: (n) => eventually(`${name} shows ${n}`, async () => (await read("shown")).includes(n))
      .catch(async (error) => { throw new Error(`${error.message}; it shows ${await read("JSON.stringify([shown, states, connection.state])")}`); }),
    close: () => page.close(),
  };
}

// The demo page: two devices, and buttons that publish example events. device.js implements the
// devices. The plugins of the node decide who is notified of an event and how urgently: see
// pointsman.toml in this folder.

import { Device } from "./device.js";
import { element } from "./words.js";

const PEOPLE = ["ada", "bo", "chen", "dee"];
// Within the look-ahead of the node in a backlog, so that the alert overtakes the whole batch.
const PILE = 50;
const $ = (id) => document.getElementById(id);

const any = (...choices) => choices[Math.floor(Math.random() * choices.length)];
const order = () => 4_000 + Math.floor(Math.random() * 5_000);
const newId = () => `page-${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;

/** The events that one click publishes. `target` is only displayed; plugins decide. */
const SCENES = [
  {
    title: "Ship an order", target: () => `u:${first()}`, hint: "to the customer in the payload",
    events: () => [{ type: "order.shipped", source: "/shop", data: { order: order(), customer: first(), parcels: 2, carrier: "Kite" } }],
  },
  {
    title: "Write to the lobby", target: () => "g:lobby", hint: "to the members of a room",
    events: () => [{ type: "chat.message", source: "/chat", group: "lobby", data: { room: "lobby", from: "you", text: any("Lunch at one?", "Who has the keys?", "It works on my machine.") } }],
  },
  {
    title: "Fail a deployment", target: () => "g:ops", hint: "to a group; a filter raises the priority",
    events: () => [{ type: "deployment.failed", source: "/ci", data: { service: "checkout", version: "2.14.0", reason: "the health check timed out" } }],
  },
  {
    title: "Raise an alert", target: () => "all", hint: "urgent; overtakes waiting notifications",
    events: () => [{ type: "system.alert", source: "/monitor", data: { severity: "critical", system: "Payments", text: "the card provider is down" } }],
  },
  {
    title: "Start a promotion", target: () => "plan = pro", hint: "to Pro users, in English or German",
    events: () => [{ type: "shop.promotion", source: "/shop", data: { percent: any(10, 15, 20), collection: any("Tide", "Meadow") } }],
  },
  {
    title: "A batch, then an alert", target: () => `u:${first()}`, hint: `${PILE} low, then one urgent`,
    events: pile,
  },
];

const devices = ["A", "B"].map((name) => {
  const section = $("device").content.cloneNode(true).firstElementChild;
  $("devices").append(section);
  return new Device(name, section, PEOPLE, announce);
});

const first = () => devices[0].user ?? PEOPLE[0];

/** The event times increase and end now, so that the device can count overtaken notifications. */
function pile() {
  const [user, now] = [first(), Date.now()];
  const at = (n) => ({ source: "/reports", user, time: new Date(now - PILE + n).toISOString() });
  const rows = Array.from({ length: PILE }, (_, n) => ({ ...at(n), type: "report.row", priority: "low", data: { row: n + 1, rows: PILE } }));
  return [...rows, { ...at(PILE), type: "report.alert", priority: "urgent", data: { system: "Reports", text: "the disk is full" } }];
}

/** Publishes events, or only performs a dry run, and shows the result. */
async function publish(events, isDry = false) {
  const whole = events.map((event) => ({ specversion: "1.0", id: newId(), ...event }));
  try {
    const [trial] = (await post([whole.at(-1)], true)).events;
    if (trial.status === "refused") throw new Error(trial.error);
    const routes = trial.plan.map(({ by, to, priority }) => `${by} → ${to.join(", ")}, ${priority}`).join("; ");
    const plan = routes || [trial.outcome, trial.reason].filter(Boolean).join(": ");
    if (isDry) return say(`Dry run: ${plan}`);
    const refused = (await post(whole, false)).events.find(({ status }) => status === "refused");
    if (refused) throw new Error(refused.error);
    say(`${whole.length === 1 ? "Stored" : `${whole.length} stored, the last`}: ${plan}`);
  } catch (error) {
    say(error.message, true);
  }
}

async function post(events, isDry) {
  const headers = { "Content-Type": "application/cloudevents-batch+json" };
  const answer = await fetch(`/v1/events${isDry ? "?dry_run=true" : ""}`, { method: "POST", headers, body: JSON.stringify(events) });
  if (!answer.ok) throw new Error(`Refused with status ${answer.status}: ${(await answer.text()).slice(0, 300)}`);
  return answer.json();
}

function say(text, isBad = false) {
  $("answer").textContent = text;
  $("answer").classList.toggle("bad", isBad);
}

function announce(text) {
  $("said").textContent = text;
}

for (const { title, target, hint, events } of SCENES) {
  const code = element("code", target());
  const button = element("button", element("b", title), code, element("small", hint));
  button.onclick = async () => {
    code.textContent = target();
    button.disabled = true;
    await publish(events());
    button.disabled = false;
  };
  $("scenes").append(button);
}

$("own").elements.target.onchange = ({ target: { value } }) => {
  const { name } = $("own").elements;
  name.disabled = value === "everyone";
  name.value = { user: first(), group: "lobby", everyone: "" }[value];
};

$("own").onsubmit = (event) => {
  event.preventDefault();
  const form = new FormData(event.target);
  const [target, type, priority, text] = ["target", "type", "priority", "text"].map((name) => form.get(name));
  const to = target === "everyone" ? true : form.get("name");
  publish([{ type, source: "/demo/page", priority, [target]: to, data: { text } }], event.submitter?.name === "dry");
};

const asked = new URLSearchParams(location.search);
devices[0].listen(asked.get("a") || "ada");
devices[1].listen(asked.get("b") || "chen");

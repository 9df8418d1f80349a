// Turns notifications into text and their parts into elements. Everything received from the node is
// inserted as text, never as markup.

/**
 * Title and text by event type. `{name}` is a member of the payload; if one is missing, the raw
 * payload is shown instead.
 */
const SAYS = {
  "order.placed": ["Order {order} is placed", "{items} items, {total} €"],
  "order.shipped": ["Order {order} is on its way", "{parcels} parcels with {carrier}"],
  "order.delayed": ["Order {order} is late", "{days} days more: {reason}"],
  "deployment.started": ["{service} {version} is being deployed"],
  "deployment.finished": ["{service} {version} is live", "after {seconds} s"],
  "deployment.failed": ["{service} {version} failed", "{reason}"],
  "chat.message": ["{from} in the {room}", "{text}"],
  "chat.mention": ["{from} mentions {mentioned}", "{text}"],
  "stock.low": ["{article} runs low", "{left} left"],
  "system.alert": ["{system}: {text}"],
  "report.alert": ["{system}: {text}"],
  "report.row": ["1 row of a report"],
};

function fill(template, data) {
  let isWhole = true;
  const text = template.replace(/\{(\w+)\}/g, (_, name) => {
    isWhole &&= data[name] !== undefined;
    return data[name];
  });
  return isWhole ? text : null;
}

function written(data) {
  if (data === null || data === undefined) return "";
  if (typeof data !== "object") return String(data);
  const isFlat = !Array.isArray(data) && Object.values(data).every((value) => typeof value !== "object" || value === null);
  return isFlat ? Object.entries(data).map(([name, value]) => `${name}: ${value}`).join("\n") : JSON.stringify(data);
}

/** Returns `{ title, text }` of a notification. */
export function words({ type, data }) {
  const [title, text] = SAYS[type] ?? ["{title}", "{text}"];
  const members = data && typeof data === "object" ? data : {};
  const filled = { title: fill(title, members), text: text ? fill(text, members) : "" };
  if (filled.title !== null && filled.text !== null) return filled;
  return { title: type, text: Object.keys(members).join() === "text" ? members.text : written(data) };
}

/** Formats a time in the local time zone. */
export function clock(time) {
  return new Date(time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
}

/** Creates an element, as in `element("span.meta", "text", child)`. */
export function element(selector, ...content) {
  const [tag, ...classes] = selector.split(".");
  const made = document.createElement(tag);
  made.classList.add(...classes);
  made.append(...content);
  return made;
}

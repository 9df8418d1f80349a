// The node that tests/clients.rs started, and helpers to publish to it.

export { eventually } from "./eventually.js";

/** The address of the node, such as "127.0.0.1:8080". */
export const address = process.env.POINTSMAN_ADDRESS;
if (!address) throw new Error("POINTSMAN_ADDRESS is not set; run these tests with `cargo test clients`");

/**
 * Publishes one event to a user, or if that is null, to the recipients that the plugins choose.
 * Bypasses proxies.
 */
export async function publish(user, id, more = {}) {
  const event = { specversion: "1.0", id, source: "/clients", type: "client.test", data: { id }, ...(user && { user }), ...more };
  const answer = await fetch(`http://${address}/v1/events`, {
    method: "POST",
    headers: { "Content-Type": "application/cloudevents+json" },
    body: JSON.stringify(event),
  });
  if (!answer.ok) throw new Error(`POST /v1/events: ${answer.status} ${await answer.text()}`);
}

/** Makes a user a member of groups, with attributes. */
export async function settle(user, groups, attributes) {
  const put = async (path, body) => {
    const answer = await fetch(`http://${address}/v1/${path}`, { method: "PUT", body });
    if (!answer.ok) throw new Error(`PUT ${path}: ${answer.status} ${await answer.text()}`);
  };
  for (const group of groups) await put(`groups/${group}/members/${user}`);
  await put(`users/${user}/attributes`, JSON.stringify(attributes));
}

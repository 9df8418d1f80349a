// A TCP proxy that can be cut: what a lost network, a restarted node or a train in a tunnel looks like to a client.
import net from "node:net";

/** Forwards to `target` ("127.0.0.1:8080") until `cut()`, refuses until `mend()`. `close()` ends it. */
export async function proxy(target) {
  const [host, port] = target.split(":");
  const sockets = new Set();
  let isCut = false;
  const server = net.createServer((client) => {
    if (isCut) return client.destroy();
    const upstream = net.connect(Number(port), host);
    for (const [from, to] of [[client, upstream], [upstream, client]]) {
      sockets.add(from);
      from.pipe(to);
      from.on("error", () => {}); // "close" follows
      from.on("close", () => { sockets.delete(from); to.destroy(); });
    }
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const cut = () => {
    isCut = true;
    for (const socket of sockets) socket.destroy();
  };
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    cut,
    mend: () => { isCut = false; },
    close: () => { cut(); server.close(); },
  };
}

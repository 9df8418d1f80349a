// A TCP proxy that can be cut, to simulate a lost network or a restarted node.
import net from "node:net";

/**
 * Forwards to `target` ("127.0.0.1:8080"). `cut()` closes and refuses connections until `mend()`;
 * `hang()` forwards nothing more on the present connections and leaves them open, as a network does
 * that forgets them while a computer sleeps; `close()` stops the proxy.
 */
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
  const hang = () => {
    for (const socket of sockets) socket.unpipe().resume();
  };
  const cut = () => {
    isCut = true;
    for (const socket of sockets) socket.destroy();
  };
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    cut,
    hang,
    mend: () => { isCut = false; },
    close: () => { cut(); server.close(); },
  };
}

/** Resolves when `ask()` is true, and rejects with `what` if that takes longer than `ms`. */
export async function eventually(what, ask, ms = 60_000) {
  const deadline = Date.now() + ms;
  while (!(await ask())) {
    if (Date.now() > deadline) throw new Error(`timed out after ${ms} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

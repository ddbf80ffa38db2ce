/** How long to wait before the next attempt, and waiting that can be given up. */

const FIRST_MS = 400;
const LONGEST_MS = 15_000;

/** Doubles from 0.4 s to 15 s; a quarter of it is chance, so that many viewers don't return at the same instant. */
export function backoffMs(attempt: number, random: () => number = Math.random): number {
  const full = Math.min(LONGEST_MS, FIRST_MS * 2 ** Math.min(attempt, 16));
  return Math.round(full * (0.75 + 0.25 * random()));
}

/** Resolves after `ms`, or at once when `signal` aborts or the network comes back. */
export function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) return resolve();
    const timer = setTimeout(done, ms);
    function done() {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      removeEventListener("online", done);
      resolve();
    }
    signal.addEventListener("abort", done);
    addEventListener("online", done);
  });
}

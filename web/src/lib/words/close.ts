/** Why a live view ended, in words, and what to do next. The 4xxx codes are `CloseCode` of `vestibule-api`. */

export type Next =
  /** Open it again with a new ticket. */
  | "retry"
  /** Nothing will come of trying again by itself; the person may. */
  | "stop"
  /** The session is over: nothing to see any more. */
  | "over";

export interface Closed {
  next: Next;
  words: string;
}

const CODES: Record<number, Closed> = {
  1000: { next: "retry", words: "The view was closed." },
  1001: { next: "retry", words: "Vestibule is restarting." },
  4001: { next: "retry", words: "The permission to look had run out." },
  4002: { next: "over", words: "This sign-in has ended." },
  4003: { next: "retry", words: "The screen is not ready yet." },
  // Its screen, its terminal or all of it: if it is all of it, the session's events say so at once.
  4004: { next: "retry", words: "The private computer does not answer any more." },
  4005: { next: "retry", words: "The screen does not answer yet." },
  4006: { next: "stop", words: "As many people are watching as one sign-in allows." },
  4007: { next: "stop", words: "The view got mixed up and was closed." },
  4008: { next: "retry", words: "Your connection was too slow to keep up." },
  4010: { next: "stop", words: "The owner of this sign-in ended the view." },
  4009: { next: "retry", words: "Vestibule is restarting." },
};

/** What a close means. A reason that the server sent in words wins over ours only where we know nothing better. */
export function closed(code: number, reason: string): Closed {
  const known = CODES[code];
  if (known) return known;
  const words = reason.trim();
  return { next: "retry", words: words === "" ? "The connection was interrupted." : words };
}

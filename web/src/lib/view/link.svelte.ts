/**
 * Keeps one WebSocket of a session open: a new one-use ticket for every attempt, a growing pause between attempts, and the
 * reason of every interruption in words. What flows through the socket is the business of whoever attaches to it.
 */
import { api, sessionPath } from "../api/client";
import { problemFrom } from "../api/error";
import type { Right } from "../api/types";
import { backoffMs, pause } from "../backoff";
import { closed, type Closed } from "../words/close";

/** A socket that was open for so long was a good one. */
const STEADY_MS = 3000;

export type LinkPhase = "waiting" | "connecting" | "connected" | "reconnecting" | "ended";

/**
 * Attaches to a fresh socket at once (an RFB server speaks first, and what nobody listens to is lost); returns what lets
 * go of it. `up` says that the far end answers.
 */
export type Attach = (socket: WebSocket, right: Right, up: () => void) => () => void;

export class Link {
  phase: LinkPhase = $state("waiting");
  /** Why it is not connected, in words; empty while it is. */
  reason = $state("");
  /** Whether it was connected before. */
  known = $state(false);

  readonly #session: string;
  readonly #what: "view" | "terminal";
  readonly #prepare: () => Promise<Attach>;
  #running: AbortController | null = null;

  /** `prepare` loads what will attach, before there is a socket. */
  constructor(session: string, what: "view" | "terminal", prepare: () => Promise<Attach>) {
    this.#session = session;
    this.#what = what;
    this.#prepare = prepare;
  }

  /** Opens the socket, or opens it anew with another right. */
  start(right: Right): void {
    this.#running?.abort();
    this.#running = new AbortController();
    this.phase = "connecting";
    this.reason = "";
    void this.#run(right, this.#running.signal);
  }

  stop(): void {
    this.#running?.abort();
    this.#running = null;
    if (this.phase !== "ended") this.phase = "waiting";
  }

  async #run(right: Right, signal: AbortSignal): Promise<void> {
    for (let attempt = 0; !signal.aborted; attempt++) {
      let upAt = Infinity;
      const end = await this.#once(right, signal, () => {
        upAt = performance.now();
        this.phase = "connected";
        this.known = true;
        this.reason = "";
      });
      if (signal.aborted) return;
      this.reason = end.words;
      if (end.next !== "retry") {
        this.phase = "ended";
        return;
      }
      this.phase = "reconnecting";
      // What opens only to close again at once is not asked any faster for it.
      if (performance.now() - upAt > STEADY_MS) attempt = 0;
      await pause(backoffMs(attempt), signal);
    }
  }

  /** One ticket, one socket, to its end. */
  async #once(right: Right, signal: AbortSignal, up: () => void): Promise<Closed> {
    let attach: Attach;
    let ticket: string;
    try {
      attach = await this.#prepare();
      ({ ticket } = await api.ticket(this.#session, right));
    } catch (error) {
      const problem = problemFrom(error);
      const final = problem.status === 410 || problem.status === 404;
      if (problem.code === "conflict") return closed(4003, "");
      return { next: final ? "over" : "retry", words: problem.title };
    }
    if (signal.aborted) return { next: "stop", words: "" };
    const path = `${sessionPath(this.#session)}/${this.#what}?ticket=${encodeURIComponent(ticket)}`;
    const socket = new WebSocket(path);
    socket.binaryType = "arraybuffer";
    const detach = attach(socket, right, up);
    return new Promise((resolve) => {
      socket.addEventListener("close", (event) => {
        detach();
        resolve(closed(event.code, event.reason));
      });
      signal.addEventListener("abort", () => {
        detach();
        socket.close();
        resolve({ next: "stop", words: "" });
      });
    });
  }
}

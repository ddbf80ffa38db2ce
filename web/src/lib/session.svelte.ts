/** One sign-in as its page sees it: the row, the events, and the timeline that they make. */
import { api, sessionPath } from "./api/client";
import { problemFrom, type Problem } from "./api/error";
import { TERMINAL_STATES, type SessionEvent, type SessionView } from "./api/types";
import { follow } from "./sse";
import { timeline } from "./timeline";

/** So many events no sign-in has. Beyond, a page that asks for one refused host after the other is no longer listened to. */
const MOST_EVENTS = 2000;
const NOISE = new Set(["egress-refused", "url-refused"]);
/** Events that change what the row says beyond them: credential, verdict, image, viewers. */
const NEWS = new Set(["state", "viewer-joined", "viewer-left"]);

export class Session {
  readonly id: string;
  view: SessionView | null = $state.raw(null);
  problem: Problem | null = $state.raw(null);
  /** Whether events come in live. */
  live = $state(false);
  #events: SessionEvent[] = $state.raw([]);
  readonly timeline = $derived(timeline(this.#events));
  /**
   * The events know first; but the row is there before them, and an end is an end: while the events of a finished
   * session are replayed, the page does not live through it again.
   */
  readonly state = $derived.by(() => {
    const row = this.view?.state ?? "requested";
    return this.#events.length === 0 || TERMINAL_STATES.has(row) ? row : this.timeline.state;
  });
  readonly over = $derived(TERMINAL_STATES.has(this.state));

  constructor(id: string) {
    this.id = id;
  }

  /** Follows the session until it is over. For `$effect`: returns what ends it. */
  watch(): () => void {
    const abort = new AbortController();
    void this.#refresh().then((found) => {
      if (found && !abort.signal.aborted) void this.#follow(abort.signal);
    });
    return () => abort.abort();
  }

  async confirm(): Promise<void> {
    this.view = await api.confirm(this.id, this.view?.account ?? null);
  }

  async endViews(): Promise<void> {
    await api.revokeTickets(this.id);
  }

  async cancel(): Promise<void> {
    this.view = await api.cancel(this.id);
  }

  /** Reads the row; whether it makes sense to follow its events. */
  async #refresh(): Promise<boolean> {
    try {
      this.view = await api.session(this.id);
      this.problem = null;
      return true;
    } catch (error) {
      this.problem = problemFrom(error);
      return ![401, 404, 410].includes(this.problem.status);
    }
  }

  #follow(signal: AbortSignal): Promise<void> {
    return follow(
      `${sessionPath(this.id)}/events`,
      {
        onOpen: () => {
          this.live = true;
          this.problem = null;
        },
        onMessage: ({ data }) => this.#take(JSON.parse(data) as SessionEvent),
        onBreak: (problem) => {
          this.live = false;
          this.problem = problem;
          if (problem?.status === 410 || problem?.status === 404) return false;
          return problem?.code !== "unauthenticated" && !this.over;
        },
      },
      signal,
    );
  }

  #take(event: SessionEvent): void {
    if (this.#events.length >= MOST_EVENTS && NOISE.has(event.event.type)) return;
    this.#events = [...this.#events, event];
    if (NEWS.has(event.event.type)) void this.#refresh();
  }
}

/** A value that a page loads, loads again, and may fail to load. */
import { problemFrom, type Problem } from "./api/error";

export class Loaded<T> {
  value: T | null = $state.raw(null);
  problem: Problem | null = $state.raw(null);

  readonly #load: () => Promise<T>;

  constructor(load: () => Promise<T>) {
    this.#load = load;
  }

  /** Loads; a failure keeps the last value and says so. */
  async refresh(): Promise<void> {
    try {
      this.value = await this.#load();
      this.problem = null;
    } catch (error) {
      this.problem = problemFrom(error);
    }
  }

  /** Loads now and every `everyMs` while the page is looked at. For `$effect`: returns what ends it. */
  keep(everyMs: number): () => void {
    let running = true;
    let timer: ReturnType<typeof setTimeout> | undefined;
    const turn = async () => {
      if (document.visibilityState === "visible") await this.refresh();
      if (running) timer = setTimeout(turn, everyMs);
    };
    void turn();
    return () => {
      running = false;
      clearTimeout(timer);
    };
  }
}

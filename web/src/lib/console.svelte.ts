/** The serial console of a VM, followed as it is written. */
import { machinePath, send } from "./api/client";
import { problemFrom, type Problem } from "./api/error";
import { backoffMs, pause } from "./backoff";

/** Kept on the page; the whole console is in the evidence. */
const KEEP = 256 * 1024;
// CSI, OSC and other escape sequences (ECMA-48), and control characters that a <pre> can't show.
const ESCAPES =
  /\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]/g;

/** Console text as plain lines: without colours and cursor movements, carriage returns folded. */
export function plainText(text: string): string {
  return text.replace(ESCAPES, "").replace(/\r+\n/g, "\n").replace(/\r/g, "\n");
}

export class Console {
  text = $state("");
  problem: Problem | null = $state.raw(null);
  live = $state(false);
  #raw = "";

  /** Shows the last part and follows until the VM ends or the returned function is called. */
  follow(machine: string): () => void {
    const abort = new AbortController();
    void this.#run(machine, abort.signal);
    return () => abort.abort();
  }

  async #run(machine: string, signal: AbortSignal): Promise<void> {
    for (let attempt = 0; !signal.aborted; attempt++) {
      try {
        const path = `${machinePath(machine)}/console?tail=${KEEP}&follow=1`;
        const response = await send(path, { signal });
        this.#raw = "";
        this.problem = null;
        this.live = true;
        await this.#read(response, signal);
        this.live = false;
        return; // its end is the VM's end
      } catch (error) {
        this.live = false;
        if (signal.aborted) return;
        this.problem = problemFrom(error);
        if (this.problem.code !== "offline") return;
      }
      await pause(backoffMs(attempt), signal);
    }
  }

  async #read(response: Response, signal: AbortSignal): Promise<void> {
    const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
    if (!reader) return;
    while (!signal.aborted) {
      const { value, done } = await reader.read();
      if (!done) this.#raw = (this.#raw + value).slice(-KEEP);
      // A booting guest writes thousands of small pieces: show about ten states a second, and always the last one.
      if (done) return this.#show();
      this.#timer ??= setTimeout(() => this.#show(), 100);
    }
  }

  #timer: ReturnType<typeof setTimeout> | undefined;
  #show(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.text = plainText(this.#raw);
  }
}

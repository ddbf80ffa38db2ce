/**
 * Server-sent events over `fetch`, not `EventSource`: this way a refusal has a status and a body, and the page can say
 * why a stream did not open. Parsing follows the HTML standard, section 9.2.6.
 */
import { send } from "./api/client";
import { problemFrom, type Problem } from "./api/error";
import { backoffMs, pause } from "./backoff";

export interface Message {
  id: string;
  data: string;
}

/** A line longer than this is not ours; it would only fill memory. */
const LONGEST_LINE = 1 << 20;

export class SseParser {
  #rest = "";
  #data: string[] = [];
  #id = "";

  /** Takes in a piece of the stream and returns the messages that it completes. */
  push(chunk: string): Message[] {
    const messages: Message[] = [];
    const text = this.#rest + chunk;
    // A lone CR at the very end may be half of a CRLF: keep it for the next piece.
    const cut = text.endsWith("\r") ? text.length - 1 : text.length;
    const lines = text.slice(0, cut).split(/\r\n|\r|\n/);
    this.#rest = (lines.pop() ?? "") + text.slice(cut);
    if (this.#rest.length > LONGEST_LINE) throw new Error("a line of the event stream is too long");
    for (const line of lines) {
      if (line !== "") this.#field(line);
      else if (this.#data.length > 0) {
        messages.push({ id: this.#id, data: this.#data.join("\n") });
        this.#data = [];
      }
    }
    return messages;
  }

  #field(line: string) {
    const colon = line.indexOf(":");
    if (colon === 0) return; // a comment: the server's heartbeat
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") this.#data.push(value);
    else if (name === "id" && !value.includes("\0")) this.#id = value;
  }
}

export interface Follower {
  onMessage: (message: Message) => void;
  /** The stream is open; what was missed comes first. */
  onOpen: () => void;
  /** The stream broke or was refused, and is tried again unless this answers `false`. */
  onBreak: (problem: Problem | null) => boolean;
}

/** Follows the stream at `path` until `signal` aborts or `onBreak` says so, resuming after the last id seen. */
export async function follow(path: string, follower: Follower, signal: AbortSignal): Promise<void> {
  let lastId = "";
  let attempt = 0;
  while (!signal.aborted) {
    let problem: Problem | null = null;
    try {
      const headers: Record<string, string> = { Accept: "text/event-stream" };
      if (lastId !== "") headers["Last-Event-ID"] = lastId;
      const response = await send(path, { headers, signal });
      follower.onOpen();
      for await (const message of messages(response, signal)) {
        attempt = 0;
        if (message.id !== "") lastId = message.id;
        follower.onMessage(message);
      }
    } catch (error) {
      if (signal.aborted) return;
      problem = problemFrom(error);
    }
    if (signal.aborted || !follower.onBreak(problem)) return;
    await pause(backoffMs(attempt++), signal);
  }
}

async function* messages(response: Response, signal: AbortSignal): AsyncGenerator<Message> {
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  if (!reader) return;
  const parser = new SseParser();
  try {
    while (!signal.aborted) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

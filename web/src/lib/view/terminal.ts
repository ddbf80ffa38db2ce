/** The login's terminal: xterm.js on a socket of ours. Binary frames are bytes, text frames say the size. Loaded lazily. */
import { FitAddon } from "@xterm/addon-fit";
import { Terminal as Xterm } from "@xterm/xterm";
import "@xterm/xterm/css/xterm.css";
import type { Right } from "../api/types";
import { withoutStyleElements } from "./csp";
import { leaves } from "./keys";

const THEME = {
  background: "#10151c",
  foreground: "#e4e9f0",
  cursor: "#9db8e8",
  selectionBackground: "#33507d",
  scrollbarSliderBackground: "#ffffff33",
  scrollbarSliderHoverBackground: "#ffffff55",
  scrollbarSliderActiveBackground: "#ffffff77",
};

export class Terminal {
  readonly #xterm: Xterm;
  readonly #fit = new FitAddon();
  readonly #resize: ResizeObserver;
  #socket: WebSocket | null = null;

  constructor(host: HTMLElement, leave: () => void) {
    this.#xterm = new Xterm({
      fontFamily: 'ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace',
      fontSize: 14,
      scrollback: 5000,
      screenReaderMode: true,
      cursorBlink: false,
      theme: THEME,
    });
    this.#xterm.loadAddon(this.#fit);
    withoutStyleElements(() => this.#xterm.open(host));
    // Tab must not fall into a trap: the terminal is entered by a click or by its button.
    this.#xterm.textarea?.setAttribute("tabindex", "-1");
    this.#xterm.attachCustomKeyEventHandler((event) => {
      if (!leaves(event)) return true;
      event.preventDefault();
      if (event.type === "keydown") leave();
      return false;
    });
    this.#xterm.onData((data) => this.#send(new TextEncoder().encode(data)));
    this.#xterm.onBinary((data) => this.#send(Uint8Array.from(data, (c) => c.charCodeAt(0))));
    this.#xterm.onResize(() => this.#tellSize());
    this.#resize = new ResizeObserver(() => this.#fit.fit());
    this.#resize.observe(host);
  }

  /** Shows this socket's terminal; returns what lets go of it. */
  attach(socket: WebSocket, right: Right, up: () => void): () => void {
    this.#xterm.options.disableStdin = right === "view";
    socket.addEventListener("open", () => {
      // The far end replays the screen: begin with an empty one.
      this.#xterm.reset();
      this.#socket = socket;
      if (right === "control") this.#tellSize();
      up();
    });
    socket.addEventListener("message", (event: MessageEvent<ArrayBuffer | string>) => {
      const { data } = event;
      this.#xterm.write(typeof data === "string" ? data : new Uint8Array(data));
    });
    return () => {
      if (this.#socket === socket) this.#socket = null;
    };
  }

  focus(): void {
    this.#xterm.focus();
  }

  /** Types `text` as if pasted, bracketed where the tool asked for that. */
  paste(text: string): void {
    this.#xterm.paste(text);
  }

  selection(): string {
    return this.#xterm.getSelection();
  }

  close(): void {
    this.#resize.disconnect();
    this.#xterm.dispose();
  }

  #send(bytes: Uint8Array<ArrayBuffer>): void {
    if (this.#xterm.options.disableStdin) return;
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(bytes);
  }

  #tellSize(): void {
    if (this.#xterm.options.disableStdin || this.#socket?.readyState !== WebSocket.OPEN) return;
    const { cols, rows } = this.#xterm;
    this.#socket.send(JSON.stringify({ type: "resize", cols, rows }));
  }
}

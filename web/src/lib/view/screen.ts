/**
 * The remote screen: noVNC on a socket of ours, so that close codes are seen (noVNC reports none). Loaded lazily, it is the
 * largest part of the page.
 */
import RFB from "@novnc/novnc";
import type { Right } from "../api/types";
import { KEYS, keysymOf, typed, type Key } from "./keys";

/** Narrower than this no desktop browser can be used: a phone gets a screen of this width, scaled down. */
const NARROWEST = 560;

/** What noVNC keeps to itself and `WideRfb` needs; the version in package.json is fixed to one minor for it. */
interface Internals {
  _screenSize(): { w: number; h: number };
  _requestRemoteResize(): void;
}
const Base = RFB as unknown as new (...args: ConstructorParameters<typeof RFB>) => RFB & Internals;

/** Asks for a remote screen that is never narrower than a browser window can be, in the proportions of the place it has. */
class WideRfb extends Base {
  #asking = false;

  override _screenSize(): { w: number; h: number } {
    const size = super._screenSize();
    const factor = this.#asking && size.w > 0 ? Math.max(1, NARROWEST / size.w) : 1;
    return { w: Math.floor(size.w * factor), h: Math.floor(size.h * factor) };
  }

  override _requestRemoteResize(): void {
    this.#asking = true;
    try {
      super._requestRemoteResize();
    } finally {
      this.#asking = false;
    }
  }
}

export interface ScreenEvents {
  up: () => void;
  /** The remote side copied something. */
  copied: (text: string) => void;
}

export class Screen {
  readonly #rfb: RFB;
  #typed = "";
  #open = true;

  constructor(host: HTMLElement, socket: WebSocket, right: Right, events: ScreenEvents) {
    const rfb = new WideRfb(host, socket, { shared: true });
    rfb.scaleViewport = true;
    rfb.viewOnly = right === "view";
    rfb.resizeSession = right === "control";
    rfb.focusOnClick = true;
    rfb.background = "transparent";
    rfb.addEventListener("connect", events.up);
    rfb.addEventListener("disconnect", () => (this.#open = false));
    rfb.addEventListener("clipboard", (event) => events.copied(event.detail.text));
    const canvas = host.querySelector("canvas");
    canvas?.setAttribute("role", "application");
    canvas?.setAttribute(
      "aria-label",
      "Screen of the private computer. Control Shift Period leaves it.",
    );
    this.#rfb = rfb;
  }

  close(): void {
    if (this.#open) this.#rfb.disconnect();
  }

  focus(): void {
    this.#rfb.focus({ preventScroll: true });
  }

  blur(): void {
    this.#rfb.blur();
  }

  /** Makes `text` the remote clipboard. */
  offer(text: string): void {
    this.#rfb.clipboardPasteFrom(text);
  }

  press(key: Key, down?: boolean): void {
    this.#rfb.sendKey(key.keysym, key.code, down);
  }

  /** Ctrl and this letter on the remote side; Ctrl stays down there where it is `held` down here. */
  control(letter: string, held = false): void {
    // On a Mac noVNC sends Command as Alt.
    this.press(KEYS.Alt, false);
    this.press(KEYS.Control, true);
    this.#rfb.sendKey(keysymOf(letter), `Key${letter.toUpperCase()}`);
    if (!held) this.press(KEYS.Control, false);
  }

  /** What the soft keyboard's field holds now: types the difference to what it held before. */
  follow(value: string): void {
    const { backspaces, text } = typed(this.#typed, value);
    for (let i = 0; i < backspaces; i++) this.press(KEYS.Backspace);
    for (const character of text) this.#rfb.sendKey(keysymOf(character), null);
    this.#typed = value;
  }

  /** The soft keyboard's field was emptied without anything being deleted. */
  forget(): void {
    this.#typed = "";
  }
}

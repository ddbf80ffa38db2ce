/** Keysyms (X11's keysymdef.h) for what the dashboard itself types, and the one shortcut that leaves a captured keyboard. */

export interface Key {
  keysym: number;
  code: string;
}

export const KEYS = {
  Tab: { keysym: 0xff09, code: "Tab" },
  Escape: { keysym: 0xff1b, code: "Escape" },
  Enter: { keysym: 0xff0d, code: "Enter" },
  Backspace: { keysym: 0xff08, code: "Backspace" },
  Control: { keysym: 0xffe3, code: "ControlLeft" },
  Alt: { keysym: 0xffe9, code: "AltLeft" },
  Left: { keysym: 0xff51, code: "ArrowLeft" },
  Up: { keysym: 0xff52, code: "ArrowUp" },
  Right: { keysym: 0xff53, code: "ArrowRight" },
  Down: { keysym: 0xff54, code: "ArrowDown" },
} as const satisfies Record<string, Key>;

/** The keysym of one character: Latin-1 stands for itself, the rest of Unicode is 0x01000000 + code point. */
export function keysymOf(character: string): number {
  const point = character.codePointAt(0) ?? 0;
  if (point === 0x0a || point === 0x0d) return KEYS.Enter.keysym;
  if (point === 0x09) return KEYS.Tab.keysym;
  const latin1 = (point >= 0x20 && point <= 0x7e) || (point >= 0xa0 && point <= 0xff);
  return latin1 ? point : 0x01000000 + point;
}

/** What turns `before` into `after` when typed at the end: so many times Backspace, then these characters. */
export function typed(before: string, after: string): { backspaces: number; text: string[] } {
  const a = [...before];
  const b = [...after];
  let same = 0;
  while (same < a.length && same < b.length && a[same] === b[same]) same += 1;
  return { backspaces: a.length - same, text: b.slice(same) };
}

/** How the shortcut is written on the page. */
export const LEAVE_KEYS = ["Ctrl", "Shift", "."] as const;

/**
 * Whether this key press leaves the remote screen. A screen or terminal takes every key, Tab included, so there must be
 * a way out that is not the mouse (WCAG 2.1.2). Read by position, since Shift+. is another character on most layouts.
 */
export function leaves(event: KeyboardEvent): boolean {
  return event.code === "Period" && event.ctrlKey && event.shiftKey && !event.altKey;
}

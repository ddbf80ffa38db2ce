import { expect, it } from "vitest";
import { KEYS, keysymOf, leaves, typed } from "./keys";

it("gives every character its keysym", () => {
  expect(keysymOf("a")).toBe(0x61);
  expect(keysymOf("@")).toBe(0x40);
  expect(keysymOf("ß")).toBe(0xdf);
  expect(keysymOf("ł")).toBe(0x01000142);
  expect(keysymOf("日")).toBe(0x010065e5);
  expect(keysymOf("🙂")).toBe(0x0101f642);
  expect(keysymOf("\n")).toBe(KEYS.Enter.keysym);
});

it("types only the difference", () => {
  expect(typed("", "ab")).toEqual({ backspaces: 0, text: ["a", "b"] });
  expect(typed("passwor", "password")).toEqual({ backspaces: 0, text: ["d"] });
  expect(typed("abc", "a")).toEqual({ backspaces: 2, text: [] });
  expect(typed("teh ", "the ")).toEqual({ backspaces: 3, text: ["h", "e", " "] });
  expect(typed("🙂", "🙁")).toEqual({ backspaces: 1, text: ["🙁"] });
  expect(typed("x", "x")).toEqual({ backspaces: 0, text: [] });
});

it("leaves by position, whatever the layout makes of it", () => {
  const key = (more: object) =>
    ({
      code: "Period",
      ctrlKey: true,
      shiftKey: true,
      altKey: false,
      key: ":",
      ...more,
    }) as KeyboardEvent;
  expect(leaves(key({}))).toBe(true);
  expect(leaves(key({ altKey: true }))).toBe(false); // AltGr on Windows is Ctrl+Alt
  expect(leaves(key({ shiftKey: false }))).toBe(false);
  expect(leaves(key({ code: "Comma" }))).toBe(false);
});

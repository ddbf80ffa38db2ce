import { expect, it } from "vitest";
import { plainText } from "./console.svelte";

it("shows console text without colours, cursor movements and stray controls", () => {
  expect(plainText("\x1b[0;32m  OK  \x1b[0m] Started\r\r\n")).toBe("  OK  ] Started\n");
  expect(plainText("\x1b]0;title\x07a\x1b]8;;x\x1b\\b")).toBe("ab");
  // SeaBIOS begins like this.
  expect(plainText("\x1bc\x1b[?7l\x1b[2J\x1b[1;1H\x1b(BSeaBIOS\x1b7")).toBe("SeaBIOS");
  expect(plainText("10%\r20%\r30%\n\ttab")).toBe("10%\n20%\n30%\n\ttab");
  expect(plainText("a\x00\x07b")).toBe("ab");
});

it("keeps text that only looks like an escape", () => {
  expect(plainText("[ 0.000000] Linux é 日本")).toBe("[ 0.000000] Linux é 日本");
});

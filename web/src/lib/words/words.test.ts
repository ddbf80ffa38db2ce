import { describe, expect, it } from "vitest";
import { backoffMs } from "../backoff";
import { headline, sourceName } from "./causes";
import { closed } from "./close";

describe("closed", () => {
  it.each([
    [4001, "retry"],
    [4002, "over"],
    [4004, "retry"],
    [4006, "stop"],
    [4009, "retry"],
    [4010, "stop"],
    [1006, "retry"],
  ])("knows what follows %i", (code, next) => {
    expect(closed(code, "").next).toBe(next);
    expect(closed(code, "").words).not.toBe("");
  });

  it("shows the reason of a code that it does not know", () => {
    expect(closed(4711, "the moon is full").words).toBe("the moon is full");
  });
});

describe("headline", () => {
  it("prefers the cause, then the stage, then something true", () => {
    expect(headline({ cause: "consent-denied", stage: "provider" })).toBe("Access was declined");
    expect(headline({ cause: "kernel-panic", stage: "no-boot" })).toContain("did not start");
    const newer = { cause: "new", stage: "new" } as unknown as Parameters<typeof headline>[0];
    expect(headline(newer)).toContain("did not work out");
  });
});

it("names the source of a quote", () => {
  expect(sourceName("serial")).toBe("Console");
  expect(sourceName("disk:/etc/fstab")).toBe("File /etc/fstab");
  expect(sourceName("odd:x:y")).toBe("odd x:y");
});

it("backs off within bounds", () => {
  expect(backoffMs(0, () => 1)).toBe(400);
  expect(backoffMs(3, () => 0)).toBe(2400);
  expect(backoffMs(1000, () => 1)).toBe(15_000);
});

import { describe, expect, it } from "vitest";
import { backoffMs } from "../backoff";
import { headline, sourceName } from "./causes";
import { closed } from "./close";
import { hostWords } from "./hosts";

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

describe("hostWords", () => {
  const now = Date.parse("2026-11-27T12:00:00Z");
  const host = {
    hostId: "0199f3c2-7a10-7000-8000-000000000001",
    name: "b",
    state: "live" as const,
    own: false,
    address: "https://b.test:8443",
    leaseUntil: "2026-11-27T12:00:10Z",
    generation: 1,
    machines: 1,
  };

  it("asks for nothing where nothing is to be done", () => {
    expect(hostWords(host, now)).toEqual({ tone: "good", state: "Live", about: "1 VM", fix: null });
    expect(hostWords({ ...host, own: true, machines: 0 }, now).about).toContain("no VMs");
  });

  it("says since when a host is lost, what is left on it, and what to do", () => {
    const lost = {
      ...host,
      state: "lost" as const,
      leaseUntil: "2026-11-27T11:56:00Z",
      machines: 3,
    };
    const { tone, about, fix } = hostWords(lost, now);
    expect(tone).toBe("bad");
    expect(about).toBe("it was last heard of 4 min ago, 3 VMs may be left on it");
    expect(fix).toContain("vestibule host forget b");
    const never = hostWords({ ...lost, leaseUntil: null, machines: 0 }, now);
    expect(never.about).toBe("it was not heard of yet");
  });

  it("says what a host without an address can't do", () => {
    expect(hostWords({ ...host, address: null }, now).fix).toContain("cluster.address");
    expect(hostWords({ ...host, address: null, own: true }, now).fix).toBeNull();
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

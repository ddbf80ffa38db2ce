import { describe, expect, it } from "vitest";
import type { Finding, SessionEvent, SessionEventKind } from "./api/types";
import { currentStep, emptyTimeline, timeline } from "./timeline";

const T0 = Date.parse("2026-11-23T09:00:00Z");
const at = (s: number) => new Date(T0 + s * 1000).toISOString();

/** Events one second apart, numbered from 1. */
const events = (...kinds: SessionEventKind[]): SessionEvent[] =>
  kinds.map((event, i) => ({ seq: i + 1, at: at(i), event }));
const state = (state: Extract<SessionEventKind, { type: "state" }>["state"]) =>
  ({ type: "state", state }) as const;
const statuses = (list: SessionEvent[]) => timeline(list).steps.map((s) => s.status);

const finding: Finding = {
  cause: "consent-denied",
  stage: "provider",
  evidence: [{ source: "terminal", line: 3, text: "access_denied" }],
  why: "w",
  fix: "f",
  retryable: true,
  refutes: "",
};

describe("timeline", () => {
  it("begins with nothing done", () => {
    expect(timeline([])).toEqual(emptyTimeline());
  });

  it("walks through every step with its times", () => {
    const t = timeline(
      events(
        state("requested"),
        state("placing"),
        state("starting"),
        { type: "phase", phase: "vmm-started" },
        { type: "phase", phase: "painted" },
        state("ready"),
        state("awaiting-user"),
        { type: "url-opened", host: "auth.example", path: "/authorize" },
        { type: "captured", account: "ada@example.org" },
        state("capturing"),
        state("completed"),
      ),
    );
    expect(t.steps.map((s) => s.status)).toEqual(Array(5).fill("done"));
    expect(t.steps.map((s) => s.startedAt)).toEqual([0, 2, 5, 6, 10].map(at));
    expect(t.steps.map((s) => s.endedAt)).toEqual([2, 5, 6, 10, 10].map(at));
    expect(t.steps[1]!.items).toHaveLength(2);
    expect(t.steps[3]!.items.map((i) => i.key)).toEqual([
      "url auth.example",
      "captured",
      "capturing",
    ]);
    expect(t).toMatchObject({ state: "completed", account: "ada@example.org", endedAt: at(10) });
  });

  it("marks the step where it failed, and those that were never reached", () => {
    const list = events(
      state("requested"),
      state("starting"),
      state("ready"),
      state("awaiting-user"),
      { type: "failure", finding },
      state("failed"),
    );
    expect(statuses(list)).toEqual(["done", "done", "done", "failed", "skipped"]);
    const t = timeline(list);
    expect(currentStep(t).id).toBe("authenticating");
    expect(t.finding).toEqual(finding);
  });

  it("shows a cancelled start as stopped where it stood", () => {
    expect(statuses(events(state("requested"), state("starting"), state("cancelled")))).toEqual([
      "done",
      "failed",
      "skipped",
      "skipped",
      "skipped",
    ]);
  });

  it("fails in the first step when it never got further", () => {
    expect(statuses(events(state("failed")))[0]).toBe("failed");
  });

  it("passes over steps that a warm start leaves out", () => {
    const t = timeline(events(state("requested"), state("awaiting-user")));
    expect(t.steps.map((s) => s.status)).toEqual(["done", "done", "done", "active", "pending"]);
    expect(t.steps[1]).toMatchObject({ startedAt: null, endedAt: null });
  });

  it("begins anew when a saved state could not be used", () => {
    const quote = { source: "vmm", text: "CPU: the snapshot has a, here it is b" };
    const refused = { ...finding, cause: "snapshot-refused", why: "it does not fit" } as Finding;
    const list = events(
      state("requested"),
      state("placing"),
      { type: "claimed", start: "restore", snapshotId: "5", why: "pool-empty" },
      state("starting"),
      {
        type: "fell-back",
        from: "restore",
        to: "cold",
        finding: { ...refused, evidence: [quote] },
      },
      state("placing"),
    );
    expect(statuses(list)).toEqual(["active", "pending", "pending", "pending", "pending"]);
    expect(timeline(list).steps[1]!.items[0]).toMatchObject({
      tone: "warn",
      detail: "it does not fit: CPU: the snapshot has a, here it is b",
    });
    expect(timeline(list).steps[0]!.items[0]).toMatchObject({
      text: "A private computer is made from a saved state",
      detail: "None was ready at the moment",
    });
    list.push({ seq: 7, at: at(7), event: state("starting") });
    expect(statuses(list)).toEqual(["done", "active", "pending", "pending", "pending"]);
    expect(timeline(list).finding).toBeNull();
  });

  it("is the same when events come twice or out of order", () => {
    const list = events(
      state("requested"),
      state("starting"),
      { type: "egress-refused", host: "h", port: 443, reason: "policy", count: 2 },
      state("ready"),
    );
    const shuffled = [list[3]!, list[1]!, list[0]!, list[2]!, list[1]!, list[2]!];
    expect(timeline(shuffled)).toEqual(timeline(list));
  });

  it("adds up repeated refusals of one host and keeps different reasons apart", () => {
    const refused = (reason: "policy" | "tls", count: number) =>
      ({ type: "egress-refused", host: "h", port: 8443, reason, count }) as const;
    const t = timeline(
      events(state("awaiting-user"), refused("policy", 2), refused("policy", 3), refused("tls", 1)),
    );
    const items = t.steps[3]!.items;
    expect(items.map((i) => i.count)).toEqual([5, 1]);
    expect(items[0]!.text).toBe("h:8443 was not reached");
  });

  it("forgets what was waited for as soon as something moves", () => {
    const waiting: SessionEventKind = { type: "waiting", waitingFor: ["vncserver@1.service"] };
    const list = events(state("starting"), waiting);
    expect(timeline(list).waitingFor).toEqual(["vncserver@1.service"]);
    list.push({ seq: 3, at: at(3), event: { type: "phase", phase: "painted" } });
    expect(timeline(list).waitingFor).toEqual([]);
  });

  it("keeps the latest user code and number of viewers", () => {
    const t = timeline(
      events(
        state("awaiting-user"),
        { type: "user-code", code: "AAAA-1111" },
        { type: "user-code", code: "BBBB-2222" },
        { type: "viewers", count: 2 },
      ),
    );
    expect(t).toMatchObject({ userCode: "BBBB-2222", viewers: 2 });
  });

  it("does not stumble over an event that it does not know", () => {
    const unknown = { type: "from-the-future" } as unknown as SessionEventKind;
    expect(timeline(events(state("requested"), unknown)).lastSeq).toBe(2);
  });
});

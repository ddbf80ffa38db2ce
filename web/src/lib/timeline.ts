/**
 * The timeline of one sign-in, folded from its events. Pure: the same events give the same timeline, however they
 * arrived (replayed, resumed, twice).
 */
import type { Finding, SessionEvent, SessionEventKind, SessionState } from "./api/types";
import { headline } from "./words/causes";
import { EGRESS, FALLBACKS, NOT_POOLED, PHASES, STARTS } from "./words/states";

export type StepId = "preparing" | "starting" | "ready" | "authenticating" | "completed";
export type StepStatus = "pending" | "active" | "done" | "failed" | "skipped";
export type Tone = "plain" | "good" | "warn" | "bad";

/** One thing that happened within a step. */
export interface Item {
  /** Same key, same thing: a repetition updates it. */
  key: string;
  at: string;
  text: string;
  detail: string;
  tone: Tone;
  /** How often it happened. */
  count: number;
}

export interface Step {
  id: StepId;
  title: string;
  status: StepStatus;
  startedAt: string | null;
  endedAt: string | null;
  items: Item[];
}

export interface Timeline {
  steps: Step[];
  state: SessionState;
  /** What the current step waits for, in words; empty when nothing is known to be in the way. */
  waitingFor: string[];
  userCode: string | null;
  account: string | null;
  viewers: number;
  finding: Finding | null;
  endedAt: string | null;
  lastSeq: number;
}

const TITLES: [StepId, string][] = [
  ["preparing", "Preparing"],
  ["starting", "Starting"],
  ["ready", "Ready"],
  ["authenticating", "Authenticating…"],
  ["completed", "Completed"],
];

/** The step that a state belongs to; ends that are not *completed* belong to wherever they happened. */
const STEP_OF: Record<SessionState, number | null> = {
  requested: 0,
  placing: 0,
  starting: 1,
  ready: 2,
  "awaiting-user": 3,
  confirming: 3,
  capturing: 3,
  completed: 4,
  failed: null,
  cancelled: null,
  expired: null,
};

export function emptyTimeline(): Timeline {
  return {
    steps: TITLES.map(([id, title]) => ({
      id,
      title,
      status: "pending",
      startedAt: null,
      endedAt: null,
      items: [],
    })),
    state: "requested",
    waitingFor: [],
    userCode: null,
    account: null,
    viewers: 0,
    finding: null,
    endedAt: null,
    lastSeq: 0,
  };
}

/** The timeline of these events, in the order of their `seq`. */
export function timeline(events: readonly SessionEvent[]): Timeline {
  const t = emptyTimeline();
  for (const { seq, at, event } of [...events].sort((a, b) => a.seq - b.seq)) {
    if (seq <= t.lastSeq) continue;
    t.lastSeq = seq;
    apply(t, at, event);
  }
  return t;
}

/** The step that is under way, or where the sign-in stopped. */
export function currentStep(t: Timeline): Step {
  const first = t.steps.find((s) => s.status === "active" || s.status === "failed");
  return first ?? t.steps.findLast((s) => s.status === "done") ?? t.steps[0]!;
}

function apply(t: Timeline, at: string, event: SessionEventKind): void {
  switch (event.type) {
    case "state":
      return enter(t, at, event.state);
    case "phase":
      t.waitingFor = [];
      return note(t, at, `phase ${event.phase}`, PHASES[event.phase] ?? event.phase);
    case "waiting":
      t.waitingFor = event.waitingFor;
      return;
    case "claimed":
      return note(
        t,
        at,
        "claimed",
        STARTS[event.start] ?? event.start,
        event.why ? { detail: NOT_POOLED[event.why] ?? event.why } : {},
      );
    case "fell-back":
      return note(t, at, `fell-back ${event.from}`, FALLBACKS[event.to] ?? "Another VM is used", {
        detail: [event.finding.why, event.finding.evidence[0]?.text].filter(Boolean).join(": "),
        tone: "warn",
      });
    case "browser-navigated":
      return note(t, at, "navigated", "The browser was sent to the page");
    case "first-frame":
      return note(t, at, "first-frame", "Its screen is shown");
    case "url-opened":
      return note(t, at, `url ${event.host}`, `Page opened at ${event.host}`);
    case "url-refused":
      return note(t, at, `refused ${event.host}`, `A page at ${event.host} was not opened`, {
        detail: event.why,
        tone: "warn",
      });
    case "user-code":
      t.userCode = event.code;
      return note(t, at, "user-code", "The provider shows a code to compare");
    case "credential-partial":
      return note(t, at, `partial ${event.rule}`, "The tool is writing its credential", {
        detail: event.why,
      });
    case "egress-refused":
      return note(t, at, `egress ${event.host}:${event.port} ${event.reason}`, noWay(event), {
        detail: EGRESS[event.reason] ?? event.reason,
        tone: "warn",
        count: event.count,
      });
    case "viewers":
      t.viewers = event.count;
      return;
    case "viewer-joined":
      return note(t, at, `viewer ${event.who} ${event.pane}`, watches(event));
    case "viewer-left":
      return;
    case "browser-restarted":
      return note(t, at, "browser", "The browser was closed and opened again");
    case "captured":
      t.account = event.account ?? null;
      return note(t, at, "captured", "Credential received", {
        detail: event.account ?? "",
        tone: "good",
      });
    case "failure":
      t.finding = event.finding;
      return note(t, at, "failure", headline(event.finding), { tone: "bad" });
    default:
      // A newer server says something that this page does not know: nothing is lost by not showing it.
      return;
  }
}

function watches(event: { who: string; pane: "screen" | "terminal"; right: "control" | "view" }) {
  const what = event.pane === "screen" ? "screen" : "terminal";
  return `${event.who} ${event.right === "control" ? "uses" : "watches"} the ${what}`;
}

function noWay(event: { host: string; port: number }): string {
  const port = event.port === 443 || event.port === 80 ? "" : `:${event.port}`;
  return `${event.host}${port} was not reached`;
}

function enter(t: Timeline, at: string, state: SessionState): void {
  t.state = state;
  t.waitingFor = [];
  const index = STEP_OF[state];
  if (index === null) return stop(t, at);
  t.steps.forEach((step, i) => {
    if (i < index && step.status !== "done") {
      step.status = "done";
      step.endedAt = step.startedAt === null ? null : at;
    }
    // A start that failed is begun again.
    if (i > index && step.status === "active") step.status = "pending";
  });
  const step = t.steps[index]!;
  step.startedAt ??= at;
  step.status = state === "completed" ? "done" : "active";
  if (state === "completed") t.endedAt = step.endedAt = at;
  if (state === "confirming") note(t, at, "confirming", "Waiting for you to confirm the account");
  if (state === "capturing") note(t, at, "capturing", "Sealing the credential");
}

/** The sign-in ended without a credential: where it stood is where it stopped. */
function stop(t: Timeline, at: string): void {
  const step = currentStep(t);
  step.status = "failed";
  step.startedAt ??= at;
  step.endedAt = at;
  t.endedAt = at;
  for (const later of t.steps) if (later.status === "pending") later.status = "skipped";
}

function note(
  t: Timeline,
  at: string,
  key: string,
  text: string,
  more: { detail?: string; tone?: Tone; count?: number } = {},
): void {
  const { detail = "", tone = "plain", count = 1 } = more;
  const { items } = currentStep(t);
  const known = items.find((item) => item.key === key);
  if (known) {
    known.at = at;
    known.detail = detail;
    known.count += count;
  } else {
    items.push({ key, at, text, detail, tone, count });
  }
}

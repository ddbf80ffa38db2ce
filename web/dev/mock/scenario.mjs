/** What happens in a sign-in of the mock: events at their times, per provider. */
import { FINDING } from "./data.mjs";

const state = (s) => ({ type: "state", state: s });
const phase = (p) => ({ type: "phase", phase: p });

const START = [
  [0, state("requested")],
  [0.2, state("placing")],
  [0.8, state("starting")],
  [1.0, phase("vmm-started")],
  [1.4, phase("kernel-output")],
  [2.2, { type: "waiting", waitingFor: ["vncserver@1.service", "vestibule-browser.service"] }],
  [3.0, phase("stream-up")],
  [3.4, phase("agent-up")],
  [4.0, phase("painted")],
  [4.2, phase("ready")],
  [4.3, state("ready")],
  [4.8, state("awaiting-user")],
];

const opened = (host) => ({ type: "url-opened", host, path: "/authorize" });
const refused = (count) => ({
  type: "egress-refused",
  host: "telemetry.internal.example",
  port: 443,
  reason: "private",
  count,
});

/** Seconds after the start → event. A script without an end waits for the person. */
const SCRIPTS = {
  codex: [
    ...START.slice(0, 8),
    ...["clients2.google.com", "update.googleapis.com", "redirector.gvt1.com"].map((host) => [
      3.6,
      { type: "egress-refused", host, port: 443, reason: "name-not-found", count: 1 },
    ]),
    ...START.slice(8),
    [5.6, opened("auth.openai.com")],
    [8, refused(1)],
    [11, refused(4)],
  ],
  gh: [...START, [5.4, { type: "user-code", code: "8F43-6FCF" }], [5.8, opened("github.com")]],
  claude: [
    ...START,
    [5.4, opened("claude.ai")],
    [7, { type: "credential-partial", rule: "credentials", why: "no refresh token yet" }],
    [8, { type: "captured", account: "ada@example.org" }],
    [8.2, state("capturing")],
    [9, state("completed")],
  ],
  confirm: [
    ...START,
    [5.4, opened("claude.ai")],
    [8, { type: "captured", account: "ada@example.org" }],
    [8.2, state("confirming")],
  ],
  gemini: [
    ...START,
    [5.4, opened("accounts.google.com")],
    [7, { type: "failure", finding: FINDING }],
    [7.1, state("failed")],
  ],
  wrangler: [...START.slice(0, 6)],
};

/** The events of sessions that were over before the mock started. */
const ENDINGS = {
  completed: [
    [48, { type: "captured", account: "ada@example.org" }],
    [48.2, state("capturing")],
    [49, state("completed")],
  ],
  failed: [
    [30, { type: "failure", finding: FINDING }],
    [30.1, state("failed")],
  ],
  cancelled: [[21, state("cancelled")]],
  expired: [[600, state("expired")]],
};

export const script = (provider) => SCRIPTS[provider] ?? SCRIPTS.codex;

export function past(session) {
  const t0 = Date.parse(session.createdAt);
  const list = [...START, [6, opened("auth.example.org")], ...(ENDINGS[session.state] ?? [])];
  return list.map(([s, event], i) => ({
    seq: i + 1,
    at: new Date(t0 + s * 1000).toISOString(),
    event,
  }));
}

/** States, phases and refusals in words for the person who signs in. */
import type {
  EgressReason,
  MachineState,
  NotPooled,
  Phase,
  SessionState,
  StartKind,
} from "../api/types";

export const SESSION_STATES: Record<SessionState, string> = {
  requested: "Preparing",
  placing: "Preparing",
  starting: "Starting",
  ready: "Ready",
  "awaiting-user": "Waiting for you",
  confirming: "Is this your account?",
  capturing: "Finishing",
  completed: "Completed",
  failed: "Failed",
  cancelled: "Cancelled",
  expired: "Ran out of time",
};

export const MACHINE_STATES: Record<MachineState, string> = {
  creating: "Being made",
  booting: "Starting",
  up: "Running",
  paused: "Paused",
  stopping: "Ending",
  gone: "Gone",
  lost: "Lost",
};

export const PHASES: Record<Phase, string> = {
  "vmm-started": "Private computer switched on",
  restored: "Private computer made ready from its saved state",
  resumed: "It runs",
  "kernel-output": "It is starting up",
  "stream-up": "Secure line established",
  identity: "It has its own identity and the right time",
  "agent-up": "Its software answers and is the right one",
  painted: "Browser is open on its screen",
  ready: "Everything is in place",
};

/** How the private computer begins. */
export const STARTS: Record<StartKind, string> = {
  pool: "A private computer was ready",
  restore: "A private computer is made from a saved state",
  cold: "A private computer is switched on",
};

/** Why none was ready. */
export const NOT_POOLED: Record<NotPooled, string> = {
  asked: "As was asked for",
  "fell-back": "Instead of the one before",
  "no-snapshot": "There is no saved state of this size",
  "snapshot-refused": "The saved state was refused not long ago",
  "snapshot-failed": "The saved state could not be used not long ago",
  "no-pool": "None are kept ready",
  "pool-empty": "None was ready at the moment",
};

/** What follows when that failed, by how the next one begins at most. */
export const FALLBACKS: Record<StartKind, string> = {
  pool: "It could not be used; another one is taken",
  restore: "It could not be used; another one is made",
  cold: "The saved state could not be used; another one is switched on instead",
};

/** Reads after "… was not opened:". */
export const EGRESS: Record<EgressReason, string> = {
  loopback: "it is an address of this server itself",
  private: "it is inside a private network",
  "link-local": "it is a local network address",
  "not-global": "it is not a public address",
  policy: "this sign-in may not go there",
  "bad-request": "the request was malformed",
  "name-not-found": "no such name exists",
  unreachable: "it did not answer",
  tls: "its certificate could not be trusted",
  "too-many": "too many connections were open",
};

/** Parts of the private computer by the names of their units, for what a start waits for. */
const PARTS: Record<string, string> = {
  "vm-browser-agent.service": "its own software",
  "vncserver@1.service": "the screen",
  "vestibule-wm.service": "the desktop",
  "vestibule-browser.service": "the browser",
  "vestibule-terminal.service": "the terminal",
};

/** What is waited for, in words where there are some. */
export const partName = (name: string) => PARTS[name] ?? name;

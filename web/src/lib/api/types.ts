/**
 * The wire types that the dashboard reads, as `crates/vestibule-api` declares them. `npm run api` generates the same from
 * `openapi/vestibule.json` into `schema.d.ts`; this file gives them the names that the dashboard uses.
 */

export type SessionState =
  | "requested"
  | "placing"
  | "starting"
  | "ready"
  | "awaiting-user"
  | "capturing"
  | "completed"
  | "failed"
  | "cancelled"
  | "expired";

export const TERMINAL_STATES: ReadonlySet<SessionState> = new Set([
  "completed",
  "failed",
  "cancelled",
  "expired",
]);

export type Phase =
  "vmm-started" | "kernel-output" | "stream-up" | "agent-up" | "painted" | "ready";

export type EgressReason =
  | "loopback"
  | "private"
  | "link-local"
  | "not-global"
  | "policy"
  | "bad-request"
  | "name-not-found"
  | "unreachable"
  | "tls"
  | "too-many";

export interface Quote {
  source: string;
  line?: number | null;
  text: string;
}

export interface Finding {
  cause: string;
  stage: string;
  unit?: string | null;
  evidence: Quote[];
  why: string;
  fix: string;
  retryable: boolean;
  refutes: string;
}

export interface Weakness {
  note: string;
  evidence: Quote[];
  why: string;
}

export interface Verdict {
  verdict: "healthy" | "cause" | "unknown";
  finding?: Finding | null;
  also: Finding[];
  notes: Weakness[];
  lookedAt: string[];
  collectNext: string[];
  elapsedMs: number;
}

export interface StartRequest {
  provider: string;
  flow?: string;
}

export interface StartReply {
  sessionId: string;
  provider: string;
  state: SessionState;
}

export type MachineState = "creating" | "booting" | "up" | "paused" | "stopping" | "gone" | "lost";

export interface SessionView {
  sessionId: string;
  provider: string;
  flow: string;
  userId: string;
  state: SessionState;
  createdAt: string;
  updatedAt: string;
  deadlineAt?: string | null;
  machineId?: string | null;
  machineState?: MachineState | null;
  imageDigest?: string | null;
  madeFromOlderImage: boolean;
  credentialId?: string | null;
  account?: string | null;
  userCode?: string | null;
  failure?: Verdict | null;
  viewable: boolean;
}

export type SessionEventKind =
  | { type: "state"; state: SessionState }
  | { type: "phase"; phase: Phase }
  | { type: "waiting"; waitingFor: string[] }
  | { type: "url-opened"; host: string; path: string }
  | { type: "url-refused"; host: string; why: string }
  | { type: "user-code"; code: string }
  | { type: "credential-partial"; rule: string; why: string }
  | { type: "egress-refused"; host: string; port: number; reason: EgressReason; count: number }
  | { type: "viewers"; count: number }
  | { type: "browser-restarted" }
  | { type: "captured"; account?: string | null }
  | { type: "failure"; finding: Finding };

export interface SessionEvent {
  seq: number;
  at: string;
  event: SessionEventKind;
}

export type Right = "control" | "view";

export interface TicketReply {
  ticket: string;
  expiresAt: string;
  right: Right;
}

export interface FlowView {
  id: string;
  title: string;
}

export interface ProviderView {
  id: string;
  name: string;
  vendor: string;
  homepage: string;
  termsNote: string;
  termsUrl: string;
  flows: FlowView[];
  unavailable?: string | null;
}

export interface CredentialView {
  credentialId: string;
  provider: string;
  userId: string;
  account?: string | null;
  sessionId: string;
  createdAt: string;
  expiresAt?: string | null;
  files: { path: string; bytes: number }[];
}

export interface Health {
  status: "starting" | "ready" | "degraded";
  version: string;
  build: string;
  api: number;
  capabilities: string[];
  uptimeMs: number;
  waitingFor: string[];
}

export interface VmView {
  machineId: string;
  sessionId?: string | null;
  state: MachineState;
  generation: number;
  imageDigest: string;
  madeFromOlderImage: boolean;
  driver?: string | null;
  memoryMib: number;
  vcpus: number;
  createdAt: string;
  readyAt?: string | null;
  goneAt?: string | null;
  runnerPid?: number | null;
  vmmPid?: number | null;
  health?: Health | null;
  viewers: number;
  egress: { connections: number; refused: number; bytesOut: number; bytesIn: number };
  failure?: Finding | null;
  hasEvidence: boolean;
}

export interface UnitReport {
  name: string;
  load: string;
  active: string;
  sub: string;
  result: string;
  mainExit?: number | null;
  restarts: number;
}

export interface Report {
  at?: string | null;
  kernel: string;
  hostname: string;
  uptimeMs: number;
  systemState: string;
  units: UnitReport[];
  jobs: { id: number; unit: string; kind: string; state: string; waitsFor: string[] }[];
  listeners: { family: string; address: string; process?: string | null }[];
  display?: {
    width: number;
    height: number;
    painted: boolean;
    browserWindow: boolean;
  } | null;
  memory: { totalKib: number; availableKib: number; pressureAvg10?: number | null };
  missing: string[];
}

export interface EvidenceFile {
  name: string;
  bytes: number;
}

export interface ImageView {
  digest: string;
  recipe: string;
  builtAt: string;
  diskBytes: number;
  aliases: string[];
  verified: boolean;
  features: string[];
  kernelRelease: string;
  defaultMemoryMib: number;
  defaultVcpus: number;
}

export interface ReadyCheck {
  name: string;
  ok: boolean;
  observed: string;
  fix?: string | null;
}

export interface Readiness {
  ready: boolean;
  version: string;
  checks: ReadyCheck[];
}

export interface ReconcilerView {
  name: string;
  runs: number;
  failures: number;
  lastRunAt?: string | null;
  lastDurationMs?: number | null;
  lastCount: number;
  lastError?: string | null;
}

export type ErrorCode =
  | "invalid_request"
  | "unauthenticated"
  | "forbidden"
  | "not_found"
  | "unknown_provider"
  | "method_not_allowed"
  | "session_gone"
  | "conflict"
  | "too_many_sessions"
  | "too_large"
  | "image_missing"
  | "machine_unavailable"
  | "unavailable"
  | "internal";

export interface ErrorDetail {
  code: ErrorCode;
  message: string;
  fix: string;
  finding?: Finding | null;
  retryAfterS?: number | null;
  requestId: string;
}

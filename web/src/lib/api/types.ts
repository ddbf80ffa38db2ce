/**
 * The wire types by the names that the dashboard uses. They are `crates/vestibule-api`'s: `npm run api` makes `schema.d.ts`
 * from `openapi/vestibule.json`, and `npm run check` fails where the dashboard no longer fits it.
 */
import type { components } from "./schema";

type Schemas = components["schemas"];

export type Cause = Schemas["Cause"];
export type CredentialView = Schemas["CredentialView"];
export type EgressReason = Schemas["EgressReason"];
export type ErrorCode = Schemas["ErrorCode"];
export type ErrorDetail = Schemas["ErrorDetail"];
export type EvidenceFile = Schemas["EvidenceFile"];
export type Finding = Schemas["Finding"];
export type HostView = Schemas["HostView"];
export type ImageView = Schemas["ImageView"];
export type MachineState = Schemas["MachineState"];
export type LoginMethods = Schemas["LoginMethods"];
export type MeView = Schemas["MeView"];
export type Phase = Schemas["Phase"];
export type ProviderView = Schemas["ProviderView"];
export type Readiness = Schemas["Readiness"];
export type ReconcilerView = Schemas["ReconcilerView"];
export type Report = Schemas["Report"];
export type Right = Schemas["Right"];
export type SessionEvent = Schemas["SessionEvent"];
export type SessionEventKind = Schemas["SessionEventKind"];
export type SessionState = Schemas["SessionState"];
export type SessionView = Schemas["SessionView"];
export type Stage = Schemas["Stage"];
export type StartReply = Schemas["StartReply"];
export type NotPooled = Schemas["NotPooled"];
export type StartKind = Schemas["StartKind"];
export type StartRequest = Schemas["StartRequest"];
export type TicketReply = Schemas["TicketReply"];
export type Verdict = Schemas["Verdict"];
export type ViewerView = Schemas["ViewerView"];
export type VmView = Schemas["VmView"];

/** States after which nothing comes. */
export const TERMINAL_STATES: ReadonlySet<SessionState> = new Set([
  "completed",
  "failed",
  "cancelled",
  "expired",
]);

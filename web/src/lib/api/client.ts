/** The API as typed calls. Every call is same-origin, carries the cookie, and throws `ApiError` or nothing. */
import { ApiError, problemFrom, problemOf } from "./error";
import type {
  CredentialView,
  EvidenceFile,
  HostView,
  ImageView,
  LoginMethods,
  MeView,
  ProviderView,
  Readiness,
  ReconcilerView,
  Report,
  Right,
  SessionView,
  StartReply,
  StartRequest,
  TicketReply,
  Verdict,
  VmView,
} from "./types";

type Method = "GET" | "POST" | "DELETE";

/** Told once whenever a request was refused for want of a session; the shell then shows how to get one. */
let onSignedOut: () => void = () => {};

export function whenSignedOut(listener: () => void): void {
  onSignedOut = listener;
}

/** `fetch`, with failures turned into `ApiError`. The body of a success is left to the caller. */
export async function send(path: string, init: RequestInit = {}): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, { credentials: "same-origin", cache: "no-store", ...init });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError(problemFrom(error));
  }
  if (response.ok) return response;
  const problem = problemOf(response.status, await response.text().catch(() => ""));
  if (problem.code === "unauthenticated") onSignedOut();
  throw new ApiError(problem);
}

async function call<T>(method: Method, path: string, body?: unknown): Promise<T> {
  const headers: Record<string, string> = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await send(path, {
    method,
    headers,
    ...(body === undefined ? {} : { body: JSON.stringify(body) }),
  });
  const text = await response.text();
  if (text === "") return undefined as T;
  try {
    return JSON.parse(text) as T;
  } catch {
    throw new ApiError(problemOf(0, ""));
  }
}

const get = <T>(path: string) => call<T>("GET", path);
const enc = encodeURIComponent;

export const sessionPath = (id: string) => `/api/auth/session/${enc(id)}`;
export const machinePath = (id: string) => `/api/vms/${enc(id)}`;

export const api = {
  me: () => get<MeView>("/api/me"),
  loginWithPassword: (name: string, password: string) =>
    call<void>("POST", "/api/login/password", { name, password }),
  loginMethods: () => get<LoginMethods>("/api/login/methods"),
  login: (code: string) => call<void>("POST", "/api/login", { code }),
  logout: () => call<void>("POST", "/api/logout"),

  providers: () => get<ProviderView[]>("/api/providers"),
  start: (request: StartRequest) => call<StartReply>("POST", "/api/auth/start", request),

  sessions: () => get<SessionView[]>("/api/sessions?limit=200"),
  session: (id: string) => get<SessionView>(sessionPath(id)),
  cancel: (id: string) => call<SessionView>("POST", `${sessionPath(id)}/cancel`),
  confirm: (id: string, account: string | null) =>
    call<SessionView>("POST", `${sessionPath(id)}/confirm`, { account }),
  /** Ends every view of it. */
  revokeTickets: (id: string) => call<void>("DELETE", `${sessionPath(id)}/tickets`),
  ticket: (id: string, right: Right) =>
    call<TicketReply>("POST", `${sessionPath(id)}/tickets`, { right }),

  credentials: () => get<CredentialView[]>("/api/credentials"),
  removeCredential: (id: string) => call<void>("DELETE", `/api/credentials/${enc(id)}`),

  machines: () => get<VmView[]>("/api/vms?all=1"),
  machine: (id: string) => get<VmView>(machinePath(id)),
  report: (id: string) => get<Report>(`${machinePath(id)}/report`),
  verdict: (id: string) => get<Verdict>(`${machinePath(id)}/verdict`),
  evidence: (id: string) => get<EvidenceFile[]>(`${machinePath(id)}/evidence`),

  endMachine: (id: string) => call<void>("DELETE", machinePath(id)),

  images: () => get<ImageView[]>("/api/images"),

  hosts: () => get<HostView[]>("/api/hosts"),
  reconcilers: () => get<ReconcilerView[]>("/api/reconcilers"),

  /** `/ready` answers 503 with the same body while something is missing. */
  async readiness(): Promise<Readiness> {
    const response = await fetch("/ready", { cache: "no-store" }).catch((error: unknown) => {
      throw new ApiError(problemFrom(error));
    });
    const text = await response.text();
    try {
      return JSON.parse(text) as Readiness;
    } catch {
      throw new ApiError(problemOf(response.status, text));
    }
  },
};

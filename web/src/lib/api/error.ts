/** What goes wrong with a request, turned into something a person can act on. */
import type { ErrorCode, ErrorDetail, Finding } from "./types";

/** Codes of the wire, and the two that arise here: no connection, and an answer that is not ours. */
export type ProblemCode = ErrorCode | "offline" | "not_vestibule";

/** What to show of a problem: a headline for everyone, then the server's own words. */
export interface Problem {
  code: ProblemCode;
  status: number;
  title: string;
  detail: string;
  fix: string;
  requestId: string | null;
  retryAfterS: number | null;
  finding: Finding | null;
}

const TITLES: Record<ProblemCode, string> = {
  invalid_request: "That request was not understood",
  unauthenticated: "This browser is not signed in to Vestibule",
  forbidden: "This is not allowed for you",
  not_found: "There is nothing here",
  unknown_provider: "This provider is not known",
  method_not_allowed: "That can’t be done here",
  session_gone: "This sign-in has ended",
  conflict: "Things changed in the meantime",
  too_many_sessions: "All places are taken right now",
  quota_exceeded: "As many of your sign-ins are under way as may be",
  rate_limited: "That was too often",
  too_large: "That was too much at once",
  image_missing: "No image has been published yet",
  machine_unavailable: "The private computer does not answer",
  unavailable: "Vestibule is not ready yet",
  internal: "Something broke inside Vestibule",
  offline: "Vestibule can’t be reached",
  not_vestibule: "Something else answered instead of Vestibule",
};

const FIXES: Record<ProblemCode, string> = {
  invalid_request: "Reload the page and try once more.",
  unauthenticated: "Sign in.",
  forbidden: "Ask whoever runs this Vestibule.",
  not_found: "It may have been removed. Go back to the list.",
  unknown_provider: "Choose one from the Connect page.",
  method_not_allowed: "Reload the page and try once more.",
  session_gone: "Start a new sign-in. What was captured before is under Credentials.",
  conflict: "Reload the page to see the current state.",
  too_many_sessions: "Wait for another sign-in to finish, or cancel one, then try again.",
  quota_exceeded: "Wait for one of them to finish, or cancel one, then try again.",
  rate_limited: "Wait a little, then try again.",
  too_large: "Send less at a time.",
  image_missing: "Whoever runs this Vestibule has to build and publish an image.",
  machine_unavailable: "Try again in a moment. If it stays like this, start a new sign-in.",
  unavailable: "Try again in a moment. The Status page says what is missing.",
  internal: "Try again. If it happens again, report the request id below.",
  offline: "Check that it still runs and that you are connected. This page tries again by itself.",
  not_vestibule: "Check the address, and whether a proxy stands in between.",
};

export class ApiError extends Error {
  readonly problem: Problem;

  constructor(problem: Problem) {
    super(problem.title);
    this.name = "ApiError";
    this.problem = problem;
  }
}

function isDetail(value: unknown): value is ErrorDetail {
  if (typeof value !== "object" || value === null) return false;
  const detail = value as Record<string, unknown>;
  return (
    typeof detail["code"] === "string" &&
    detail["code"] in TITLES &&
    typeof detail["message"] === "string"
  );
}

const CODE_OF_STATUS: Record<number, ProblemCode> = {
  401: "unauthenticated",
  403: "forbidden",
  404: "not_found",
  405: "method_not_allowed",
  409: "conflict",
  410: "session_gone",
  413: "too_large",
  429: "too_many_sessions",
  503: "unavailable",
};

function plain(code: ProblemCode, status: number, detail: string): Problem {
  return {
    code,
    status,
    title: TITLES[code],
    detail,
    fix: FIXES[code],
    requestId: null,
    retryAfterS: null,
    finding: null,
  };
}

/** The problem behind an answer that was not a success; `body` is its text. */
export function problemOf(status: number, body: string): Problem {
  let parsed: unknown;
  try {
    parsed = JSON.parse(body);
  } catch {
    parsed = null;
  }
  const detail = (parsed as { error?: unknown } | null)?.error;
  if (!isDetail(detail)) {
    const code = CODE_OF_STATUS[status] ?? (status >= 500 ? "internal" : "not_vestibule");
    return plain(code, status, `The answer was HTTP ${status} without an explanation.`);
  }
  return {
    code: detail.code,
    status,
    title: TITLES[detail.code],
    detail: sentence(detail.message),
    fix: sentence(detail.fix) || FIXES[detail.code],
    requestId: detail.requestId || null,
    retryAfterS: detail.retryAfterS ?? null,
    finding: detail.finding ?? null,
  };
}

/** The problem behind anything that was thrown. */
export function problemFrom(error: unknown): Problem {
  if (error instanceof ApiError) return error.problem;
  if (error instanceof TypeError) return plain("offline", 0, "The connection failed.");
  return plain("internal", 0, error instanceof Error ? sentence(error.message) : "");
}

/** Server messages are lower-case fragments; on a page they are sentences. */
export function sentence(text: string): string {
  const trimmed = text.trim();
  if (trimmed === "") return "";
  // `qemu/tcg: …` and `vncserver@1.service failed` begin with a name, and names stay as they are.
  const plainWord = /^[a-z][a-z’'-]*(?=[\s,:;.]|$)(?!\.\w)/.test(trimmed);
  const first = plainWord ? trimmed.charAt(0).toUpperCase() + trimmed.slice(1) : trimmed;
  return /[.!?…)]$/.test(first) ? first : `${first}.`;
}

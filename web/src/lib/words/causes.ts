/**
 * Headlines for causes, for the person who signs in. A finding brings its own `why`, `fix` and evidence; what it lacks is
 * a title that is not an id. Causes of the sign-in itself have one each; what broke before that point is the operator's
 * matter and has one for its stage.
 */
import type { Cause, Stage } from "../api/types";

const BY_CAUSE: Partial<Record<Cause, string>> = {
  "image-missing": "No image has been published yet",
  "host-disk-full": "The server’s disk is full",
  "vmm-missing": "This server can’t run private computers",
  "out-of-memory-guest": "The private computer ran out of memory",
  "browser-not-ready": "The browser did not open",
  "browser-missing": "There is no browser in the image",
  "display-not-ready": "The screen stayed blank",
  "launch-refused": "This server refused to start a private computer",
  "snapshot-refused": "A private computer’s saved state no longer fits",
  "snapshot-failed": "A private computer could not be started from its saved state",
  "stream-lost": "The private computer stopped answering",
  "runner-lost": "The private computer disappeared",
  "host-lost": "The machine that ran the private computer disappeared",
  "egress-refused": "A page that the sign-in needs was not allowed",
  "egress-unreachable": "A page that the sign-in needs did not answer",
  "name-not-found": "A page that the sign-in needs does not exist",
  "tls-failed": "A page could not prove who it is",
  "tool-failed": "The provider’s tool stopped with an error",
  "tool-needs-terminal": "The provider’s tool is waiting for its terminal",
  "url-not-captured": "The provider’s tool never opened its sign-in page",
  "callback-not-reached": "The way back from the sign-in page was interrupted",
  "consent-denied": "Access was declined",
  "state-mismatch": "The answer did not belong to this sign-in",
  "code-expired": "The sign-in code had expired or was already used",
  "verifier-refused": "The provider refused the proof of this sign-in",
  "token-endpoint-failed": "The provider did not hand out the credential",
  "credential-invalid": "What the tool wrote is not a complete credential",
  "credential-moved": "The tool put its credential in an unexpected place",
  "person-left": "Nobody signed in in time",
  deadline: "The sign-in took too long",
};

const BY_STAGE: Record<Stage, string> = {
  "image-not-built": "The image could not be built",
  "wrong-image": "The private computer was made from the wrong image",
  "no-boot": "The private computer did not start",
  "no-stream": "The private computer can’t be reached",
  "unit-waiting": "A part of the private computer never started",
  "unit-failed": "A part of the private computer failed",
  "listening-not-ready": "The private computer started but did not become ready",
  "contract-mismatch": "Two parts of Vestibule don’t fit together",
  provider: "The sign-in did not work out",
};

/** A newer server may know causes and stages that this page does not. */
export function headline(finding: { cause: Cause; stage: Stage }): string {
  return BY_CAUSE[finding.cause] ?? BY_STAGE[finding.stage] ?? "The sign-in did not work out";
}

/** Where a quote stands, in words. */
export function sourceName(source: string): string {
  const [kind, rest] = split(source);
  const names: Record<string, string> = {
    serial: "Console",
    journal: "System log",
    vmm: "Virtual machine log",
    report: "Status report",
    terminal: "Terminal",
    egress: "Network",
    disk: "File",
    events: "Events",
  };
  const name = names[kind] ?? kind;
  return rest === "" ? name : `${name} ${rest}`;
}

function split(source: string): [string, string] {
  const colon = source.indexOf(":");
  return colon < 0 ? [source, ""] : [source.slice(0, colon), source.slice(colon + 1)];
}

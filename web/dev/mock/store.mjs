/** The mock's rows and the clock that moves its sign-ins along. */
import * as data from "./data.mjs";
import { past, script } from "./scenario.mjs";

const TERMINAL = new Set(["completed", "failed", "cancelled", "expired"]);
const VIEWABLE = new Set(["ready", "awaiting-user", "confirming", "capturing"]);

export class Store {
  sessions = data.sessions();
  credentials = data.credentials();
  machines = data.machines();
  signedIn = true;
  /** The identity provider at which one can sign in. @type {{ name: string } | null} */
  elsewhere = null;
  /** What comes of it. @type {string | null} */
  signInProblem = null;
  /** Who is signed in. */
  me = data.me("local");
  /** Whether sign-ins wait for their account to be confirmed. */
  confirm = false;
  #watching = [];
  /** Rights of the tickets asked for. */
  rights = [];
  #events = new Map(this.sessions.map((s) => [s.sessionId, past(s)]));
  #listeners = new Set();
  #next = 100;
  /** Seconds of a script per second of the clock. */
  #speed;

  constructor(speed = 1) {
    this.#speed = speed;
  }

  events(id) {
    return this.#events.get(id) ?? [];
  }

  session(id) {
    return this.sessions.find((s) => s.sessionId === id);
  }

  /** Calls back with each further event of this session; returns what ends it. */
  listen(id, callback) {
    const entry = { id, callback };
    this.#listeners.add(entry);
    return () => this.#listeners.delete(entry);
  }

  /** Counts a viewer until its socket closes. */
  watch(id, pane, socket) {
    const view = { who: this.me.name, right: "control", pane, since: new Date().toISOString() };
    const entry = { id, socket };
    this.#watching.push(entry);
    const session = this.session(id);
    session.viewers = [...session.viewers, view];
    this.emit(id, { type: "viewer-joined", who: view.who, right: view.right, pane });
    socket.on("close", () => {
      this.#watching = this.#watching.filter((e) => e !== entry);
      session.viewers = session.viewers.filter((v) => v !== view);
      this.emit(id, { type: "viewer-left", who: view.who, right: view.right, pane });
    });
  }

  revoke(id) {
    for (const entry of this.#watching) if (entry.id === id) entry.socket.close(4010, "revoked");
  }

  start({ provider, flow }) {
    const n = this.#next++;
    const now = new Date().toISOString();
    const id = data.uuid(n);
    this.sessions.unshift({
      ...data.sessions()[0],
      sessionId: id,
      provider,
      flow: flow ?? "browser",
      state: "requested",
      createdAt: now,
      updatedAt: now,
      machineId: data.uuid(n + 500),
      machineState: "creating",
      account: null,
      credentialId: null,
    });
    this.machines.unshift(
      data.machine(n + 500, { state: "up", goneAt: null, createdAt: now, hasEvidence: false }),
    );
    this.#events.set(id, []);
    for (const [at, event] of script(
      this.confirm && provider === "claude" ? "confirm" : provider,
    )) {
      setTimeout(() => this.emit(id, event), (at * 1000) / this.#speed);
    }
    return id;
  }

  emit(id, event) {
    const session = this.session(id);
    const list = this.#events.get(id);
    if (!session || TERMINAL.has(session.state)) return;
    const entry = { seq: list.length + 1, at: new Date().toISOString(), event };
    list.push(entry);
    session.updatedAt = entry.at;
    this.#apply(session, event);
    for (const l of this.#listeners) if (l.id === id) l.callback(entry);
  }

  #apply(session, event) {
    if (event.type === "user-code") session.userCode = event.code;
    if (event.type === "captured") session.account = event.account;
    if (event.type === "failure") {
      session.failure = {
        verdict: "cause",
        finding: event.finding,
        also: [],
        notes: [],
        lookedAt: ["terminal"],
        collectNext: [],
        elapsedMs: 1,
      };
    }
    if (event.type !== "state") return;
    session.state = event.state;
    session.viewable = VIEWABLE.has(event.state);
    if (event.state === "completed") {
      session.credentialId = data.uuid(903);
      this.credentials.unshift({
        ...data.credentials()[0],
        credentialId: session.credentialId,
        provider: session.provider,
        sessionId: session.sessionId,
      });
    }
    if (!TERMINAL.has(event.state)) return;
    const vm = this.machines.find((m) => m.machineId === session.machineId);
    if (vm) Object.assign(vm, { state: "gone", goneAt: session.updatedAt, hasEvidence: true });
  }
}

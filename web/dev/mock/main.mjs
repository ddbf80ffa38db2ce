/**
 * A stand-in for the controller, for looking at every page while working on the dashboard, and for e2e/: the shapes of
 * the API without VMs. Never shipped. `npm run mock [port]`, then open http://127.0.0.1:4100 (built) or `npm run dev`.
 *
 * Sign-ins with codex wait for you, gh shows a code, claude completes, gemini fails, wrangler stays in its start.
 */
import { randomUUID } from "node:crypto";
import { createServer } from "node:http";
import { pathToFileURL } from "node:url";
import { WebSocketServer } from "ws";
import * as data from "./data.mjs";
import { serveRfb } from "./rfb.mjs";
import { serveStatic } from "./static.mjs";
import { Store } from "./store.mjs";

const ERRORS = {
  401: [
    "unauthenticated",
    "this request carries no session",
    "open a new link from `vestibule link`",
  ],
  404: ["not_found", "there is no such thing", "go back to the list"],
  409: ["conflict", "the session is not viewable yet", "wait for its state `ready`"],
  429: ["rate_limited", "too many attempts to sign in in a short time", "try again in 17 s"],
  410: ["session_gone", "this session was removed after 30 days", "start a new one"],
};

function json(response, status, body) {
  const text = body === undefined ? "" : JSON.stringify(body);
  response.writeHead(status, { "Content-Type": "application/json" }).end(text);
}

function fail(response, status) {
  const [code, message, fix] = ERRORS[status];
  json(response, status, { error: { code, message, fix, requestId: randomUUID() } });
}

async function read(request) {
  let text = "";
  for await (const chunk of request) text += chunk;
  return text === "" ? {} : JSON.parse(text);
}

const streams = new Set();

function stream(store, id, request, response) {
  streams.add(response);
  response.writeHead(200, { "Content-Type": "text/event-stream", "Cache-Control": "no-store" });
  const write = (e) =>
    response.write(`id: ${e.seq}\nevent: ${e.event.type}\ndata: ${JSON.stringify(e)}\n\n`);
  const after = Number(request.headers["last-event-id"] ?? 0);
  const ended = () =>
    ["completed", "failed", "cancelled", "expired"].includes(store.session(id).state);
  store
    .events(id)
    .filter((e) => e.seq > after)
    .forEach(write);
  if (ended()) return response.end();
  const stop = store.listen(id, (e) => {
    write(e);
    if (ended()) response.end();
  });
  const beat = setInterval(() => response.write(": still here\n\n"), 10_000);
  request.on("close", () => {
    stop();
    clearInterval(beat);
    streams.delete(response);
  });
}

function console_(machine, response) {
  response.writeHead(200, { "Content-Type": "text/plain; charset=utf-8" });
  data.CONSOLE.forEach((line) => response.write(line));
  if (machine.state === "gone") return response.end();
  let n = 0;
  const timer = setInterval(
    () => response.write(`[   ${(9 + n * 0.3).toFixed(6)}] line ${n++}\r\n`),
    300,
  );
  response.on("close", () => clearInterval(timer));
}

/** [method, pattern, handler(match, request, response)]; a handler's value is the JSON of a 200. */
function routes(store) {
  const session = (id) => store.session(id);
  const vm = (id) => store.machines.find((m) => m.machineId === id);
  return [
    [
      "POST",
      /^\/api\/login$/,
      async (_, q, r) => {
        const { code } = await read(q);
        if (code !== "good") return fail(r, 401);
        store.signedIn = true;
        json(r, 204);
      },
    ],
    [
      "POST",
      /^\/api\/login\/password$/,
      async (_, q, r) => {
        const { name, password } = await read(q);
        if (name === "often") return fail(r, 429);
        if (password !== "correct horse battery") return fail(r, 401);
        store.signedIn = true;
        store.me = data.me(name);
        json(r, 204);
      },
    ],
    ["GET", /^\/api\/login\/methods$/, () => ({ oidc: store.elsewhere ?? null })],
    // The provider says yes at once, or what the test wants.
    [
      "GET",
      /^\/api\/login\/oidc$/,
      (_, q, r) => {
        const problem = store.signInProblem;
        if (!problem) ((store.signedIn = true), (store.me = data.me("ada")));
        const location = problem ? `/?signIn=${problem}&request=0193-7#/login` : "/";
        r.writeHead(303, { location }).end();
      },
    ],
    ["GET", /^\/api\/me$/, () => store.me],
    ["POST", /^\/api\/logout$/, (_, q, r) => ((store.signedIn = false), json(r, 204))],
    ["GET", /^\/api\/providers$/, () => data.providers],
    [
      "POST",
      /^\/api\/auth\/start$/,
      async (_, q, r) => {
        const body = await read(q);
        json(r, 201, { sessionId: store.start(body), provider: body.provider, state: "requested" });
      },
    ],
    ["GET", /^\/api\/sessions$/, () => store.sessions],
    ["GET", /^\/api\/auth\/session\/([^/]+)$/, ([, id], q, r) => session(id) ?? fail(r, 410)],
    [
      "GET",
      /^\/api\/auth\/session\/([^/]+)\/events$/,
      ([, id], q, r) => (session(id) ? stream(store, id, q, r) : fail(r, 410)),
    ],
    [
      "POST",
      /^\/api\/auth\/session\/([^/]+)\/cancel$/,
      ([, id]) => {
        store.emit(id, { type: "state", state: "cancelled" });
        return session(id);
      },
    ],
    [
      "POST",
      /^\/api\/auth\/session\/([^/]+)\/confirm$/,
      async ([, id], q, r) => {
        const { account } = await read(q);
        if (session(id).state !== "confirming" || account !== session(id).account)
          return fail(r, 409);
        store.emit(id, { type: "state", state: "capturing" });
        setTimeout(() => store.emit(id, { type: "state", state: "completed" }), 50);
        return session(id);
      },
    ],
    [
      "DELETE",
      /^\/api\/auth\/session\/([^/]+)\/tickets$/,
      ([, id], q, r) => {
        store.revoke(id);
        json(r, 204);
      },
    ],
    [
      "POST",
      /^\/api\/auth\/session\/([^/]+)\/tickets$/,
      async ([, id], q, r) => {
        const { right } = await read(q);
        store.rights.push(right);
        if (!session(id)?.viewable) return fail(r, 409);
        json(r, 201, { ticket: randomUUID(), expiresAt: new Date().toISOString(), right });
      },
    ],
    ["GET", /^\/api\/credentials$/, () => store.credentials],
    [
      "DELETE",
      /^\/api\/credentials\/([^/]+)$/,
      ([, id], q, r) => {
        store.credentials = store.credentials.filter((c) => c.credentialId !== id);
        json(r, 204);
      },
    ],
    ["GET", /^\/api\/vms$/, () => store.machines],
    ["GET", /^\/api\/vms\/([^/]+)$/, ([, id], q, r) => vm(id) ?? fail(r, 404)],
    [
      "DELETE",
      /^\/api\/vms\/([^/]+)$/,
      ([, id], q, r) => {
        Object.assign(vm(id), { state: "gone", hasEvidence: true });
        json(r, 204);
      },
    ],
    ["GET", /^\/api\/vms\/([^/]+)\/console$/, ([, id], q, r) => console_(vm(id), r)],
    ["GET", /^\/api\/vms\/([^/]+)\/report$/, () => data.report()],
    [
      "GET",
      /^\/api\/vms\/([^/]+)\/verdict$/,
      ([, id]) => ({
        verdict: vm(id).failure ? "cause" : "healthy",
        finding: vm(id).failure,
        also: [],
        notes: [],
        lookedAt: ["serial", "report", "events"],
        collectNext: [],
        elapsedMs: 2,
      }),
    ],
    ["GET", /^\/api\/vms\/([^/]+)\/evidence$/, () => data.evidence],
    ["GET", /^\/api\/images$/, () => data.images],
    ["GET", /^\/api\/hosts$/, () => data.hosts],
    ["GET", /^\/api\/reconcilers$/, () => data.reconcilers],
    ["GET", /^\/ready$/, (_, q, r) => json(r, 503, data.readiness)],
  ];
}

const OPEN = new Set([
  "/api/login",
  "/api/login/methods",
  "/api/login/oidc",
  "/api/login/password",
  "/ready",
]);

async function answer(store, table, request, response) {
  const { pathname } = new URL(request.url, "http://mock");
  if (!pathname.startsWith("/api/") && pathname !== "/ready")
    return serveStatic(pathname, response);
  if (!store.signedIn && !OPEN.has(pathname)) return fail(response, 401);
  for (const [method, pattern, handler] of table) {
    const match = pattern.exec(pathname);
    if (!match || method !== request.method) continue;
    const value = await handler(match, request, response);
    if (value !== undefined && value !== response && !response.headersSent)
      json(response, 200, value);
    return;
  }
  fail(response, 404);
}

function terminal(socket) {
  const say = (text) => socket.send(Buffer.from(text));
  say(
    "\x1b[1mWelcome to Codex\x1b[0m\r\n\r\n\x1b[38;2;120;200;160m●\x1b[0m Starting local login server on http://localhost:1455.\r\n",
  );
  say(
    "If your browser did not open, navigate to this URL to authenticate:\r\n\r\n\x1b[4mhttps://auth.openai.com/oauth/authorize?…\x1b[0m\r\n\r\n",
  );
  socket.on("message", (bytes, binary) => binary && say(bytes));
}

/** Starts the mock; `port` 0 takes a free one. */
export async function startMock(port = 0, speed = 1) {
  const store = new Store(speed);
  const table = routes(store);
  const server = createServer((request, response) => {
    answer(store, table, request, response).catch((error) => {
      console.error(error);
      response.destroy();
    });
  });
  const sockets = new WebSocketServer({ noServer: true });
  const seen = { keys: 0, clipboard: "", copy: () => {} };
  server.on("upgrade", (request, socket, head) => {
    const match = /^\/api\/auth\/session\/([^/]+)\/(view|terminal)\?ticket=./.exec(request.url);
    if (!match) return socket.destroy();
    sockets.handleUpgrade(request, socket, head, (ws) => {
      const [, id, what] = match;
      if (!store.session(id)?.viewable) return ws.close(4002, "the session has ended");
      store.emit(id, { type: "viewers", count: sockets.clients.size });
      store.listen(
        id,
        (e) => e.event.type === "state" && !store.session(id).viewable && ws.close(4002, "over"),
      );
      store.watch(id, what === "view" ? "screen" : "terminal", ws);
      if (what === "view") serveRfb(ws, seen);
      else terminal(ws);
    });
  });
  await new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  const url = `http://127.0.0.1:${server.address().port}`;
  const close = () => {
    for (const ws of sockets.clients) ws.terminate();
    server.closeAllConnections();
    server.close();
  };
  return {
    url,
    store,
    sockets,
    close,
    /** Keys pressed in all screens so far. */
    keys: () => seen.keys,
    clipboard: () => seen.clipboard,
    /** Something was copied on the remote side. */
    copy: (text) => seen.copy(text),
    /** Rights of the tickets asked for so far. */
    rights: store.rights,
    /** Breaks every open event stream. */
    dropStreams: () => streams.forEach((response) => response.destroy()),
  };
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  const { url } = await startMock(Number(process.argv[2] ?? 4100));
  console.log(`mock at ${url}`);
}

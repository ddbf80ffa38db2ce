/** What the mock's store holds at the start: one of everything that a page has to show. */

const ago = (s) => new Date(Date.now() - s * 1000).toISOString();
export const uuid = (n) => `0199f3c2-7a10-7000-8000-${String(n).padStart(12, "0")}`;
const digest = (c) => c.repeat(64);

/** Operations of the API that each role of the mock may use. */
const MAY = {
  local: [
    "start",
    "sessions",
    "session",
    "ticket",
    "revokeTickets",
    "confirm",
    "vms",
    "vm",
    "images",
    "ready",
    "hosts",
    "credentials",
  ],
  signer: ["start", "sessions", "session", "ticket", "revokeTickets", "confirm", "credentials"],
  consumer: ["credentialContent"],
};

/** Who is signed in: `ada` is a signer, `carl` a consumer. */
export const me = (name) => {
  const role = { local: "local", carl: "consumer" }[name] ?? "signer";
  return {
    kind: name === "local" ? "local" : "user",
    name,
    role: role === "local" ? "admin" : role,
    organisation: null,
    operations: MAY[role],
  };
};

export const FINDING = {
  cause: "consent-denied",
  stage: "provider",
  evidence: [
    {
      source: "terminal",
      line: 12,
      text: "Error: OAuth error: access_denied (the user declined the request)",
    },
    { source: "events", text: "page opened at accounts.google.com" },
  ],
  why: "the provider sent the sign-in back with `access_denied`, which it does when consent is declined on its page",
  fix: "sign in again and choose Allow; an organisation's account may need its administrator's approval first",
  retryable: true,
  refutes: "an account that is allowed gets the same answer",
};

export const BOOT_FINDING = {
  cause: "required-unit-failed",
  stage: "unit-failed",
  unit: "vestibule-browser.service",
  evidence: [
    {
      source: "serial",
      line: 418,
      text: "[FAILED] Failed to start vncserver@1.service - Xvnc on display :1.",
    },
    { source: "report", text: "vncserver@1.service loaded failed, result exit-code, exit 127" },
  ],
  why: "vestibule-browser.service requires vncserver@1.service, and that failed",
  fix: "read why vncserver@1.service failed: its program is missing in the image",
  retryable: false,
  refutes: "vncserver@1.service is active",
};

const verdict = (finding) => ({
  verdict: "cause",
  finding,
  also: [],
  notes: [],
  lookedAt: ["serial", "report", "events"],
  collectNext: [],
  elapsedMs: 3,
});

export const providers = [
  {
    id: "codex",
    name: "Codex",
    vendor: "OpenAI",
    homepage: "https://openai.com/codex",
    termsNote:
      "For your own account. OpenAI does not allow one ChatGPT account to be shared between people.",
    termsUrl: "https://openai.com/policies/terms-of-use",
    flows: [
      { id: "browser", title: "Sign in with ChatGPT" },
      { id: "device", title: "With a code on another device" },
    ],
  },
  {
    id: "claude",
    name: "Claude Code",
    vendor: "Anthropic",
    homepage: "https://claude.com/product/claude-code",
    termsNote: "For your own account; a subscription may be used by its owner only.",
    termsUrl: "https://www.anthropic.com/legal/consumer-terms",
    flows: [{ id: "browser", title: "In the browser" }],
  },
  {
    id: "gemini",
    name: "Gemini CLI",
    vendor: "Google",
    homepage: "https://github.com/google-gemini/gemini-cli",
    termsNote:
      "For your own Google account. Work accounts may need their administrator’s approval.",
    termsUrl: "https://policies.google.com/terms",
    flows: [{ id: "browser", title: "Login with Google" }],
  },
  {
    id: "gh",
    name: "GitHub CLI",
    vendor: "GitHub",
    homepage: "https://cli.github.com",
    termsNote:
      "Personal and machine accounts alike; the token has the rights that you grant on the page.",
    termsUrl: "https://docs.github.com/site-policy",
    flows: [{ id: "device", title: "With a code" }],
  },
  {
    id: "wrangler",
    name: "Wrangler",
    vendor: "Cloudflare",
    homepage: "https://developers.cloudflare.com/workers/wrangler/",
    termsNote: "For your own Cloudflare account and those you are a member of.",
    termsUrl: "https://www.cloudflare.com/terms/",
    flows: [{ id: "browser", title: "In the browser" }],
  },
  {
    id: "oidc",
    name: "OpenID Connect",
    vendor: "Your own identity provider",
    homepage: "https://openid.net/connect/",
    termsNote: "Whatever your organisation’s rules for its identity provider say.",
    termsUrl: "https://openid.net/policies/",
    flows: [{ id: "code", title: "Authorization code" }],
    unavailable: "the parameter `issuer` is not set in the configuration",
  },
];

const session = (n, provider, state, more = {}) => ({
  sessionId: uuid(n),
  provider,
  flow: "browser",
  userId: "local",
  state,
  createdAt: ago(more.age ?? 4000),
  updatedAt: ago((more.age ?? 4000) - 90),
  machineId: uuid(n + 500),
  machineState: "gone",
  imageDigest: digest("a"),
  madeFromOlderImage: false,
  credentialId: null,
  account: null,
  userCode: null,
  failure: null,
  viewable: false,
  confirmAccount: false,
  viewers: [],
  own: true,
  ...more,
});

export const sessions = () => [
  session(1, "codex", "completed", {
    age: 900,
    account: "ada@example.org",
    credentialId: uuid(901),
  }),
  session(2, "gemini", "failed", { age: 5400, failure: verdict(FINDING) }),
  session(3, "claude", "cancelled", { age: 9000 }),
  session(4, "wrangler", "expired", { age: 40_000 }),
  session(5, "gh", "failed", { age: 200_000, failure: verdict(BOOT_FINDING) }),
];

export const credentials = () => [
  {
    credentialId: uuid(901),
    provider: "codex",
    userId: "local",
    account: "ada@example.org",
    sessionId: uuid(1),
    createdAt: ago(810),
    expiresAt: ago(-864_000),
    files: [{ path: ".codex/auth.json", bytes: 4211 }],
  },
  {
    credentialId: uuid(902),
    provider: "wrangler",
    userId: "local",
    account: null,
    sessionId: uuid(77),
    createdAt: ago(500_000),
    expiresAt: ago(3600),
    files: [{ path: ".config/.wrangler/config/default.toml", bytes: 371 }],
  },
];

export const machine = (n, more = {}) => ({
  machineId: uuid(n),
  sessionId: uuid(n - 500),
  state: "gone",
  generation: 5,
  imageDigest: digest("a"),
  madeFromOlderImage: false,
  driver: "qemu/tcg",
  memoryMib: 2048,
  vcpus: 2,
  createdAt: ago(900),
  readyAt: ago(862),
  goneAt: ago(700),
  runnerPid: 4711,
  vmmPid: 4715,
  health: {
    status: "ready",
    version: "0.1.0",
    build: digest("c"),
    api: 1,
    capabilities: ["terminal", "browser", "display", "oauth", "egress"],
    uptimeMs: 38_000,
    waitingFor: [],
  },
  viewers: 0,
  egress: { connections: 148, refused: 3, bytesOut: 812_331, bytesIn: 18_220_118 },
  failure: null,
  hasEvidence: true,
  ...more,
});

export const machines = () => [
  machine(501),
  machine(505, {
    failure: BOOT_FINDING,
    readyAt: null,
    madeFromOlderImage: true,
    createdAt: ago(200_000),
  }),
];

const unit = (name, active = "active", more = {}) => ({
  name,
  load: "loaded",
  active,
  sub: active === "active" ? "running" : active === "failed" ? "failed" : "start",
  result: active === "failed" ? "exit-code" : "success",
  mainExit: active === "failed" ? 127 : null,
  restarts: 0,
  ...more,
});

export const report = () => ({
  at: ago(1),
  kernel: "6.1.0-40-cloud-amd64",
  hostname: "vestibule",
  machineId: "x",
  bootId: "y",
  uptimeMs: 61_000,
  systemState: "running",
  units: [
    unit("vm-browser-agent.service"),
    unit("vncserver@1.service"),
    unit("vestibule-wm.service"),
    unit("vestibule-browser.service", "active", { restarts: 1 }),
    unit("vestibule-terminal.service", "activating"),
    unit("systemd-timesyncd.service", "failed"),
  ],
  jobs: [
    {
      id: 71,
      unit: "vestibule-terminal.service",
      kind: "start",
      state: "waiting",
      waitsFor: ["vestibule-wm.service"],
    },
  ],
  listeners: [
    { family: "tcp", address: "127.0.0.1:8080", process: "vestibule-agent" },
    { family: "tcp", address: "127.0.0.1:3128", process: "vestibule-agent" },
    { family: "unix", address: "/run/vnc/1.sock", process: "Xvnc" },
  ],
  display: { width: 1280, height: 800, painted: true, browserWindow: true },
  memory: { totalKib: 2_031_616, availableKib: 1_102_848, pressureAvg10: 0.4 },
  missing: [],
});

export const images = [
  {
    digest: digest("a"),
    recipe: "browser",
    builtAt: ago(7200),
    diskBytes: 1_420_000_000,
    aliases: ["browser"],
    verified: true,
    features: ["agent", "display", "browser", "terminal", "tool:codex", "tool:claude", "tool:gh"],
    kernelRelease: "6.1.0-40-cloud-amd64",
    defaultMemoryMib: 2048,
    defaultVcpus: 2,
    snapshot: { id: digest("c"), takenAt: ago(7000), allocatedBytes: 690_000_000, memoryMib: 2048 },
  },
  {
    digest: digest("b"),
    recipe: "tiny",
    builtAt: ago(90_000),
    diskBytes: 180_000_000,
    aliases: [],
    verified: false,
    features: ["agent"],
    kernelRelease: "6.1.0-40-cloud-amd64",
    defaultMemoryMib: 256,
    defaultVcpus: 1,
    snapshot: null,
  },
];

export const evidence = [
  { name: "serial.log", bytes: 48_112 },
  { name: "report.json", bytes: 9_300 },
  { name: "events.ndjson", bytes: 3_812 },
  { name: "machine.json", bytes: 1_990 },
  { name: "exit.json", bytes: 44 },
];

export const readiness = {
  ready: false,
  version: "0.1.0",
  checks: [
    { name: "database", ok: true, observed: "answers in 1 ms" },
    { name: "vault", ok: true, observed: "master key is loaded" },
    { name: "image", ok: true, observed: "`browser` is aaaaaaaaaaaa, verified" },
    { name: "driver", ok: true, observed: "qemu/tcg: /usr/bin/qemu-system-x86_64 8.2" },
    {
      name: "disk-space",
      ok: false,
      observed: "1.1 GiB free below /var/lib/vestibule",
      fix: "free at least 2 GiB, or move the home directory",
    },
    {
      name: "jail",
      ok: true,
      observed: "VMs are not jailed: without root all VMMs run as this user",
      fix: "run the controller as root for a user, namespaces and a cgroup for each",
    },
  ],
};

const host = (n, name, more = {}) => ({
  hostId: uuid(800 + n),
  name,
  state: "live",
  own: false,
  address: `https://${name}.example.com:8443`,
  leaseUntil: ago(-12),
  generation: 3,
  machines: n,
  ...more,
});

export const hosts = [
  host(1, "vm-host-1", { own: true }),
  host(2, "vm-host-2", { address: null }),
  host(3, "a-host-with-a-name-that-is-longer-than-a-phone-is-wide-0199f3c2", {
    state: "lost",
    leaseUntil: ago(260),
  }),
];

export const reconcilers = [
  { name: "place", runs: 411, failures: 0, lastRunAt: ago(2), lastDurationMs: 1, lastCount: 0 },
  {
    name: "start-machines",
    runs: 411,
    failures: 0,
    lastRunAt: ago(2),
    lastDurationMs: 3,
    lastCount: 1,
  },
  {
    name: "end-machines",
    runs: 410,
    failures: 2,
    lastRunAt: ago(9),
    lastDurationMs: 15,
    lastCount: 0,
    lastError: "end machine 0199f3c2: connect to its runner: no such file or directory",
  },
];

export const CONSOLE = Array.from(
  { length: 60 },
  (_, i) =>
    `[    ${(i * 0.11).toFixed(6)}] \x1b[0;32m  OK  \x1b[0m Started part ${i} of the system.\r\n`,
);

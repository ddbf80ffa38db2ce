/** A sign-in as a person goes through it, and everything that can get in the way. */
import type { Browser } from "playwright-core";
import { afterAll, afterEach, beforeAll, expect, it } from "vitest";
import { connect, DESK, launch, open, PHONE, state, view, type Opened } from "./harness";

let browser: Browser;
let opened: Opened | null = null;
beforeAll(async () => void (browser = await launch()));
afterAll(() => browser.close());
afterEach(async () => {
  expect(opened?.wrong).toEqual([]);
  await opened?.close();
  opened = null;
});

const start = async (...args: Parameters<typeof open> extends [unknown, ...infer R] ? R : never) =>
  (opened = await open(browser, ...args));

it("goes from Connect to Completed, with every step done", async () => {
  const { page } = await start();
  await page.getByTestId("connect-claude").click();
  await page.getByTestId("completed-card").waitFor();
  await state(page, "completed");
  for (const step of ["preparing", "starting", "ready", "authenticating", "completed"]) {
    expect(await page.getByTestId(`step-${step}`).getAttribute("data-status")).toBe("done");
  }
  const command = await page.getByTestId("credential-command").innerText();
  expect(command).toMatch(/^vestibule credential get [0-9a-f-]{36} --into ~$/);
  expect(await page.getByTestId("completed-card").innerText()).toContain("ada@example.org");
});

it("shows the cause of a failure with its evidence, and starts again from there", async () => {
  const { page, mock } = await start();
  await page.getByTestId("connect-gemini").click();
  const card = page.getByTestId("failure-card");
  await card.waitFor();
  expect(await card.getAttribute("data-cause")).toBe("consent-denied");
  const text = await card.innerText();
  expect(text).toContain("Access was declined");
  expect(text).toContain("Terminal, line 12");
  expect(text).toContain("access_denied");
  const before = page.url();
  await page.getByTestId("retry-session").click();
  await page.waitForURL((url) => url.href !== before);
  const newest = mock.store.sessions[0];
  expect(newest?.provider).toBe("gemini");
  expect(page.url()).toContain(newest?.sessionId);
});

it("shows the code to compare, large and copyable", async () => {
  const { page } = await start();
  await connect(page, "gh");
  expect(await page.getByTestId("user-code").innerText()).toBe("8F43-6FCF");
});

it("has one place for the view, which never moves from the first moment to the last", async () => {
  const { page } = await start();
  await page.evaluate(() => {
    const places = new Set<string>();
    Object.assign(window, { places });
    const look = () => {
      const box = document.querySelector(".columns > .main")?.getBoundingClientRect();
      if (box) places.add([box.x, box.y, box.width, box.height].join(" "));
      requestAnimationFrame(look);
    };
    look();
  });
  await page.getByTestId("connect-claude").click();
  await page.getByTestId("completed-card").waitFor();
  const places = await page.evaluate(() => [
    ...(window as unknown as { places: Set<string> }).places,
  ]);
  expect(places).toEqual([places[0]]);
});

it("sends keys typed into the screen, and gives the keyboard back", async () => {
  const { page, mock } = await start();
  await connect(page, "codex");
  const canvas = page.locator('[data-testid="view-canvas-host"] canvas');
  await canvas.click();
  await page.keyboard.type("pass");
  await page.keyboard.press("Tab");
  await expect.poll(() => mock.keys()).toBe(5);
  expect(await canvas.evaluate((c) => c === document.activeElement)).toBe(true);
  await page.keyboard.press("Control+Shift+.");
  const focused = () =>
    page.evaluate(() => (document.activeElement as HTMLElement).dataset["testid"]);
  expect(await focused()).toBe("enter-view");
  await page.keyboard.press("Enter");
  expect(await canvas.evaluate((c) => c === document.activeElement)).toBe(true);
});

it("asks for a remote screen of the size that it has, and follows the window", async () => {
  const { page } = await start();
  await connect(page, "codex");
  const canvas = page.locator('[data-testid="view-canvas-host"] canvas');
  const fits = () =>
    canvas.evaluate((c: HTMLCanvasElement) => {
      const host = c.closest('[data-testid="view-canvas-host"]') as HTMLElement;
      return (
        Math.abs(c.width - host.clientWidth) <= 1 && Math.abs(c.height - host.clientHeight) <= 1
      );
    });
  await expect.poll(fits).toBe(true);
  await page.setViewportSize({ width: 1100, height: 700 });
  await expect.poll(fits).toBe(true);
});

it("gives a phone a screen that a browser fits into, and a keyboard", async () => {
  const { page, mock } = await start(PHONE);
  await connect(page, "codex");
  const canvas = page.locator('[data-testid="view-canvas-host"] canvas');
  await expect.poll(() => canvas.evaluate((c: HTMLCanvasElement) => c.width)).toBeGreaterThan(550);
  const box = await canvas.boundingBox();
  expect(box?.width).toBeLessThanOrEqual(360);
  await page.getByTestId("soft-keyboard").tap();
  await page.keyboard.type("añ日");
  await page.getByRole("button", { name: "Tab", exact: true }).tap();
  await expect.poll(() => mock.keys()).toBe(4);
});

it("connects again with a new ticket when the view breaks, and says why", async () => {
  const { page, mock } = await start();
  await connect(page, "codex");
  const tickets: string[] = [];
  page.on("websocket", (ws) => tickets.push(new URL(ws.url()).searchParams.get("ticket") ?? ""));
  for (const ws of mock.sockets.clients) ws.close(4009, "the controller stops");
  await view(page, "reconnecting");
  expect(await page.locator("#panel-browser").innerText()).toContain("Vestibule is restarting");
  await view(page, "connected");
  for (const ws of mock.sockets.clients) ws.terminate();
  await view(page, "connected");
  await expect.poll(() => new Set(tickets).size).toBe(2);
});

it("does not fight for a place that is taken", async () => {
  const { page, mock } = await start();
  await connect(page, "codex");
  for (const ws of mock.sockets.clients) ws.close(4006, "two viewers are the limit");
  await view(page, "ended");
  await page.getByRole("button", { name: "Try to open it again" }).click();
  await view(page, "connected");
});

it("only watches when asked to", async () => {
  const { page, mock } = await start();
  await connect(page, "codex");
  await page.getByTestId("view-only").click();
  await view(page, "connected");
  await expect.poll(() => mock.rights.at(-1)).toBe("view");
  await page.locator('[data-testid="view-canvas-host"] canvas').click();
  await page.keyboard.type("nothing");
  await page.getByTestId("view-only").click();
  await expect.poll(() => mock.rights.at(-1)).toBe("control");
  expect(mock.keys()).toBe(0);
});

it("resumes the events where they broke off", async () => {
  const { page, mock } = await start();
  const id = await connect(page, "codex");
  const resumed = page.waitForRequest((r) => r.url().endsWith("/events"));
  mock.dropStreams();
  mock.store.emit(id, { type: "browser-restarted" });
  expect(Number((await resumed).headers()["last-event-id"])).toBeGreaterThan(5);
  await page.getByTestId("timeline").getByText("The browser was closed and opened again").waitFor();
});

it("runs the terminal in its tab, reached by arrow keys", async () => {
  const { page } = await start();
  await connect(page, "codex");
  await page.getByTestId("tab-browser").focus();
  await page.keyboard.press("ArrowRight");
  const terminal = page.getByTestId("terminal");
  await page.locator('[data-testid="terminal"][data-view="connected"]').waitFor();
  await expect.poll(() => terminal.innerText()).toContain("Welcome to Codex");
  await page.getByTestId("enter-view").click();
  await page.keyboard.type("echoed");
  await expect.poll(() => terminal.innerText()).toContain("echoed");
  await page.keyboard.press("Control+Shift+.");
  const focused = await page.evaluate(
    () => (document.activeElement as HTMLElement).dataset["testid"],
  );
  expect(focused).toBe("enter-view");
});

it("carries text both ways between the clipboards", async () => {
  const { page, mock } = await start({
    ...DESK,
    permissions: ["clipboard-read", "clipboard-write"],
  });
  await connect(page, "codex");
  await page.getByTestId("clipboard").click();
  await page.getByLabel("From here into the private computer").fill("from here");
  await page.getByRole("button", { name: "Paste it there" }).click();
  await expect.poll(() => mock.clipboard()).toBe("from here");
  await expect.poll(() => mock.keys()).toBe(2); // Ctrl and V
  mock.copy("from there");
  await page.getByTestId("clipboard").click();
  await expect
    .poll(() => page.getByLabel("Copied in the private computer").inputValue())
    .toBe("from there");
  await page.getByRole("button", { name: "Copy to this computer" }).click();
  expect(await page.evaluate(() => navigator.clipboard.readText())).toBe("from there");
});

it("brings the person's clipboard along when Ctrl+V is pressed in the screen", async () => {
  const { page, mock } = await start({
    ...DESK,
    permissions: ["clipboard-read", "clipboard-write"],
  });
  await connect(page, "codex");
  await page.evaluate(() => navigator.clipboard.writeText("secret 日"));
  await page.locator('[data-testid="view-canvas-host"] canvas').click();
  await page.keyboard.press("Control+v");
  await expect.poll(() => mock.clipboard()).toBe("secret ?"); // without the extended clipboard RFB is Latin-1
});

it("cancels after asking once more", async () => {
  const { page } = await start();
  await connect(page, "codex");
  await page.getByTestId("cancel-session").click();
  await page.getByRole("button", { name: "Keep" }).click();
  await state(page, "awaiting-user");
  await page.getByTestId("cancel-session").click();
  await page.getByTestId("confirm").click();
  await page.getByTestId("ended-card").waitFor();
  await state(page, "cancelled");
});

it("says how to come in without a session, and lets a good link in once", async () => {
  const { page, mock } = await start();
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.getByRole("heading", { name: "Sign in to Vestibule" }).waitFor();
  await page.goto(`${mock.url}/#/login/used-up`);
  await page.getByText("This link does not work any more").waitFor();
  await page.goto(`${mock.url}/#/login/good`);
  await page.getByTestId("providers").waitFor();
  expect(page.url()).not.toContain("good");
});

it("removes a credential after asking", async () => {
  const { page, mock } = await start();
  await page.goto(`${mock.url}/#/credentials`);
  const row = page.getByTestId("credential-codex");
  await row.getByRole("button", { name: /Remove/ }).click();
  await page.getByTestId("confirm").click();
  await row.waitFor({ state: "detached" });
  expect(mock.store.credentials.map((c) => c.provider)).toEqual(["wrangler"]);
});

it("remembers the chosen colours before the first paint", async () => {
  const { page } = await start({ ...DESK, colorScheme: "light" });
  const theme = () => page.evaluate(() => document.documentElement.dataset["theme"] ?? "system");
  await page.getByRole("button", { name: /Colours/ }).click();
  await page.getByRole("button", { name: /Colours/ }).click();
  expect(await theme()).toBe("dark");
  await page.reload({ waitUntil: "commit" });
  await expect.poll(theme).toBe("dark");
});

it("is used from Connect to a running sign-in without a mouse", async () => {
  const { page } = await start();
  await page.getByTestId("connect-codex").waitFor();
  const focused = () => page.evaluate(() => document.activeElement?.textContent?.trim() ?? "");
  await page.keyboard.press("Tab");
  expect(await focused()).toBe("Skip to the page");
  await page.keyboard.press("Enter");
  expect(await page.evaluate(() => document.activeElement?.id)).toBe("main");
  const onConnect = () =>
    page.evaluate(
      () => (document.activeElement as HTMLElement).dataset["testid"] === "connect-codex",
    );
  for (let i = 0; i < 10 && !(await onConnect()); i++) await page.keyboard.press("Tab");
  expect(await onConnect()).toBe(true);
  await page.keyboard.press("Enter");
  await view(page, "connected");
  // The screen takes no focus by itself: Tab goes past it, to the end of the page and round again.
  const stops: string[] = [];
  for (let i = 0; i < 20; i++) {
    await page.keyboard.press("Tab");
    stops.push(await page.evaluate(() => document.activeElement?.tagName ?? ""));
  }
  expect(stops).not.toContain("CANVAS");
  expect(stops).toContain("BODY");
});

it("keeps nothing before the account was confirmed, and shows whose it is", async () => {
  const { page, mock } = await start();
  mock.store.confirm = true;
  const before = mock.store.credentials.length;
  await page.getByTestId("connect-claude").click();
  await state(page, "confirming");
  expect(await page.getByTestId("account").innerText()).toBe("ada@example.org");
  expect(mock.store.credentials.length).toBe(before);
  await page.getByTestId("confirm-yes").focus();
  await page.keyboard.press("Enter");
  await page.getByTestId("completed-card").waitFor();
  expect(mock.store.credentials.length).toBe(before + 1);
});

it("refuses an account that is not the right one", async () => {
  const { page, mock } = await start();
  mock.store.confirm = true;
  const before = mock.store.credentials.length;
  await page.getByTestId("connect-claude").click();
  await page.getByTestId("confirm-no").click();
  await page.getByTestId("confirm").click();
  await state(page, "cancelled");
  expect(mock.store.credentials.length).toBe(before);
});

it("shows who watches, and ends it for all of them", async () => {
  const { page } = await start();
  await connect(page, "codex");
  const viewers = page.getByTestId("viewers");
  await viewers.waitFor();
  expect(await viewers.innerText()).toContain("local uses the screen");
  await page.getByTestId("end-views").click();
  await viewers.waitFor({ state: "detached" });
  await view(page, "ended");
  expect(await page.locator("main").innerText()).toContain("ended the view");
});

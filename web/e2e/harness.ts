/** The built dashboard in a real Chromium against the mock, with every violation of its own rules collected. */
import { chromium, type Browser, type BrowserContextOptions, type Page } from "playwright-core";
import { startMock } from "../dev/mock/main.mjs";

export type Mock = Awaited<ReturnType<typeof startMock>>;

export const DESK: BrowserContextOptions = { viewport: { width: 1360, height: 820 } };
export const PHONE: BrowserContextOptions = {
  viewport: { width: 360, height: 740 },
  hasTouch: true,
  isMobile: true,
};

export function launch(): Promise<Browser> {
  const executablePath = process.env["CHROMIUM"] ?? "/usr/bin/chromium";
  return chromium.launch({ executablePath, args: ["--no-sandbox"] });
}

export interface Opened {
  page: Page;
  mock: Mock;
  /** Violations of the content security policy and uncaught errors so far. */
  wrong: string[];
  close: () => Promise<void>;
}

/** A page of its own with a mock of its own, whose sign-ins run `speed` times as fast as written. */
export async function open(
  browser: Browser,
  options: BrowserContextOptions = DESK,
  speed = 8,
): Promise<Opened> {
  const mock = await startMock(0, speed);
  const context = await browser.newContext({ reducedMotion: "reduce", ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(10_000);
  const wrong: string[] = [];
  page.on("pageerror", (error) => wrong.push(error.message));
  page.on("console", (message) => {
    if (message.text().includes("Content Security Policy")) wrong.push(message.text());
  });
  await page.goto(mock.url);
  const close = async () => {
    await context.close();
    mock.close();
  };
  return { page, mock, wrong, close };
}

/** Starts a sign-in and waits until its screen is there. */
export async function connect(page: Page, provider: string): Promise<string> {
  await page.getByTestId(`connect-${provider}`).click();
  await view(page, "connected");
  return page.url().split("/").at(-1) ?? "";
}

/** Waits until the screen's link is in this phase. */
export async function view(page: Page, phase: string): Promise<void> {
  await page.locator(`[data-testid="view-canvas-host"][data-view="${phase}"]`).waitFor();
}

export async function state(page: Page, name: string): Promise<void> {
  await page.locator(`[data-testid="session-state"][data-state="${name}"]`).waitFor();
}

/** Every page: accessible in both themes and on a phone, within its policy, and never wider than the screen. */
import { AxeBuilder } from "@axe-core/playwright";
import type { Browser, BrowserContextOptions } from "playwright-core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { uuid } from "../dev/mock/data.mjs";
import { connect, DESK, launch, open, PHONE, type Opened } from "./harness";

const PAGES: [string, string][] = [
  ["connect", "#/"],
  ["login", "#/login"],
  ["sign-ins", "#/sessions"],
  ["a completed sign-in", `#/sessions/${uuid(1)}`],
  ["a failed sign-in", `#/sessions/${uuid(2)}`],
  ["a cancelled sign-in", `#/sessions/${uuid(3)}`],
  ["a sign-in that is gone", `#/sessions/${uuid(999)}`],
  ["credentials", "#/credentials"],
  ["VMs", "#/machines"],
  ["a VM", `#/machines/${uuid(505)}`],
  ["images", "#/images"],
  ["status", "#/status"],
  ["no page", "#/nowhere"],
];

const LOOKS: [string, BrowserContextOptions][] = [
  ["light", { ...DESK, colorScheme: "light" }],
  ["dark", { ...DESK, colorScheme: "dark" }],
  ["phone", PHONE],
];

let browser: Browser;
beforeAll(async () => void (browser = await launch()));
afterAll(() => browser.close());

async function check({ page, wrong }: Opened): Promise<void> {
  // The canvas below <body> is noVNC's picture of the mouse pointer for touch screens.
  const { violations } = await new AxeBuilder({ page }).exclude("body > canvas").analyze();
  const found = violations.flatMap((v) => v.nodes.map((n) => `${v.id}: ${n.html}`));
  expect(found).toEqual([]);
  expect(wrong).toEqual([]);
  const wider = await page.evaluate(
    () => document.documentElement.scrollWidth - document.documentElement.clientWidth,
  );
  expect(wider).toBe(0);
}

describe.each(LOOKS)("%s", (_, options) => {
  let opened: Opened;
  beforeAll(async () => void (opened = await open(browser, options)));
  afterAll(() => opened.close());

  it.each(PAGES)("shows %s", async (_, hash) => {
    const { page, mock } = opened;
    await page.goto(`${mock.url}/${hash}`);
    await page.locator("main h1").waitFor();
    await page.waitForLoadState("networkidle").catch(() => {});
    await page.locator("main [role=status]", { hasText: "Loading" }).waitFor({ state: "detached" });
    await check(opened);
  });

  it("warns of VMs that are not jailed, and says what to do", async () => {
    const { page, mock } = opened;
    await page.goto(`${mock.url}/#/status`);
    const warning = page.getByRole("listitem").filter({ hasText: "Jail: warning" });
    await warning.getByText("run the controller as root").waitFor();
  });

  it("shows a host that is lost, and says what to do", async () => {
    const { page, mock } = opened;
    await page.goto(`${mock.url}/#/status`);
    const hosts = page.getByRole("region", { name: "Hosts" });
    const lost = hosts.getByRole("listitem").filter({ hasText: "Lost" });
    await lost.getByText("3 VMs may be left").waitFor();
    await lost.getByText("vestibule host forget").waitFor();
    await check(opened);
  });

  it("shows a running sign-in, its browser and its terminal", async () => {
    const { page, mock } = opened;
    await page.goto(`${mock.url}/#/`);
    await connect(page, "gh");
    await page.getByTestId("user-code").waitFor();
    await check(opened);
    await page.getByTestId("tab-terminal").click();
    await page.locator('[data-testid="terminal"][data-view="connected"]').waitFor();
    await check(opened);
  });
});

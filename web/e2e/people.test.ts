/** Who comes in, and what they see. */
import { AxeBuilder } from "@axe-core/playwright";
import type { Browser, Page } from "playwright-core";
import { afterAll, afterEach, beforeAll, expect, it } from "vitest";
import { connect, DESK, launch, open, PHONE, state, type Opened } from "./harness";

let browser: Browser;
let opened: Opened | null = null;
beforeAll(async () => void (browser = await launch()));
afterAll(() => browser.close());
afterEach(async () => {
  expect(opened?.wrong).toEqual([]);
  await opened?.close();
  opened = null;
});

/** A browser that nobody is signed in with. */
async function outside(options = DESK): Promise<Opened> {
  opened = await open(browser, options);
  opened.mock.store.signedIn = false;
  await opened.page.reload();
  await opened.page.getByLabel("Name").waitFor();
  return opened;
}

async function signIn(page: Page, name: string, password = "correct horse battery") {
  await page.getByLabel("Name").focus();
  await page.keyboard.type(name);
  await page.keyboard.press("Tab");
  await page.keyboard.type(password);
  await page.keyboard.press("Enter");
}

const links = (page: Page) => page.locator("#main-nav a").allInnerTexts();

it("lets a user in with the keyboard alone, shows what the role may do, and out again", async () => {
  const { page } = await outside();
  await signIn(page, "ada");
  await page.getByTestId("providers").waitFor();
  expect(await links(page)).toEqual(["Connect", "Sign-ins", "Credentials"]);
  expect(await page.locator("header").innerText()).toContain("ada");
  await page.goto(`${page.url().split("#")[0]}#/machines`);
  await page.getByTestId("not-yours").waitFor();
  await page.getByTestId("sign-out").click();
  await page.getByLabel("Password").waitFor();
  expect(await page.locator("header nav").count()).toBe(0);
});

it("says what is wrong, keeps the name and forgets the password", async () => {
  const { page } = await outside();
  await signIn(page, "ada", "not the password");
  expect(await page.getByRole("alert").innerText()).toContain("no such name with this password");
  expect(await page.getByLabel("Name").inputValue()).toBe("ada");
  expect(await page.getByLabel("Password").inputValue()).toBe("");
  expect(
    await page.getByLabel("Password").evaluate((field) => field === document.activeElement),
  ).toBe(true);
  await page.getByLabel("Name").fill("often");
  await page.getByLabel("Password").fill("whatever it is");
  await page.getByTestId("sign-in").click();
  await page.getByText("Too many attempts").waitFor();
});

it("leads to the organisation's own sign-in, and says what came of it", async () => {
  const { page, mock } = await outside();
  expect(await page.getByTestId("sign-in-elsewhere").count()).toBe(0);
  mock.store.elsewhere = { name: "Example" };
  mock.store.signInProblem = "unknown";
  await page.reload();
  await page.getByRole("link", { name: "Sign in with Example" }).click();
  await page.getByText("You are not known here yet.").waitFor();
  expect(page.url()).not.toContain("signIn");
  await page.reload();
  await page.getByTestId("sign-in-elsewhere").waitFor();
  expect(await page.getByRole("alert").count()).toBe(0);
  mock.store.signInProblem = null;
  await page.getByTestId("sign-in-elsewhere").click();
  await page.getByTestId("providers").waitFor();
  expect(await page.locator("header").innerText()).toContain("ada");
});

it("goes on to the page that was asked for", async () => {
  const { page } = await outside();
  await page.goto(`${page.url().split("#")[0]}#/credentials`);
  await signIn(page, "ada");
  await page.getByRole("heading", { name: "Credentials" }).waitFor();
});

it("tells a role that has no page", async () => {
  const { page } = await outside();
  await signIn(page, "carl");
  await page.getByTestId("not-yours").waitFor();
  expect(await page.getByTestId("not-yours").innerText()).toContain("whose role is consumer");
  expect(await links(page)).toEqual([]);
});

it.each([
  ["light", { ...DESK, colorScheme: "light" as const }],
  ["dark", { ...DESK, colorScheme: "dark" as const }],
  ["phone", PHONE],
])("is accessible where one signs in and confirms (%s)", async (_, options) => {
  const { page, mock } = await outside(options);
  const check = async () => {
    const { violations } = await new AxeBuilder({ page }).exclude("body > canvas").analyze();
    expect(violations.flatMap((v) => v.nodes.map((n) => `${v.id}: ${n.html}`))).toEqual([]);
    const wider = await page.evaluate(
      () => document.documentElement.scrollWidth - document.documentElement.clientWidth,
    );
    expect(wider).toBe(0);
  };
  await signIn(page, "ada", "not the password");
  await page.getByRole("alert").waitFor();
  await check();
  await page.getByLabel("Password").fill("correct horse battery");
  await page.getByTestId("sign-in").click();
  await page.getByTestId("providers").waitFor();
  mock.store.confirm = true;
  await connect(page, "claude");
  await page.getByTestId("viewers").waitFor();
  await state(page, "confirming");
  await page.getByTestId("confirm-account").waitFor();
  await check();
});

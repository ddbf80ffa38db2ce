/** Takes a picture of every page, light, dark and on a phone, against the mock: `npm run shots [directory] [filter]`. */
import { mkdir } from "node:fs/promises";
import { chromium } from "playwright-core";
import { uuid } from "./mock/data.mjs";
import { startMock } from "./mock/main.mjs";

const [out = "test-results/shots", only = ""] = process.argv.slice(2);
const PAGES = [
  ["connect", "#/"],
  ["sessions", "#/sessions"],
  ["completed", `#/sessions/${uuid(1)}`],
  ["failed", `#/sessions/${uuid(2)}`],
  ["cancelled", `#/sessions/${uuid(3)}`],
  ["gone", `#/sessions/${uuid(999)}`],
  ["credentials", "#/credentials"],
  ["machines", "#/machines"],
  ["machine", `#/machines/${uuid(505)}`],
  ["images", "#/images"],
  ["status", "#/status"],
  ["lost", "#/nowhere"],
  ["login", "#/login"],
  ["live", "gh"],
  ["waiting", "wrangler"],
  ["terminal", "codex"],
];
const LOOKS = [
  ["light", { colorScheme: "light", viewport: { width: 1360, height: 820 } }],
  ["dark", { colorScheme: "dark", viewport: { width: 1360, height: 820 } }],
  [
    "phone",
    { colorScheme: "light", viewport: { width: 360, height: 740 }, hasTouch: true, isMobile: true },
  ],
];

await mkdir(out, { recursive: true });
const mock = await startMock(0, 4);
const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: ["--no-sandbox"],
});
for (const [look, options] of LOOKS) {
  const context = await browser.newContext({ ...options, reducedMotion: "reduce" });
  const page = await context.newPage();
  page.on("console", (m) => m.type() === "error" && console.log(`${look}: ${m.text()}`));
  page.on("pageerror", (e) => console.log(`${look}: ${e.message}`));
  for (const [name, path] of PAGES) {
    if (!`${name}-${look}`.includes(only)) continue;
    await page.goto(mock.url);
    if (path.startsWith("#")) await page.goto(mock.url + "/" + path);
    else await page.getByTestId(`connect-${path}`).click();
    if (name === "live" || name === "terminal") {
      await page.locator('[data-testid="view-canvas-host"][data-view="connected"]').waitFor();
      await page.waitForTimeout(700);
    }
    if (name === "terminal") await page.getByTestId("tab-terminal").click();
    await page.waitForTimeout(500);
    await page.screenshot({
      path: `${out}/${name}-${look}.png`,
      fullPage: look === "phone" && path.startsWith("#"),
    });
  }
  await context.close();
}
await browser.close();
mock.close();

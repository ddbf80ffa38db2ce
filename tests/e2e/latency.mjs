// From a key in noVNC to the pixel that it changes, on the identity provider's login page. Prints one line of JSON.
import { chromium } from 'playwright-core';
import { click, control } from './screen.mjs';
import { Stage } from './stage.mjs';

const KEYS = 30;
const testid = (page, id) => page.locator(`[data-testid="${id}"]`);

/** Arms the page: the next key's event starts the clock, the first frame with a glyph more in the field stops it. */
const arm = (page) => page.evaluate(({ rgb }) => {
  const canvas = [...document.querySelectorAll('[data-testid="view-canvas-host"] canvas')]
    .sort((a, b) => b.width * b.height - a.width * a.height)[0];
  const context = canvas.getContext('2d', { willReadFrequently: true });
  const like = (d, i) => Math.abs(d[i] - rgb[0]) < 4 && Math.abs(d[i + 1] - rgb[1]) < 4 && Math.abs(d[i + 2] - rgb[2]) < 4;
  if (!window.field) {
    // The box of the field, found once: reading the whole canvas takes longer than what is measured.
    const { data, width } = context.getImageData(0, 0, canvas.width, canvas.height);
    let left = Infinity, right = -1, top = Infinity, bottom = -1;
    for (let i = 0; i < data.length; i += 4) {
      if (!like(data, i)) continue;
      const x = (i / 4) % width, y = Math.floor(i / 4 / width);
      left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
    }
    window.field = [left, top, right - left + 1, bottom - top + 1];
  }
  const ink = () => {
    const { data } = context.getImageData(...window.field);
    let count = 0;
    for (let i = 0; i < data.length; i += 4) if (!like(data, i)) count += 1;
    return count;
  };
  const before = ink();
  window.measured = new Promise((resolve, reject) => {
    addEventListener('keydown', () => {
      const begun = performance.now();
      const look = () => {
        // A caret that blinks is a line of one or two pixels; a glyph of 28 px has more.
        if (ink() > before + 70) return resolve(performance.now() - begun);
        if (performance.now() - begun > 20_000) return reject(new Error('the key showed nothing within 20 s'));
        return requestAnimationFrame(look);
      };
      requestAnimationFrame(look);
    }, { once: true, capture: true });
  });
}, { rgb: [0xb8, 0xd8, 0xff] });

const stage = await Stage.start('browser');
const browser = await chromium.launch({ executablePath: '/usr/bin/chromium', args: ['--no-sandbox'] });
try {
  const page = await browser.newPage({ viewport: { width: 1440, height: 1000 }, baseURL: new URL(stage.link).origin });
  await page.goto(stage.link);
  await testid(page, 'connect-oidc').click({ timeout: 30_000 });
  await page.locator('[data-testid="view-canvas-host"][data-view="connected"]').waitFor({ timeout: 600_000 });
  await control(page, 'login', { limit: 600_000 });
  await click(page, 'login');
  const milliseconds = [];
  for (let i = 0; i < KEYS; i += 1) {
    // What the last key caused has come to rest.
    await page.waitForTimeout(700);
    if (i > 0 && i % 10 === 0) {
      // The field is 420 px wide: empty it before its text moves.
      for (let n = 0; n < 10; n += 1) await page.keyboard.press('Backspace');
      await page.waitForTimeout(1500);
    }
    await arm(page);
    await page.keyboard.press('m');
    milliseconds.push(await page.evaluate(() => window.measured));
  }
  console.log(JSON.stringify({ milliseconds }));
} finally {
  await browser.close();
  await stage.end();
}

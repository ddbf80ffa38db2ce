// The live view as a person uses it: looks at the pixels of noVNC's canvas, clicks and types on it. The identity
// provider's pages have controls in colours of their own (tests/idp/pages.mjs).
import assert from 'node:assert/strict';
import { setTimeout as pause } from 'node:timers/promises';

export const colours = { login: [0xb8, 0xd8, 0xff], password: [0xff, 0xd9, 0xa0], allow: [0x12, 0x7a, 0x3c], deny: [0xa3, 0x22, 0x2d] };
const canvas = '[data-testid="view-canvas-host"] canvas';

/** The middle of the box around all pixels of a colour, in the page's coordinates, and how many there are. */
const find = (page, rgb) => page.evaluate(({ canvas, rgb }) => {
  const element = [...document.querySelectorAll(canvas)].sort((a, b) => b.width * b.height - a.width * a.height)[0];
  if (!element?.width) return null;
  const { data, width } = element.getContext('2d').getImageData(0, 0, element.width, element.height);
  let count = 0, left = Infinity, right = -1, top = Infinity, bottom = -1;
  for (let i = 0; i < data.length; i += 4) {
    if (rgb.some((channel, c) => Math.abs(data[i + c] - channel) > 3)) continue;
    const x = (i / 4) % width, y = Math.floor(i / 4 / width);
    count += 1;
    left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
  }
  if (count < 1500) return null;
  const box = element.getBoundingClientRect();
  const scale = box.width / element.width;
  return { x: box.left + ((left + right) / 2) * scale, y: box.top + ((top + bottom) / 2) * scale, count };
}, { canvas, rgb });

/** Waits until a control of this colour is on the screen, is `where` it should be, and stays there. */
export async function control(page, name, { limit = 180_000, where = () => true } = {}) {
  const end = Date.now() + limit;
  let last = null;
  for (;;) {
    const found = await find(page, colours[name]);
    if (found && where(found) && last && found.x === last.x && found.y === last.y && found.count === last.count) return found;
    assert.ok(Date.now() < end, `no control \`${name}\` on the screen within ${limit / 1000} s`);
    last = found;
    await pause(300);
  }
}

export async function click(page, name) {
  const { x, y } = await control(page, name);
  await page.mouse.click(x, y, { delay: 60 });
}

/** Types on the canvas, at the pace of a quick person. */
export const type = (page, text) => page.keyboard.type(text, { delay: 60 });

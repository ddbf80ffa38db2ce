// Proof 1 and 2: a person opens the dashboard, connects, signs in through the live view, and the vault holds what the
// tool wrote; one controller is killed meanwhile. Then two sign-ins come to nothing after the password was typed. Playwright
// drives the dashboard's browser only; what it does in the VM goes through noVNC's canvas.
//
//   node sign-in.mjs [wrangler] [oidc] [cancelled] [killed]      screenshots in target/e2e/<name>/
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { chromium } from 'playwright-core';
import { parse } from 'smol-toml';
import { click, control, type } from './screen.mjs';
import { Stage, root } from './stage.mjs';

const view = '[data-testid="view-canvas-host"]';
const testid = (page, id) => page.locator(`[data-testid="${id}"]`);
const minutes = 60_000;

/** Keeps a numbered screenshot of each step. */
async function album(page, provider) {
  const dir = path.join(root, 'target/e2e', provider);
  await rm(dir, { recursive: true, force: true });
  await mkdir(dir, { recursive: true });
  let number = 0;
  return async (step) => {
    number += 1;
    await page.screenshot({ path: path.join(dir, `${String(number).padStart(2, '0')}-${step}.png`) });
  };
}

async function reaches(page, state, limit) {
  const seen = testid(page, 'session-state');
  const wanted = page.locator(`[data-testid="session-state"][data-state="${state}"]`);
  const failed = testid(page, 'failure-card');
  await wanted.or(failed).first().waitFor({ state: 'attached', timeout: limit });
  if (await failed.count()) {
    throw new Error(`the session failed (${await failed.getAttribute('data-cause')}): ${await failed.innerText()}`);
  }
  assert.equal(await seen.getAttribute('data-state'), state);
}

/** Login and password, typed on the canvas; the identity provider's next page is the caller's to look for. */
async function typeLogin(page, login, password) {
  await click(page, 'login');
  await type(page, login);
  await click(page, 'password');
  await type(page, password);
}

/** What the person's clipboard holds when they paste it. */
const clipboard = `clip-${randomBytes(16).toString('hex')}`;

async function paste(page) {
  await click(page, 'password');
  await testid(page, 'clipboard').click();
  await page.locator('#clipboard-send').fill(clipboard);
  await page.getByRole('button', { name: 'Paste it there' }).click();
}

/** What was typed, pasted, shown and given, and nobody may find, by name. */
async function secrets(stage) {
  const { codes, cookies, page } = await stage.secrets();
  assert.ok(cookies.length > 0, 'the identity provider gave cookies');
  const words = { password: stage.password, clipboard, page };
  codes.forEach((code, i) => { words[`code ${i}`] = code; });
  cookies.forEach((cookie, i) => { words[`cookie ${i}`] = cookie; });
  return words;
}

/** Nothing of it is in a file that Vestibule can write, in shared memory, or in the memory of a process of its. */
async function nowhere(stage, words) {
  const hits = await stage.scan(words);
  assert.deepEqual(hits, [], `secrets lie about: ${JSON.stringify(hits)}`);
  console.log(`  ${Object.keys(words).length} secrets looked for, none found`);
}

/** As little is left as of any sign-in, but in the sealed record. Asked for before anybody fetches the credential. */
async function leakless(stage) {
  const issued = (await stage.issued()).at(-1);
  const words = await secrets(stage);
  assert.ok('code 0' in words, 'the identity provider gave codes');
  for (const key of ['access_token', 'refresh_token', 'id_token']) if (issued[key]) words[key] = issued[key];
  await nowhere(stage, words);
  // The same scan sees one that does lie about.
  const planted = path.join(stage.home, 'evidence', 'planted');
  await writeFile(planted, `x${Buffer.from(`??${issued.access_token}`).toString('base64')}`);
  const seen = await stage.scan(words);
  await rm(planted);
  assert.deepEqual(seen.map(({ canary }) => canary), ['access_token'], 'the scan finds what is there');
}

/** A wrong password: the provider's page comes again, with a line above its fields, and nothing else happens. */
async function mistype(page, stage, shot) {
  const { y } = await control(page, 'login');
  await paste(page);
  await typeLogin(page, stage.login, 'not the password');
  await page.keyboard.press('Enter');
  await control(page, 'login', { where: (found) => found.y > y + 10 });
  await shot('wrong-password');
  assert.equal(await testid(page, 'session-state').getAttribute('data-state'), 'awaiting-user');
}

/** The controller dies while the person looks at the screen: the view comes back by itself, with the page as it was. */
async function controllerDies(page, stage, shot) {
  await page.evaluate((view) => {
    const host = document.querySelector(view);
    window.phases = [];
    new MutationObserver(() => window.phases.push(host.dataset.view)).observe(host, { attributeFilter: ['data-view'] });
  }, view);
  const before = stage.pid;
  await stage.crash();
  assert.notEqual(stage.pid, before, 'another controller serves');
  const end = Date.now() + minutes;
  for (;;) {
    // Gone where the page was loaded anew.
    const phases = await page.evaluate(() => window.phases);
    if (phases.includes('reconnecting') && phases.at(-1) === 'connected') break;
    assert.ok(Date.now() < end, `the view does not come back: ${phases}`);
    await pause(100);
  }
  await control(page, 'login');
  await shot('another-controller');
  assert.equal(await testid(page, 'session-state').getAttribute('data-state'), 'awaiting-user');
}

/** From Connect to the login page on the screen. */
async function connect(page, provider, shot) {
  await testid(page, `connect-${provider}`).waitFor({ timeout: 30_000 });
  await shot('providers');
  await testid(page, `connect-${provider}`).click();
  await testid(page, 'timeline').waitFor({ timeout: 30_000 });
  await shot('starting');
  await reaches(page, 'awaiting-user', 10 * minutes);
  await page.locator(`${view}[data-view="connected"]`).waitFor({ timeout: 2 * minutes });
  await control(page, 'login');
  await shot('login-page');
}

/** From Connect to Completed, as a person does it; gives the credential's id. */
async function signIn(page, stage, provider) {
  const shot = await album(page, provider);
  await connect(page, provider, shot);
  // Of these two, the one that does not wait for its person two minutes only.
  if (provider === 'oidc') {
    await mistype(page, stage, shot);
    await controllerDies(page, stage, shot);
  }
  await typeLogin(page, stage.login, stage.password);
  await shot('typed');
  await page.keyboard.press('Enter');
  await control(page, 'deny');
  await shot('consent-page');
  await click(page, 'allow');
  await testid(page, 'completed-card').waitFor({ timeout: 4 * minutes });
  await shot('completed');
  const command = await testid(page, 'credential-command').innerText();
  const id = command.match(/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/)?.[0];
  assert.ok(id, `the completed card names the credential: ${command}`);
  return id;
}

/** What a person had typed, pasted and been shown is gone, too, when their sign-in comes to nothing. */
async function abandoned(page, stage, how) {
  const shot = await album(page, how);
  await connect(page, 'oidc', shot);
  await mistype(page, stage, shot);
  await typeLogin(page, stage.login, stage.password);
  await page.keyboard.press('Enter');
  await control(page, 'deny');
  await shot('consent-page');
  if (how === 'cancelled') {
    await testid(page, 'cancel-session').click();
    await page.locator('dialog[open] [data-testid="confirm"]').click();
    await page.locator('[data-testid="session-state"][data-state="cancelled"]').waitFor({ state: 'attached', timeout: minutes });
  } else {
    await stage.killRunner();
    await testid(page, 'failure-card').waitFor({ timeout: minutes });
  }
  await shot(how);
  await nothingLeft(stage);
  await nowhere(stage, await secrets(stage));
}

/** What `vestibule credential get` wrote, and that only its owner can read it. */
async function restored(stage, id, file) {
  const into = path.join(stage.home, 'restored');
  await mkdir(into, { recursive: true });
  await stage.vestibule('credential', 'get', id, '--into', into);
  const at = path.join(into, file);
  assert.equal((await stat(at)).mode & 0o777, 0o600, 'the restored file is 0600');
  return readFile(at);
}

/**
 * The vault's bytes are the file that wrangler wrote: everything in it but the time of expiry comes from the identity
 * provider's answer, and rendering that as wrangler does gives the same bytes.
 */
async function checkWrangler(stage, id) {
  const bytes = await restored(stage, id, '.config/.wrangler/config/default.toml');
  const issued = (await stage.issued()).at(-1);
  const { expiration_time: expiry, scopes } = parse(bytes.toString('utf8'));
  assert.equal([...scopes, 'offline_access'].sort().join(' '), [...new Set([...issued.scope.split(' '), 'offline_access'])].sort().join(' '));
  const left = Date.parse(expiry) - Date.now();
  assert.ok(left > 0 && left <= 3600_000, `it expires within the hour that the issuer gave: ${expiry}`);
  const text = `oauth_token = "${issued.access_token}"\nexpiration_time = "${expiry}"\nrefresh_token = "${issued.refresh_token}"\n`
    + `scopes = [ ${scopes.map((scope) => `"${scope}"`).join(', ')} ]\n`;
  assert.equal(bytes.toString('utf8'), text, 'the vault holds the bytes that wrangler writes for these tokens');
  return bytes;
}

async function checkOidc(stage, id) {
  const stored = JSON.parse(await restored(stage, id, '.config/vestibule/oidc.json'));
  const issued = (await stage.issued()).at(-1);
  for (const key of ['access_token', 'refresh_token', 'id_token', 'scope']) {
    assert.equal(stored[key], issued[key], `${key} is the one that the issuer gave`);
  }
  // RFC 6749 section 5.1: its case says nothing.
  assert.equal(stored.token_type.toLowerCase(), issued.token_type.toLowerCase());
  assert.equal(stored.issuer, stage.issuer.replace(/\/$/, ''));
  assert.equal(stored.client_id, stage.client);
}

/** The tool itself accepts the restored file, in a fresh VM that belongs to no session. */
async function toolAccepts(stage, bytes) {
  const id = (await stage.vestibule('vm', 'run', 'browser-test')).match(/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/)?.[0];
  assert.ok(id, 'vm run prints the id');
  try {
    const script = 'mkdir -p ~/.config/.wrangler/config && echo "$1" | base64 -d > ~/.config/.wrangler/config/default.toml'
      + ' && wrangler auth token --json';
    const said = await stage.vestibule('vm', 'exec', '--person', '--timeout', '240', id, '--', 'bash', '-c', script, 'restore', bytes.toString('base64'));
    const token = JSON.parse(said.slice(said.indexOf('{'))).token;
    assert.equal(token, (await stage.issued()).at(-1).access_token, 'wrangler reads the token that the issuer gave');
  } finally {
    await stage.vestibule('vm', 'stop', id);
  }
}

/** Nothing of the VM is left, level-triggered: disposal goes on for a moment after *Completed*. */
async function nothingLeft(stage) {
  const end = Date.now() + 2 * minutes;
  for (;;) {
    const left = await stage.residue();
    if (left.length === 0) return;
    assert.ok(Date.now() < end, `still there: ${left.join('; ')}`);
    await pause(500);
  }
}

/** A sign-in that comes to a good end, and what the vault has of it. */
async function completed(page, stage, provider) {
  const id = await signIn(page, stage, provider);
  await nothingLeft(stage);
  await leakless(stage);
  const bytes = provider === 'wrangler' ? await checkWrangler(stage, id) : await checkOidc(stage, id);
  await nothingLeft(stage);
  if (bytes) await toolAccepts(stage, bytes);
  await nothingLeft(stage);
}

async function main(names) {
  const stage = await Stage.start('browser-test');
  const browser = await chromium.launch({ executablePath: '/usr/bin/chromium', args: ['--no-sandbox'] });
  let passed = 0, failed = 0;
  try {
    const page = await browser.newPage({ viewport: { width: 1440, height: 1000 }, baseURL: new URL(stage.link).origin });
    await page.goto(stage.link);
    for (const name of names) {
      const begin = Date.now();
      try {
        await (['cancelled', 'killed'].includes(name) ? abandoned : completed)(page, stage, name);
        passed += 1;
        console.log(`${name}: ok, ${((Date.now() - begin) / 1000).toFixed(1)} s`);
      } catch (error) {
        failed += 1;
        console.log(`${name}: FAILED after ${((Date.now() - begin) / 1000).toFixed(1)} s: ${error.stack}`);
        await page.screenshot({ path: path.join(root, 'target/e2e', name, '99-failed.png') }).catch(() => {});
      }
      await page.goto('/');
    }
  } finally {
    await browser.close();
    await stage.end();
  }
  console.log(`${passed} passed, ${failed} failed`);
  return failed === 0 ? 0 : 1;
}

process.exitCode = await main(process.argv.length > 2 ? process.argv.slice(2) : ['wrangler', 'oidc', 'cancelled', 'killed']);

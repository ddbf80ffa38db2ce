// Somebody opens the dashboard of a real controller, signs in at a real identity provider, and is who they are there: a real
// browser follows every redirect. No VM is needed.
//
//   node dashboard-login.mjs      screenshots in target/e2e/dashboard-login/
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as pause } from 'node:timers/promises';
import { chromium } from 'playwright-core';
import { root } from './stage.mjs';

const program = process.env.VESTIBULE_BIN ?? path.join(root, 'target/debug/vestibule');
const secret = 'a secret of the dashboard';
const pictures = path.join(root, 'target/e2e/dashboard-login');

/** A port that is free now. */
async function freePort() {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address();
  server.close();
  await once(server, 'close');
  return port;
}

async function serve(home) {
  const child = spawn(program, ['--home', home, 'serve'], { stdio: ['ignore', 'ignore', 'inherit'] });
  const ended = once(child, 'exit');
  for (let tries = 0; ; tries += 1) {
    const token = await readFile(path.join(home, 'token'), 'utf8').catch(() => '');
    const address = await readFile(path.join(home, 'address'), 'utf8').catch(() => '');
    if (token && address) return { child, ended, token: token.trim() };
    assert(child.exitCode === null && tries < 300, 'the controller does not serve');
    await pause(100);
  }
}

const port = await freePort();
const base = `http://127.0.0.1:${port}`;
const idp = spawn('node', ['idp.mjs', '--host', '127.0.0.1', '--dashboard', base, '--secret', secret],
  { cwd: path.join(root, 'tests/idp'), stdio: ['ignore', 'pipe', 'inherit'] });
const home = await mkdtemp(path.join(tmpdir(), 'vt-'));
let controller;
let browser;
try {
  const [line] = await once(createInterface({ input: idp.stdout }), 'line');
  const { issuer, password } = JSON.parse(line);
  await writeFile(path.join(home, 'secret'), secret, { mode: 0o600 });
  await writeFile(path.join(home, 'vestibule.toml'), `listen = "127.0.0.1:${port}"
[oidc]
issuer = "${issuer}"
client_id = "dashboard"
client_secret_file = "${home}/secret"
name = "Example"
`);
  controller = await serve(home);
  const api = async (method, where, body) => {
    const reply = await fetch(base + where, {
      method,
      headers: { authorization: `Bearer ${controller.token}`, 'content-type': 'application/json' },
      body: body && JSON.stringify(body),
    });
    assert(reply.ok, `${method} ${where}: ${reply.status}`);
  };

  await rm(pictures, { recursive: true, force: true });
  await mkdir(pictures, { recursive: true });
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: ['--no-sandbox'] });
  const page = await browser.newPage({ viewport: { width: 390, height: 844 } });
  page.setDefaultTimeout(60_000);
  const shoot = (name) => page.screenshot({ path: path.join(pictures, `${name}.png`) });
  const signIn = async () => {
    await page.goto(base);
    await page.getByRole('link', { name: 'Sign in with Example' }).click();
  };

  // Nobody has made this user yet.
  await signIn();
  await page.getByLabel('Login').fill('alice');
  await page.getByLabel('Password').fill(password);
  await shoot('1-identity-provider');
  await page.getByRole('button', { name: 'Sign in' }).click();
  await page.getByRole('button', { name: 'Allow' }).click();
  await page.getByText('You are not known here yet.').waitFor();
  await shoot('2-not-known');

  await api('POST', '/api/users', { name: 'alice@example.test', role: 'signer' });
  await signIn();
  await page.getByTestId('providers').waitFor();
  await page.getByText('alice@example.test').first().waitFor({ state: 'attached' });
  await shoot('3-signed-in');
  assert.equal(new URL(page.url()).search, '');
  const cookies = (await page.context().cookies(base)).map(({ name, httpOnly, sameSite }) => ({ name, httpOnly, sameSite }));
  const own = cookies.filter(({ name }) => name.startsWith('vestibule'));
  assert.deepEqual(own, [{ name: `vestibule-${port}`, httpOnly: true, sameSite: 'Strict' }]);

  await page.setViewportSize({ width: 1280, height: 800 });
  await page.getByTestId('sign-out').click();
  await page.getByRole('link', { name: 'Sign in with Example' }).waitFor();
  await shoot('4-signed-out');
  process.stdout.write('1 passed, 0 failed, 0 skipped\n');
} finally {
  await browser?.close();
  controller?.child.kill('SIGTERM');
  await controller?.ended;
  idp.kill('SIGTERM');
  await rm(home, { recursive: true, force: true });
}

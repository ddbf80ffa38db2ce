// The identity provider of the end-to-end tests: the real, certified npm oidc-provider, with a login and a consent page
// that mouse and keyboard can drive. Nothing of it is a stand-in; only the people are made up.
//
//   node idp.mjs --host idp.test [--port 0] [--dashboard http://127.0.0.1:4000 --secret TEXT]
//
// Prints one line of JSON when it listens: {"issuer", "address", "control", "password"}. `issuer` is what a guest is told,
// `address` where the test's egress proxy maps that host to, `password` the account's, made for this run; `control` is for
// the test alone:
//   GET control/issued    every token response so far (they open nothing but this server)
//   GET control/secrets   every authorization code and cookie so far, and the word that its pages hold
//   GET control/seen      every request so far: method, path, status
//   POST control/slow?ms=N   the token endpoint answers so much later
import { randomBytes } from 'node:crypto';
import { createServer } from 'node:http';
import { once } from 'node:events';
import { setTimeout as pause } from 'node:timers/promises';
import { Provider } from 'oidc-provider';
import { canary, consentPage, loginPage, messagePage } from './pages.mjs';

const option = (name, fallback) => {
  const at = process.argv.indexOf(`--${name}`);
  return at < 0 ? fallback : process.argv[at + 1];
};

const password = `horse ${randomBytes(8).toString('hex')}`;
const people = new Map([['alice', { password, email: 'alice@example.test' }]]);
const issued = [];
const seen = [];
const secrets = { codes: [], cookies: [] };
let slow = 0;

/** A public client (RFC 8252) with one redirect URI. */
const client = (id, name, redirect) => ({
  client_id: id,
  client_name: name,
  redirect_uris: [redirect],
  token_endpoint_auth_method: 'none',
  application_type: 'native',
  grant_types: ['authorization_code', 'refresh_token'],
  response_types: ['code'],
});

/** Vestibule's own dashboard: a confidential client. */
const dashboard = (base) => ({
  client_id: 'dashboard',
  client_name: 'Vestibule',
  client_secret: option('secret'),
  redirect_uris: [`${base}/api/login/oidc/callback`],
  grant_types: ['authorization_code'],
  response_types: ['code'],
  token_endpoint_auth_method: 'client_secret_basic',
});

const configuration = {
  clients: [
    ...[option('dashboard')].filter(Boolean).map(dashboard),
    client('54d11594-84e4-41aa-b438-e81b8fa78ee7', 'Wrangler', 'http://localhost:8976/oauth/callback'),
    client('vestibule', 'Vestibule', 'http://127.0.0.1:8080/auth/callback'),
  ],
  scopes: ['openid', 'offline_access', 'profile', 'email', 'account:read', 'user:read', 'workers:write',
    'workers_kv:write', 'workers_routes:write', 'workers_scripts:write', 'workers_tail:read', 'd1:write',
    'pages:write', 'zone:read'],
  claims: { openid: ['sub'], email: ['email', 'email_verified'], profile: ['name'] },
  // The ID token itself carries the account's name, as most issuers' do.
  conformIdTokenClaims: false,
  pkce: { required: () => true },
  issueRefreshToken: (_ctx, client) => client.grantTypeAllowed('refresh_token'),
  interactions: { url: (_ctx, interaction) => `/interaction/${interaction.uid}` },
  features: { devInteractions: { enabled: false }, revocation: { enabled: true } },
  findAccount: (_ctx, id) => people.has(id) && {
    accountId: id,
    claims: () => ({ sub: id, name: 'Alice', email: people.get(id).email, email_verified: true }),
  },
  ttl: { AccessToken: 3600, AuthorizationCode: 60, IdToken: 3600, Interaction: 3600, Session: 3600, Grant: 86400, RefreshToken: 86400 },
};

const send = (res, status, type, body) => {
  res.writeHead(status, { 'content-type': type, 'cache-control': 'no-store' });
  res.end(body);
};

const readForm = async (req) => {
  let text = '';
  for await (const chunk of req) {
    text += chunk;
    if (text.length > 65536) throw new Error('the form is too large');
  }
  return new URLSearchParams(text);
};

/** Finishes a login when name and password are right; else shows the page again. */
async function login(provider, req, res, uid) {
  const form = await readForm(req);
  const person = people.get(form.get('login'));
  if (person?.password !== form.get('password')) {
    return send(res, 200, 'text/html; charset=utf-8', loginPage(uid, 'Login or password is wrong'));
  }
  return provider.interactionFinished(req, res, { login: { accountId: form.get('login') } });
}

/** Grants what is missing, or reports that the person denied it. */
async function consent(provider, req, res, details) {
  const form = await readForm(req);
  if (form.get('decision') !== 'allow') {
    const denied = { error: 'access_denied', error_description: 'the person denied consent' };
    return provider.interactionFinished(req, res, denied, { mergeWithLastSubmission: false });
  }
  const { grantId, params, session, prompt } = details;
  const grant = (grantId && await provider.Grant.find(grantId))
    || new provider.Grant({ accountId: session.accountId, clientId: params.client_id });
  if (prompt.details.missingOIDCScope) grant.addOIDCScope(prompt.details.missingOIDCScope.join(' '));
  if (prompt.details.missingOIDCClaims) grant.addOIDCClaims(prompt.details.missingOIDCClaims);
  return provider.interactionFinished(req, res, { consent: { grantId: await grant.save() } }, { mergeWithLastSubmission: true });
}

async function interact(provider, req, res) {
  const details = await provider.interactionDetails(req, res);
  const { uid, prompt, params } = details;
  if (req.method === 'POST') {
    return prompt.name === 'login' ? login(provider, req, res, uid) : consent(provider, req, res, details);
  }
  const page = prompt.name === 'login' ? loginPage(uid, '') : consentPage(uid, params);
  return send(res, 200, 'text/html; charset=utf-8', page);
}

/** A server on a free or given loopback port. */
async function listen(port, handler) {
  const server = createServer((req, res) => {
    Promise.resolve(handler(req, res)).catch((error) => {
      process.stderr.write(`${req.method} ${req.url?.split('?')[0]}: ${error.message}\n`);
      if (!res.headersSent) send(res, 400, 'text/html; charset=utf-8', messagePage(error.message));
    });
  });
  server.listen(port, '127.0.0.1');
  await once(server, 'listening');
  return server;
}

/** What a reply gives to this one sign-in alone. */
function noteSecrets(res) {
  const code = /[?&]code=([^&]+)/.exec(res.getHeader('location') ?? '')?.[1];
  if (code) secrets.codes.push(decodeURIComponent(code));
  for (const cookie of [res.getHeader('set-cookie') ?? []].flat()) {
    const value = /^[^=]+=([^;]+)/.exec(cookie)?.[1];
    if (value) secrets.cookies.push(value);
  }
}

let provider;
const server = await listen(Number(option('port', '0')), async (req, res) => {
  const path = req.url.split('?')[0];
  res.on('finish', () => noteSecrets(res));
  res.on('finish', () => seen.push({ method: req.method, path, status: res.statusCode }));
  if (path === '/token' && slow > 0) await pause(slow);
  if (path.startsWith('/interaction/')) return interact(provider, req, res);
  return provider.callback()(req, res);
});
const { port } = server.address();
const issuer = `http://${option('host', 'idp.test')}:${port}`;
provider = new Provider(issuer, configuration);
provider.on('grant.success', (ctx) => issued.push({ client: ctx.oidc.client.clientId, ...ctx.body }));
provider.on('server_error', (_ctx, error) => process.stderr.write(`server_error: ${error.stack}\n`));

const control = await listen(0, (req, res) => {
  const url = new URL(req.url, 'http://control');
  const json = (value) => send(res, 200, 'application/json', JSON.stringify(value));
  if (url.pathname === '/issued') return json(issued);
  if (url.pathname === '/secrets') return json({ ...secrets, page: canary });
  if (url.pathname === '/seen') return json(seen);
  if (url.pathname === '/slow' && req.method === 'POST') {
    slow = Math.min(Number(url.searchParams.get('ms')) || 0, 600_000);
    return json({ slow });
  }
  return send(res, 404, 'text/plain', 'no such thing');
});

process.stdout.write(`${JSON.stringify({
  issuer, address: `127.0.0.1:${port}`, control: `http://127.0.0.1:${control.address().port}`, password,
})}\n`);

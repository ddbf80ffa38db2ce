// The pages of the test's identity provider: large controls in colours of their own, so that a test that only sees
// pixels finds them, and the focus where a person would type first.
import { randomBytes } from 'node:crypto';

const style = `html{background:#f4efe1;color:#222;font:24px sans-serif}body{margin:24px}h1{font-size:32px;margin:0 0 16px}
label{display:block;margin:8px 0}input{font:28px monospace;padding:8px;width:420px;display:block}
.login{background:#b8d8ff}.password{background:#ffd9a0}
button{font:28px sans-serif;color:#fff;border:0;padding:16px 56px;margin:16px 24px 0 0}
.allow{background:#127a3c}.deny{background:#a3222d}.problem{color:#a3222d;font-weight:bold}`;

const escape = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

/** A word that stands in every page and is nowhere else. */
export const canary = `page-${randomBytes(16).toString('hex')}`;

const page = (title, body) => `<!doctype html><html lang="en"><meta charset="utf-8"><title>${escape(title)}</title>
<style>${style}</style><h1>${escape(title)}</h1>${body}<p hidden>${canary}</p>`;

export const messagePage = (text) => page(text, '');

export const loginPage = (uid, problem) => page('Sign in', `
<form method="post" action="/interaction/${escape(uid)}" autocomplete="off">
${problem ? `<p class="problem" role="alert">${escape(problem)}</p>` : ''}
<label>Login<input class="login" name="login" autofocus autocapitalize="none" spellcheck="false"></label>
<label>Password<input class="password" name="password" type="password"></label>
<button class="allow">Sign in</button></form>`);

export const consentPage = (uid, params) => page('Allow access?', `
<p>${escape(params.client_id)} asks for: ${escape(params.scope ?? '')}</p>
<form method="post" action="/interaction/${escape(uid)}">
<button class="allow" name="decision" value="allow" autofocus>Allow</button>
<button class="deny" name="decision" value="deny">Deny</button></form>`);

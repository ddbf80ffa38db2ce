// Runs in the guest, by its own node: says what in the browser's profile looks random, a line each: the file, where in it (for
// JSON), the text. What looks so: a GUID, also with underscores; 12 characters or more of hexadecimal, or of base64 that change
// between digits, small letters and capitals more often than words do; a number of more digits than Chromium's times, which
// have 17; the whole of a tiny file that is no text.
const fs = require("node:fs");
const path = require("node:path");
const profile = process.argv[2];
// Beyond this there are only caches and counters.
const SMALL = 256 << 10;
const TINY = 64;

const kind = (char) => (/\d/.test(char) ? 0 : /[a-z]/.test(char) ? 1 : /[A-Z]/.test(char) ? 2 : 3);
const looksRandom = (text) => {
  if (/^\d+$/.test(text)) return text.length > 17;
  if (!/\d/.test(text)) return false;
  if (/^([0-9a-f]+|[0-9A-F]+)$/.test(text)) return true;
  let changes = 0;
  for (let at = 1; at < text.length; at++) if (kind(text[at]) !== kind(text[at - 1])) changes++;
  return changes * 20 > text.length * 9;
};
const GUID = /[0-9a-f]{8}([-_])[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{12}/gi;
const said = new Set();
const look = (file, where, text) => {
  const rest = text.replace(GUID, (guid) => (say(file, where, guid), " "));
  for (const [token] of rest.matchAll(/[A-Za-z0-9+/=]{12,}/g)) if (looksRandom(token)) say(file, where, token);
};
const say = (file, where, text) => {
  const line = [file, where, text].join("\t");
  if (!said.has(line)) console.log(line);
  said.add(line);
};
const walk = (file, where, value) => {
  if (typeof value === "string") look(file, where, value);
  if (typeof value === "number") look(file, where, String(value));
  if (value === null || typeof value !== "object") return;
  for (const [name, inner] of Object.entries(value)) {
    look(file, where, name);
    walk(file, `${where}/${name}`, inner);
  }
};
for (const name of fs.readdirSync(profile, { recursive: true })) {
  const file = path.join(profile, name);
  let text;
  try {
    const stat = fs.lstatSync(file);
    if (stat.isSymbolicLink()) text = fs.readlinkSync(file);
    else if (stat.isFile() && stat.size <= SMALL) text = fs.readFileSync(file, "latin1");
    else continue;
  } catch {
    continue; // The browser has removed it meanwhile.
  }
  // LevelDB's begin with a checksum and counters.
  if (text.length <= TINY && !/(MANIFEST-\d+|\.log)$/.test(name) && /[^\t-\r -~]/.test(text)) {
    say(name, "", Buffer.from(text, "latin1").toString("hex"));
    continue;
  }
  let json;
  try {
    if (text.startsWith("{")) json = JSON.parse(text);
  } catch {} // It only begins as JSON does.
  if (json) walk(name, "", json);
  else look(name, "", text);
}
console.log("looked");

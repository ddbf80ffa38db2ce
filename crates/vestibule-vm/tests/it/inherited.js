// Runs in the guest, by its own node: says a line for each thing that a browser may have of an earlier life. The first argument
// is when this life began, in seconds of Unix time: connections of younger processes are their own.
const fs = require("node:fs");
const { DatabaseSync } = require("node:sqlite");
const since = Number(process.argv[2]);
const profile = "/home/person/.config/chromium/Default";
const cache = "/home/person/.cache/chromium/Default";
const say = (...words) => console.log(words.join(" "));
const read = (path) => fs.readFileSync(path, "latin1");

// proc(5): seconds of Unix time at which a process was started, by the guest's clock of now.
const booted = Date.now() / 1000 - Number(read("/proc/uptime").split(" ")[0]);
const started = (pid) => booted + Number(read(`/proc/${pid}/stat`).split(") ").pop().split(" ")[19]) / 100;
// Inode of a socket to the process that has it.
const owners = new Map();
for (const pid of fs.readdirSync("/proc").filter((name) => /^\d+$/.test(name))) {
  let fds = [];
  try {
    fds = fs.readdirSync(`/proc/${pid}/fd`);
  } catch {} // It ended meanwhile.
  for (const fd of fds) {
    try {
      const inode = /^socket:\[(\d+)\]$/.exec(fs.readlinkSync(`/proc/${pid}/fd/${fd}`));
      if (inode) owners.set(inode[1], pid);
    } catch {} // The one by which the directory was read.
  }
}
// Of RFC 793, by the kernel's numbers (include/net/tcp_states.h).
const LISTEN = "0A", TIME_WAIT = "06";
const loopback = /^(0100007F|0{24}01000000|0{16}FFFF00000100007F):/;
for (const table of ["tcp", "tcp6", "udp", "udp6"]) {
  for (const line of read(`/proc/net/${table}`).trim().split("\n").slice(1)) {
    const [, local, remote, state, , , , uid, , inode] = line.trim().split(/\s+/);
    const pid = owners.get(inode);
    const name = pid ? read(`/proc/${pid}/cmdline`).split("\0").join(" ").slice(0, 300) : "nobody";
    const what = `${table} ${state} ${local} ${remote} of ${name}`;
    if (table.startsWith("udp")) say("datagrams", what);
    else if (!loopback.test(local)) say("outside", what);
    // The agent's API and its way out, ports 8080 and 3128: they are root's.
    else if (state === LISTEN) /:(1F90|0C38)$/.test(local) && uid === "0" || say("listener", what);
    // What the kernel remembers of a connection that both ends have closed, and nobody has any more.
    else if (state === TIME_WAIT && inode === "0") continue;
    else if (!pid || (started(pid) < since && !/^\/proc\/self\/exe agent/.test(name))) say("connection", what);
  }
}
if (/^\s*nameserver/m.test(read("/etc/resolv.conf")) || !/^hosts: files$/m.test(read("/etc/nsswitch.conf"))) say("resolver");

// A copy of the file: the browser may hold the original locked.
const copies = fs.mkdtempSync("/tmp/inherited");
const rows = (name, query) => {
  for (const end of ["", "-journal", "-wal"]) {
    if (fs.existsSync(`${profile}/${name}${end}`)) fs.copyFileSync(`${profile}/${name}${end}`, `${copies}/${name}${end}`);
  }
  const database = new DatabaseSync(`${copies}/${name}`);
  const found = database.prepare(query).all();
  database.close();
  return found.map((row) => Object.values(row).join(" "));
};
for (const row of rows("Cookies", "SELECT host_key, name FROM cookies")) say("cookie", row);
for (const row of rows("History", "SELECT url FROM urls")) {
  if (row !== "file:///usr/share/vestibule/welcome.html") say("history", row);
}
for (const row of rows("Login Data", "SELECT origin_url FROM logins")) say("password", row);
fs.rmSync(copies, { recursive: true });

const pages = (kind, directory) => {
  let entries = [];
  try {
    entries = fs.readdirSync(directory, { withFileTypes: true });
  } catch {} // Nothing was ever stored.
  for (const entry of entries) {
    const path = `${directory}/${entry.name}`;
    if (entry.isDirectory()) pages(kind, path);
    if (!entry.isFile()) continue;
    for (const page of new Set(read(path).match(/https?:\/\/[\x21-\x7e]+/g))) say(kind, page);
  }
};
pages("local-storage", `${profile}/Local Storage`);
pages("session-storage", `${profile}/Session Storage`);
pages("database", `${profile}/IndexedDB`);
pages("worker", `${profile}/Service Worker`);
pages("cache", `${cache}/Cache`);
pages("cache", `${cache}/Code Cache`);
say("looked");

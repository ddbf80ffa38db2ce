/**
 * A little RFB 3.8 server (RFC 6143) that shows a drawn sign-in page, follows SetDesktopSize, and paints every key that it
 * gets as a mark in the page's field: enough to see that picture, size and keys go through.
 */
const EXTENDED_DESKTOP_SIZE = -308;

/** `seen` gets what came in: `seen.keys` pressed, `seen.clipboard`; `seen.copy(text)` is set to offer text to the client. */
export function serveRfb(socket, seen) {
  let buffer = Buffer.alloc(0);
  let stage = "version";
  let size = { w: 1280, h: 800 };
  let resizable = false;
  let announced = false;
  let keys = 0;
  let wanted = false;
  let dirty = true;

  const send = (...parts) => socket.send(Buffer.concat(parts.map((p) => Buffer.from(p))));
  const u16 = (...n) => n.flatMap((v) => [v >> 8, v & 255]);
  const u32 = (...n) =>
    n.flatMap((v) => [(v >>> 24) & 255, (v >>> 16) & 255, (v >>> 8) & 255, v & 255]);

  seen.copy = (text) => send([3, 0, 0, 0], u32(text.length), Buffer.from(text, "latin1"));
  send("RFB 003.008\n");
  socket.on("message", (data) => {
    buffer = Buffer.concat([buffer, data]);
    while (step());
  });

  function take(n) {
    if (buffer.length < n) return null;
    const part = buffer.subarray(0, n);
    buffer = buffer.subarray(n);
    return part;
  }

  function step() {
    if (stage === "version") {
      if (!take(12)) return false;
      send([1, 1]);
      stage = "security";
    } else if (stage === "security") {
      if (!take(1)) return false;
      send(u32(0));
      stage = "init";
    } else if (stage === "init") {
      if (!take(1)) return false;
      const format = [32, 24, 0, 1, ...u16(255, 255, 255), 0, 8, 16, 0, 0, 0];
      send(u16(size.w, size.h), format, u32(9), "vestibule");
      stage = "messages";
    } else return message();
    return true;
  }

  function message() {
    if (buffer.length < 1) return false;
    const type = buffer[0];
    const known = { 0: 20, 3: 10, 4: 8, 5: 6 }[type];
    if (known !== undefined) {
      const m = take(known);
      if (!m) return false;
      if (type === 4 && m[1] === 1) {
        keys += 1;
        seen.keys += 1;
        dirty = true;
        update();
      }
      if (type === 3) {
        wanted = true;
        if (m[1] === 0) dirty = true;
        update();
      }
      return true;
    }
    if (type === 2) {
      const n = buffer.length >= 4 ? buffer.readUInt16BE(2) : Infinity;
      const m = take(4 + 4 * n);
      if (!m) return false;
      for (let i = 0; i < n; i++) resizable ||= m.readInt32BE(4 + 4 * i) === EXTENDED_DESKTOP_SIZE;
      return true;
    }
    if (type === 6) {
      const m = take(buffer.length >= 8 ? 8 + Math.abs(buffer.readInt32BE(4)) : Infinity);
      if (m) seen.clipboard = m.toString("latin1", 8);
      return m !== null;
    }
    if (type === 251) {
      const m = take(buffer.length >= 8 ? 8 + 16 * buffer[6] : Infinity);
      if (!m) return false;
      size = { w: m.readUInt16BE(2), h: m.readUInt16BE(4) };
      desktopSize(1);
      dirty = true;
      return true;
    }
    socket.close(4007, "unknown message");
    return false;
  }

  function desktopSize(reason) {
    const screen = [...u32(1), ...u16(0, 0, size.w, size.h), ...u32(0)];
    send(
      [0, 0],
      u16(1),
      u16(reason, 0, size.w, size.h),
      u32(EXTENDED_DESKTOP_SIZE),
      [1, 0, 0, 0],
      screen,
    );
  }

  function update() {
    if (!wanted || !dirty) return;
    if (resizable && !announced) {
      announced = true;
      desktopSize(0);
    }
    wanted = dirty = false;
    send([0, 0], u16(1), u16(0, 0, size.w, size.h), u32(0), picture(size, keys));
  }
}

/** A browser window with a sign-in form above a terminal, in BGRX. */
function picture({ w, h }, keys) {
  const pixels = Buffer.alloc(w * h * 4);
  const rect = (x, y, rw, rh, r, g, b) => {
    const row = Buffer.alloc(Math.max(0, Math.min(Math.round(rw), w)) * 4);
    for (let i = 0; i < row.length; i += 4) row.set([r, g, b, 0], i);
    for (let j = Math.max(0, Math.round(y)); j < Math.min(h, Math.round(y + rh)); j++) {
      row.copy(pixels, (j * w + Math.max(0, Math.round(x))) * 4);
    }
  };
  const split = Math.round(h * 0.72);
  rect(0, 0, w, h, 0x1b, 0x2a, 0x4a);
  rect(0, 0, w, split, 0xf4, 0xf5, 0xf7);
  rect(0, 0, w, 36, 0xdd, 0xe1, 0xe8);
  rect(8, 6, 180, 30, 0xff, 0xff, 0xff);
  rect(0, 36, w, 40, 0xff, 0xff, 0xff);
  rect(90, 44, w - 180, 24, 0xea, 0xed, 0xf2);
  const cw = Math.min(400, w - 60);
  const x = (w - cw) / 2;
  const y = 76 + (split - 76 - 330) / 2;
  rect(x, y, cw, 330, 0xff, 0xff, 0xff);
  rect(x + 36, y + 40, cw * 0.45, 22, 0x22, 0x2c, 0x3a);
  rect(x + 36, y + 78, cw * 0.7, 10, 0xb9, 0xc1, 0xcc);
  for (const fy of [120, 180]) {
    rect(x + 36, y + fy, cw - 72, 42, 0x9a, 0xa5, 0xb4);
    rect(x + 37, y + fy + 1, cw - 74, 40, 0xff, 0xff, 0xff);
  }
  rect(x + 36, y + 246, cw - 72, 44, 0x1f, 0x57, 0xa8);
  for (let i = 0; i < Math.min(keys, 20); i++)
    rect(x + 50 + i * 14, y + 138, 8, 8, 0x22, 0x2c, 0x3a);
  rect(0, split, w, h - split, 0x10, 0x15, 0x1c);
  for (let i = 0; i < 4; i++)
    rect(16, split + 18 + i * 20, [320, 220, 260, 90][i], 9, 0x8f, 0xa0, 0xb5);
  return pixels;
}

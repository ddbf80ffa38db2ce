/** Numbers and times as people read them. */

/** `0:07`, `12:30`, `1:02:03`. */
export function duration(ms: number): string {
  const total = Math.max(0, Math.floor(ms / 1000));
  const s = String(total % 60).padStart(2, "0");
  const m = Math.floor(total / 60) % 60;
  const h = Math.floor(total / 3600);
  return h > 0 ? `${h}:${String(m).padStart(2, "0")}:${s}` : `${m}:${s}`;
}

/** `0.4 s`, `7.2 s`, `48 s`, `2 min 05 s`: what one step took. */
export function took(ms: number): string {
  if (ms < 9950) return `${(Math.max(0, ms) / 1000).toFixed(1)} s`;
  const s = Math.round(ms / 1000);
  if (s < 60) return `${s} s`;
  return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(n: number): string {
  let value = n;
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${UNITS[unit]}`;
}

const clockFormat = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const dayFormat = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

/** Time of day in the person's own zone. */
export const clock = (iso: string) => clockFormat.format(new Date(iso));
/** Day and time in the person's own zone. */
export const moment = (iso: string) => dayFormat.format(new Date(iso));

/** `just now`, `4 min ago`, `in 2 h`, then the date. */
export function ago(iso: string, now: number): string {
  const ms = now - Date.parse(iso);
  const size = Math.abs(ms);
  if (Number.isNaN(ms)) return "";
  if (size >= 24 * 3_600_000) return moment(iso);
  if (size < 45_000) return ms >= 0 ? "just now" : "in a moment";
  const span =
    size < 3_600_000 ? `${Math.round(size / 60_000)} min` : `${Math.round(size / 3_600_000)} h`;
  return ms >= 0 ? `${span} ago` : `in ${span}`;
}

/** The first twelve digits of a digest, for people. */
export const shortDigest = (digest: string) => digest.slice(0, 12);
/** The last eight digits of a UUIDv7: the first ones are the time, and alike for neighbours. */
export const shortId = (id: string) => id.slice(-8);

export const plural = (n: number, one: string, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

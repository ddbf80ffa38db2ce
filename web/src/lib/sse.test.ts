import { describe, expect, it } from "vitest";
import { SseParser } from "./sse";

const all = (...chunks: string[]) => {
  const parser = new SseParser();
  return chunks.flatMap((chunk) => parser.push(chunk));
};

describe("SseParser", () => {
  it("reads id and data, and skips comments and unknown fields", () => {
    expect(all(": hello\n\nevent: state\nid: 3\nretry: 5\ndata: {}\n\n")).toEqual([
      { id: "3", data: "{}" },
    ]);
  });

  it("joins lines of data and keeps the last id", () => {
    expect(all("id: 1\ndata: a\ndata: b\n\ndata:c\n\n")).toEqual([
      { id: "1", data: "a\nb" },
      { id: "1", data: "c" },
    ]);
  });

  it("gives the same for every way of cutting the stream", () => {
    const text = "id: 1\r\ndata: x\r\n\r\nid: 2\rdata: y\r\rid: 3\ndata: é\n\n";
    const whole = all(text);
    expect(whole.map((m) => m.id)).toEqual(["1", "2", "3"]);
    for (let cut = 0; cut <= text.length; cut++) {
      expect(all(text.slice(0, cut), text.slice(cut))).toEqual(whole);
    }
    expect(all(...text)).toEqual(whole);
  });

  it("does not give out a message that is not complete", () => {
    expect(all("id: 1\ndata: x\n")).toEqual([]);
  });

  it("refuses a line without end", () => {
    expect(() => all("data: " + "x".repeat(1 << 21))).toThrow();
  });
});

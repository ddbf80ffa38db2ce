import { describe, expect, it } from "vitest";
import { ApiError, problemFrom, problemOf, sentence } from "./error";

const body = (error: unknown) => JSON.stringify({ error });

describe("problemOf", () => {
  it("keeps what the server says and adds a headline", () => {
    const problem = problemOf(
      410,
      body({
        code: "session_gone",
        message: "open the view of session 7: it ended",
        fix: "start a new one",
        requestId: "r-1",
      }),
    );
    expect(problem).toMatchObject({
      code: "session_gone",
      status: 410,
      title: "This sign-in has ended",
      detail: "Open the view of session 7: it ended.",
      fix: "Start a new one.",
      requestId: "r-1",
      retryAfterS: null,
    });
  });

  it("carries the time after which to try again", () => {
    const detail = {
      code: "too_many_sessions",
      message: "m",
      fix: "",
      requestId: "",
      retryAfterS: 30,
    };
    const problem = problemOf(429, body(detail));
    expect(problem.retryAfterS).toBe(30);
    expect(problem.fix).not.toBe("");
    expect(problem.requestId).toBeNull();
  });

  it.each([
    [401, "unauthenticated"],
    [404, "not_found"],
    [410, "session_gone"],
    [502, "internal"],
    [503, "unavailable"],
    [302, "not_vestibule"],
  ])("knows HTTP %i without a body as %s", (status, code) => {
    expect(problemOf(status, "<html>").code).toBe(code);
  });

  it.each([
    "null",
    "[]",
    '{"error":null}',
    body({ code: "made-up", message: "x" }),
    body({ code: 1 }),
  ])("does not take %s for an error of ours", (text) => {
    expect(problemOf(500, text).code).toBe("internal");
  });
});

describe("problemFrom", () => {
  it("takes a failed fetch for being offline", () => {
    expect(problemFrom(new TypeError("Failed to fetch")).code).toBe("offline");
  });

  it("unwraps an ApiError", () => {
    const problem = problemOf(404, "");
    expect(problemFrom(new ApiError(problem))).toBe(problem);
  });
});

it("makes sentences of fragments", () => {
  expect(sentence(" start the VM: no room ")).toBe("Start the VM: no room.");
  expect(sentence("Done!")).toBe("Done!");
  expect(sentence("")).toBe("");
  expect(sentence("qemu/tcg: usable")).toBe("qemu/tcg: usable.");
  expect(sentence("vestibule-agent.service failed")).toBe("vestibule-agent.service failed.");
  expect(sentence("`browser` is verified")).toBe("`browser` is verified.");
  expect(sentence("éa")).toBe("éa.");
});

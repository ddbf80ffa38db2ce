import { describe, expect, it } from "vitest";
import { href, parse, type Route } from "./router";

describe("router", () => {
  const routes: Route[] = [
    { page: "connect" },
    { page: "login", code: "" },
    { page: "login", code: "a/b c%" },
    { page: "sessions" },
    { page: "session", id: "0193-7" },
    { page: "credentials" },
    { page: "machines" },
    { page: "machine", id: "0193-8" },
    { page: "images" },
    { page: "status" },
  ];

  it.each(routes)("finds its way back from the link to $page", (route) => {
    expect(parse(href(route))).toEqual(route);
  });

  it.each(["", "#", "#/", "/"])("takes %j as the start page", (hash) => {
    expect(parse(hash)).toEqual({ page: "connect" });
  });

  it("ignores slashes at the end", () => {
    expect(parse("#/sessions/abc/")).toEqual({ page: "session", id: "abc" });
  });

  it.each(["#/nowhere", "#/sessions/a/b", "#/images/x", "#/login/%E0%A4%A"])(
    "is lost at %s",
    (hash) => {
      expect(parse(hash).page).toBe("lost");
    },
  );
});

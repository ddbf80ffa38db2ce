/**
 * The hash router. A hash never reaches a server, so a one-time code in `#/login/<code>` is in no log, and the server
 * needs no fallback route.
 */
export type Route =
  | { page: "connect" }
  | { page: "login"; code: string }
  | { page: "sessions" }
  | { page: "session"; id: string }
  | { page: "credentials" }
  | { page: "machines" }
  | { page: "machine"; id: string }
  | { page: "images" }
  | { page: "status" }
  | { page: "lost"; path: string };

/** The operation of the API without which a page has nothing to show. */
export const NEEDS: Partial<Record<Route["page"], string>> = {
  connect: "start",
  sessions: "sessions",
  session: "session",
  credentials: "credentials",
  machines: "vms",
  machine: "vm",
  images: "images",
  status: "ready",
};

/** The route of a `location.hash`. Whatever it is not, is `lost`. */
export function parse(hash: string): Route {
  const path = hash.replace(/^#?\/?/, "").replace(/\/+$/, "");
  const parts = path.split("/").map(decode);
  const [page, id] = parts;
  if (parts.length <= 2 && page !== undefined && !parts.includes(null)) {
    if (id === undefined) {
      if (page === "") return { page: "connect" };
      if (page === "login") return { page: "login", code: "" };
      if (page === "sessions" || page === "credentials" || page === "machines") return { page };
      if (page === "images" || page === "status") return { page };
    } else if (id !== null && id !== "") {
      if (page === "login") return { page: "login", code: id };
      if (page === "sessions") return { page: "session", id };
      if (page === "machines") return { page: "machine", id };
    }
  }
  return { page: "lost", path };
}

function decode(part: string): string | null {
  try {
    return decodeURIComponent(part);
  } catch {
    return null;
  }
}

/** The link to a route. `parse(href(r))` is `r`. */
export function href(route: Route): string {
  switch (route.page) {
    case "connect":
      return "#/";
    case "login":
      return route.code === "" ? "#/login" : `#/login/${encodeURIComponent(route.code)}`;
    case "session":
      return `#/sessions/${encodeURIComponent(route.id)}`;
    case "machine":
      return `#/machines/${encodeURIComponent(route.id)}`;
    case "lost":
      return `#/${route.path}`;
    default:
      return `#/${route.page}`;
  }
}

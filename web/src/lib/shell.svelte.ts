/** What the whole page knows: where it is, what time it is, and whether this browser is signed in. */
import { whenSignedOut } from "./api/client";
import { parse, type Route } from "./router";

class Shell {
  route: Route = $state(parse(location.hash));
  signedIn = $state(true);
  /** What the tab's title says before the page's name: how a sign-in stands, for those who look elsewhere meanwhile. */
  news = $state("");
  /** Ticks every second, for everything that shows how long ago something was. */
  now = $state(Date.now());

  constructor() {
    addEventListener("hashchange", () => (this.route = parse(location.hash)));
    setInterval(() => (this.now = Date.now()), 1000);
    whenSignedOut(() => (this.signedIn = false));
  }
}

export const shell = new Shell();

/** What the whole page knows: where it is, what time it is, who is signed in, and what they may do. */
import { api, whenSignedOut } from "./api/client";
import type { MeView } from "./api/types";
import { parse, type Route } from "./router";

class Shell {
  route: Route = $state(parse(location.hash));
  signedIn = $state(true);
  /** Who is signed in; null as long as that is not known. */
  me: MeView | null = $state.raw(null);
  /** Whether it was tried to find out. */
  asked = $state(false);
  /** What the tab's title says before the page's name: how a sign-in stands, for those who look elsewhere meanwhile. */
  news = $state("");
  /** Ticks every second, for everything that shows how long ago something was. */
  now = $state(Date.now());

  constructor() {
    addEventListener("hashchange", () => (this.route = parse(location.hash)));
    setInterval(() => (this.now = Date.now()), 1000);
    whenSignedOut(() => this.leave());
    if (this.route.page !== "login") void this.enter();
  }

  /** Finds out who is signed in. */
  async enter(): Promise<boolean> {
    try {
      this.me = await api.me();
      this.signedIn = true;
    } catch {
      // Whoever is not known is shown how to sign in; a server that does not answer is said by the pages.
    }
    this.asked = true;
    return this.me !== null;
  }

  leave(): void {
    this.signedIn = false;
    this.me = null;
  }

  /** Whether their role may use an operation of the API. What is not known yet may be tried. */
  may(operation: string): boolean {
    return this.me === null || this.me.operations.includes(operation);
  }
}

export const shell = new Shell();

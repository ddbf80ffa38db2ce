/** Hosts that share the database, in words for the people who run them. */
import type { HostView } from "../api/types";
import { ago, plural } from "../format";

export interface HostWords {
  tone: "good" | "warn" | "bad";
  state: string;
  /** What is known besides, in words. */
  about: string;
  /** What to do, where something is. */
  fix: string | null;
}

export function hostWords(host: HostView, now: number): HostWords {
  const vms = host.machines === 0 ? "no VMs" : plural(host.machines, "VM");
  if (host.state === "lost") {
    const since = host.leaseUntil ? ago(host.leaseUntil, now) : "";
    const left = host.machines === 0 ? "" : `, ${vms} may be left on it`;
    return {
      tone: "bad",
      state: "Lost",
      about: since ? `it was last heard of ${since}${left}` : `it was not heard of yet${left}`,
      fix: `start \`vestibule serve\` on it; one that never comes back is removed with \`vestibule host forget ${host.name}\``,
    };
  }
  if (!host.own && host.address == null)
    return {
      tone: "warn",
      state: "Live",
      about: vms,
      fix: "set `cluster.address` in its configuration: until then its sign-ins can only be opened there",
    };
  return {
    tone: "good",
    state: "Live",
    about: host.own ? `${vms}, this page comes from it` : vms,
    fix: null,
  };
}

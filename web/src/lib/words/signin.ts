/** Why a sign-in at the identity provider came to nothing, in the words of the one who tried. */
const WORDS: Record<string, string> = {
  denied: "You did not allow it there. Nothing happened; you can try again.",
  expired: "This took too long, or began in another browser. Try again.",
  provider:
    "Your organisation’s sign-in did not give a valid answer. Try again; if it goes on, tell whoever runs Vestibule.",
  name: "Your organisation’s sign-in gives no verified name for you. Tell whoever runs Vestibule.",
  unknown: "You are not known here yet. Ask whoever runs Vestibule to add you.",
  taken: "Your name belongs to somebody else here. Ask whoever runs Vestibule.",
};

/** What an address says that the browser was sent back to; null: nothing. */
export function cameBack(search: string): { words: string; request: string } | null {
  const query = new URLSearchParams(search);
  const reason = query.get("signIn");
  if (reason === null) return null;
  return {
    words: WORDS[reason] ?? "Signing in did not work. Try again.",
    request: (query.get("request") ?? "").replace(/[^0-9a-f-]/g, "").slice(0, 36),
  };
}

// Runs before the first paint, so that a chosen theme never flashes the other one. See src/lib/theme.svelte.ts.
try {
  const chosen = localStorage.getItem("vestibule.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is refused (private mode): the system's preference applies.
}

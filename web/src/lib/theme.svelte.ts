/** Light, dark, or what the system prefers. public/theme.js applies the stored choice before the first paint. */
export type Theme = "system" | "light" | "dark";

const KEY = "vestibule.theme";

function stored(): Theme {
  try {
    const value = localStorage.getItem(KEY);
    return value === "light" || value === "dark" ? value : "system";
  } catch {
    return "system";
  }
}

class ThemeChoice {
  current: Theme = $state(stored());

  choose(theme: Theme): void {
    this.current = theme;
    if (theme === "system") delete document.documentElement.dataset["theme"];
    else document.documentElement.dataset["theme"] = theme;
    try {
      if (theme === "system") localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, theme);
    } catch {
      // Storage is refused: the choice holds for this page.
    }
  }
}

export const theme = new ThemeChoice();

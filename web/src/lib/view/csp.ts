/**
 * Lets xterm.js live under `style-src 'self'`. It writes `<style>` elements and `style` attributes, which that policy
 * refuses; what it means by them is kept with constructed style sheets and the CSSOM, which the policy allows.
 */

/** Stands in for a `<style>` element: takes the text, holds a constructed sheet. */
function sheetElement(create: typeof document.createElement): HTMLElement {
  const element = create("span");
  element.hidden = true;
  const sheet = new CSSStyleSheet();
  document.adoptedStyleSheets.push(sheet);
  Object.defineProperty(element, "textContent", {
    set: (text: string) => void sheet.replaceSync(text),
  });
  element.remove = () => {
    document.adoptedStyleSheets = document.adoptedStyleSheets.filter((s) => s !== sheet);
    Element.prototype.remove.call(element);
  };
  return element;
}

/** `setAttribute` that sends `style` through the CSSOM. */
function setAttribute(this: HTMLElement, name: string, value: string): void {
  if (name === "style") this.style.cssText = value;
  else Element.prototype.setAttribute.call(this, name, value);
}

const create = document.createElement.bind(document);

function createElement(name: string, options?: ElementCreationOptions): HTMLElement {
  if (name === "style") return sheetElement(create);
  const element = create(name, options);
  if (name === "span") element.setAttribute = setAttribute;
  return element;
}

/** The document as xterm shall see it (its option `documentOverride`). */
export const gentleDocument: Document = new Proxy(document, {
  get(target, name) {
    if (name === "createElement") return createElement;
    const value: unknown = Reflect.get(target, name, target);
    return typeof value === "function" ? value.bind(target) : value;
  },
});

/** Runs `open`, during which also the real document makes gentle elements: xterm 6.0 asks it for one of its three styles. */
export function opening(open: () => void): void {
  const own = Object.getOwnPropertyDescriptor(document, "createElement");
  document.createElement = createElement as typeof document.createElement;
  try {
    open();
  } finally {
    if (own) Object.defineProperty(document, "createElement", own);
    else Reflect.deleteProperty(document, "createElement");
  }
}

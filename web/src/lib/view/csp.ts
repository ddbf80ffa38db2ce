/**
 * Lets xterm.js live without `style-src 'unsafe-inline'`. When it opens it makes three `<style>` elements, which that policy
 * would empty; here each becomes a constructed style sheet, which the policy allows. The `style` attributes that it gives
 * to true-colour text need `style-src-attr 'unsafe-inline'`, which can't hold a selector and so can't read a page.
 */

/** Stands in for a `<style>` element: takes its text into a sheet, and takes the sheet along when it goes. */
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

/** Runs `open`, during which the document answers a request for `<style>` with a stand-in. */
export function withoutStyleElements(open: () => void): void {
  const create = document.createElement.bind(document);
  document.createElement = ((name: string, options?: ElementCreationOptions) =>
    name === "style" ? sheetElement(create) : create(name, options)) as typeof create;
  try {
    open();
  } finally {
    // What was set is a property of this document; without it, the prototype's method is back.
    Reflect.deleteProperty(document, "createElement");
  }
}

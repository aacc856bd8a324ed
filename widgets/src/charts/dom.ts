/** Making elements: what comes from outside becomes text, never markup. */

type Child = Node | string;

/** What anywidget gives a chart. */
export interface Model {
  get(name: string): unknown;
  on(event: string, callback: () => void): void;
  off(event: string, callback: () => void): void;
}

export interface Context {
  model: Model;
  el: HTMLElement;
}

export function element<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Record<string, string> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A name from outside: cut short by the style sheet, whole in its tooltip, and in its own direction of writing. */
export function named(text: string): HTMLElement {
  return element("bdi", { class: "lora-name", title: text.slice(0, 500) }, text);
}

/** Rows of a table; the first cell of each is its heading. */
export function table(caption: string, header: string[], rows: string[][]): HTMLTableElement {
  const head = element("tr", {}, ...header.map((h) => element("th", { scope: "col" }, named(h))));
  const body = rows.map((row) =>
    element("tr", {}, ...row.map((cell, i) => (i ? element("td", {}, named(cell)) : element("th", { scope: "row" }, named(cell))))),
  );
  return element("table", { class: "lora-table" }, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...body));
}

/** The values behind a picture, made when somebody opens them. `refresh` makes them again. */
export function values(make: () => Node): { node: HTMLElement; refresh: () => void } {
  const node = element("details", {}, element("summary", {}, "Values as a table"));
  const place = element("div", { class: "lora-scroll", tabindex: "0", role: "group", "aria-label": "Values as a table" });
  const refresh = () => (node.open ? place.replaceChildren(make()) : undefined);
  node.append(place);
  node.addEventListener("toggle", refresh);
  return { node, refresh };
}

/** Draw now and, once a frame at most, whenever one of the names changes. Returns what ends that. */
export function watch(model: Model, names: string[], draw: () => void): () => void {
  let asked = 0;
  const ask = () => {
    asked ||= requestAnimationFrame(() => {
      asked = 0;
      draw();
    });
  };
  for (const name of names) model.on(`change:${name}`, ask);
  draw();
  return () => {
    cancelAnimationFrame(asked);
    for (const name of names) model.off(`change:${name}`, ask);
  };
}

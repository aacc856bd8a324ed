/** Adapters side by side: a column for each, a row for each fact; numbers are bars, too. */

import { type Context, element, named, watch } from "./dom.js";
import { number } from "./format.js";

/** A fact of every adapter; null where one has none. */
type Fact = [string, (string | number | null)[]];

function render({ model, el }: Context): () => void {
  return watch(model, ["adapters", "facts", "label"], () => {
    const adapters = model.get("adapters") as string[];
    const facts = model.get("facts") as Fact[];
    const head = element("tr", {}, element("td", {}), ...adapters.map((a) => element("th", { scope: "col" }, named(a))));
    const table = element(
      "table",
      { class: "lora-table lora-adapters" },
      element("caption", {}, model.get("label") as string),
      element("thead", {}, head),
      element("tbody", {}, ...facts.map(row)),
    );
    el.replaceChildren(element("div", { class: "lora-chart" }, scroller(table)));
  });
}

/** Wide tables scroll, by keyboard, too. */
function scroller(table: HTMLElement): HTMLElement {
  return element("div", { class: "lora-scroll", tabindex: "0", role: "group", "aria-label": "Adapters side by side" }, table);
}

function row([name, values]: Fact): HTMLElement {
  const most = Math.max(0, ...values.map((v) => (typeof v === "number" && Number.isFinite(v) ? v : 0)));
  return element("tr", {}, element("th", { scope: "row" }, named(name)), ...values.map((value) => cell(value, most)));
}

function cell(value: string | number | null, most: number): HTMLElement {
  if (value === null) return element("td", {}, "–");
  if (typeof value === "string") return element("td", { class: "lora-text" }, element("bdi", {}, value));
  const bar = element("div", { class: "lora-meter", style: `width:${most > 0 ? Math.max(0, (100 * value) / most) : 0}%` });
  return element("td", { class: "lora-number" }, number(value), bar);
}

export default { render };

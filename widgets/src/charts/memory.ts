/** Memory by part as one stacked bar, with a line for each card that the scale holds and for this machine. */

import { type Context, element, named, table, values, watch } from "./dom.js";
import { bytes } from "./format.js";

type Sizes = [string, number][];

function render({ model, el }: Context): () => void {
  const bar = element("div", { class: "lora-bar", role: "img" });
  const lines = element("div", { class: "lora-lines", "aria-hidden": "true" });
  const said = element("div", { class: "lora-said" });
  const legend = element("ul", { class: "lora-legend" });
  let parts: Sizes = [];
  let cards: Sizes = [];
  const numbers = values(() => tables(parts, cards));
  el.replaceChildren(element("div", { class: "lora-chart" }, said, element("div", { class: "lora-stack" }, bar, lines), legend, numbers.node));
  return watch(model, ["parts", "cards"], () => {
    parts = model.get("parts") as Sizes;
    cards = (model.get("cards") as Sizes).slice().sort((a, b) => a[1] - b[1]);
    const total = sum(parts);
    // Up to the first card that is large enough, so that the bar is never a hair.
    const scale = 1.05 * Math.max(total, cards.find(([, size]) => size >= total)?.[1] ?? 0, 1);
    said.textContent = summary(total, cards);
    bar.setAttribute("aria-label", `${said.textContent}. ${parts.map(([name, size]) => `${name} ${bytes(size)}`).join(", ")}`);
    bar.replaceChildren(...parts.map((part, i) => segment(part, i, scale)));
    lines.replaceChildren(...cards.filter(([, size]) => size <= scale).map((card, i) => mark(card, i, scale)));
    legend.replaceChildren(...parts.map(([name, size], i) => entry(name, size, i)));
    numbers.refresh();
  });
}

function sum(parts: Sizes): number {
  return parts.reduce((all, [, size]) => all + size, 0);
}

function summary(total: number, cards: Sizes): string {
  const first = cards.find(([, size]) => size >= total);
  if (!cards.length) return `${bytes(total)} in all`;
  return `${bytes(total)} in all: ${first ? `fits ${first[0]} (${bytes(first[1])})` : "more than any card listed"}`;
}

function segment([name, size]: [string, number], i: number, scale: number): HTMLElement {
  return element("div", { class: `lora-part lora-colour${i % 6}`, style: `width:${(100 * size) / scale}%`, title: `${name}: ${bytes(size)}` });
}

function mark([name, size]: [string, number], i: number, scale: number): HTMLElement {
  const share = (100 * size) / scale;
  // A label on the right half stands to the left of its line; neighbours take turns in three rows.
  const side = share > 50 ? "lora-left" : "lora-right";
  return element("div", { class: `lora-line ${side} lora-row${i % 3}`, style: `left:${share}%` }, element("span", {}, named(`${name}, ${bytes(size)}`)));
}

function entry(name: string, size: number, i: number): HTMLElement {
  return element("li", {}, element("span", { class: `lora-swatch lora-colour${i % 6}` }), " ", named(name), ` ${bytes(size)}`);
}

function tables(parts: Sizes, cards: Sizes): Node {
  const total = sum(parts);
  const by = table("Memory by part", ["part", "bytes", "in units"], [...parts, ["in all", total] as [string, number]].map(([n, s]) => [n, s.toLocaleString("en"), bytes(s)]));
  const on = table("Cards", ["card", "memory", "fits"], cards.map(([n, s]) => [n, bytes(s), s >= total ? "yes" : "no"]));
  return element("div", {}, by, ...(cards.length ? [on] : []));
}

export default { render };

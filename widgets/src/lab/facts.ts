/** How an adapter is shown: facts, warnings, the heat map, the singular values of the module that is chosen. */

import { element, named, table, values } from "../charts/dom.js";
import { bytes, number } from "../charts/format.js";
import { heatMap } from "../charts/heatmap.js";
import type { Adapter, Module } from "./adapter";
import { grid } from "./places";

export function facts(adapter: Adapter): HTMLElement {
  const ranks = [...new Set(adapter.modules.map((m) => m.rank))].sort((a, b) => a - b);
  const scales = [...new Set(adapter.modules.map((m) => m.scale))].sort((a, b) => a - b);
  const rows: [string, string][] = [
    ["method", adapter.method],
    ["base", adapter.base ?? "not said"],
    ["rank", ranks.length ? ranks.map(number).join(", ") : known(adapter.rank)],
    ["alpha", known(adapter.alpha)],
    ["scale", scales.length ? scales.map(number).join(", ") : "not known"],
    ["targets", adapter.targets.join(", ") || "not said"],
    ["modules", known(adapter.modules.length || null)],
    ["parameters", known(adapter.parameters)],
    ["size", adapter.bytes === null ? "not known" : `${bytes(adapter.bytes)} (${number(adapter.bytes)} bytes)`],
  ];
  return element("dl", { class: "lora-facts" }, ...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, element("bdi", {}, value))]));
}

function known(value: number | null): string {
  return value === null ? "not known" : number(value);
}

export function warnings(texts: string[]): HTMLElement {
  return element("ul", { class: "lora-warnings" }, ...texts.map((text) => element("li", {}, element("bdi", {}, text))));
}

/** The map, and under it the singular values of what is chosen in it. */
export function updates(modules: Module[]): HTMLElement {
  const map = element("div");
  const below = element("section", { "aria-live": "polite" });
  const by = new Map(modules.map((m) => [m.path, m]));
  const { heat, path } = grid(new Map(modules.map((m) => [m.path, m.norm])), "‖ΔW‖ by module and layer: Enter or a click shows the singular values");
  const show = (module: Module | undefined) => below.replaceChildren(...(module ? [spectrum(module)] : []));
  heatMap(map, heat, (row, column) => show(by.get(path(row, column) ?? "")));
  show([...modules].sort((a, b) => (b.norm ?? 0) - (a.norm ?? 0))[0]);
  return element("div", {}, map, below);
}

function spectrum(module: Module): HTMLElement {
  const all = module.singularValues ?? [];
  const heading = element("h3", {}, "Singular values of ", named(module.path));
  const size = element("p", {}, `${number(module.fanOut)} × ${number(module.fanIn)}, rank ${module.rank}, scale ${number(module.scale)}, ‖ΔW‖ ${module.norm === null ? "not a number" : number(module.norm)}`);
  const bars = all.map((s) => element("div", { class: "lora-spike", style: `height:${all[0] ? (100 * s) / all[0] : 0}%`, title: number(s) }));
  const said = all.length ? `${all.length} singular values, from ${number(all[0] ?? 0)} to ${number(all.at(-1) ?? 0)}` : "No singular values: the file holds NaN or infinity";
  const numbers = values(() => table("Singular values, largest first", ["number", "value"], all.map((s, i) => [String(i + 1), number(s)])));
  return element("div", {}, heading, size, element("div", { class: "lora-spectrum", role: "img", "aria-label": said }, ...bars), element("p", {}, said), numbers.node);
}

/** The result for programs: made when it is opened, as it may be long. */
export function asJson(adapter: Adapter): HTMLElement {
  const text = element("pre", { tabindex: "0", "aria-label": "Numbers as JSON" });
  const node = element("details", { class: "lora-json" }, element("summary", {}, "Numbers as JSON"), text);
  node.addEventListener("toggle", () => {
    if (node.open) text.textContent = JSON.stringify(adapter, null, 2);
  });
  return node;
}

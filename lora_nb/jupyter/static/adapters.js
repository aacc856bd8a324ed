/** Adapters side by side: a column for each, a row for each fact; numbers are bars, too. */
import { element, named, watch } from "./dom.js";
import { number } from "./format.js";
function render({ model, el }) {
    return watch(model, ["adapters", "facts", "label"], () => {
        const adapters = model.get("adapters");
        const facts = model.get("facts");
        const head = element("tr", {}, element("td", {}), ...adapters.map((a) => element("th", { scope: "col" }, named(a))));
        const table = element("table", { class: "lora-table lora-adapters" }, element("caption", {}, model.get("label")), element("thead", {}, head), element("tbody", {}, ...facts.map(row)));
        el.replaceChildren(element("div", { class: "lora-chart" }, scroller(table)));
    });
}
/** Wide tables scroll, by keyboard, too. */
function scroller(table) {
    return element("div", { class: "lora-scroll", tabindex: "0", role: "group", "aria-label": "Adapters side by side" }, table);
}
function row([name, values]) {
    const most = Math.max(0, ...values.map((v) => (typeof v === "number" && Number.isFinite(v) ? v : 0)));
    return element("tr", {}, element("th", { scope: "row" }, named(name)), ...values.map((value) => cell(value, most)));
}
function cell(value, most) {
    if (value === null)
        return element("td", {}, "–");
    if (typeof value === "string")
        return element("td", { class: "lora-text" }, element("bdi", {}, value));
    const bar = element("div", { class: "lora-meter", style: `width:${most > 0 ? Math.max(0, (100 * value) / most) : 0}%` });
    return element("td", { class: "lora-number" }, number(value), bar);
}
export default { render };

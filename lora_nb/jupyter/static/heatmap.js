/** ‖ΔW‖ by module and layer. The map is a table whose cells are coloured, so that a screen reader has the values, too. */
import { element, named, watch } from "./dom.js";
import { number } from "./format.js";
/** Draw it into `place`. `chosen` hears of the cell that gets Enter or a click. */
export function heatMap(place, heat, chosen) {
    const most = Math.max(0, ...heat.values.flat().map((v) => v ?? 0));
    const said = element("div", { class: "lora-said", role: "status" }, range(heat));
    const head = element("tr", {}, element("td", {}), ...heat.columns.map((c) => element("th", { scope: "col" }, named(c))));
    const cells = heat.rows.map((_, r) => heat.columns.map((_, c) => cell(heat, r, c, most)));
    const body = heat.rows.map((name, r) => element("tr", {}, element("th", { scope: "row" }, named(name)), ...(cells[r] ?? [])));
    const grid = element("table", { class: "lora-heat", role: "grid" }, element("caption", {}, heat.label), element("thead", {}, head), element("tbody", {}, ...body));
    const show = (r, c) => (said.textContent = told(heat, r, c));
    const go = (r, c) => {
        const next = cells[r]?.[c];
        if (!next)
            return;
        for (const other of cells.flat())
            other.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
        show(r, c);
    };
    cells.forEach((row, r) => row.forEach((one, c) => {
        one.addEventListener("pointerenter", () => show(r, c));
        one.addEventListener("focus", () => show(r, c));
        one.addEventListener("click", () => (go(r, c), chosen?.(r, c)));
        one.addEventListener("keydown", (event) => keyed(event, () => chosen?.(r, c), { r, c, lines: cells.length, wide: row.length, go }));
    }));
    const first = cells[0]?.[0];
    if (first)
        first.tabIndex = 0;
    place.replaceChildren(element("div", { class: "lora-chart" }, element("div", { class: "lora-scroll" }, grid), said));
}
function keyed(event, choose, { r, c, lines, wide, go }) {
    const moves = {
        ArrowLeft: () => go(r, c - 1),
        ArrowRight: () => go(r, c + 1),
        ArrowUp: () => go(r - 1, c),
        ArrowDown: () => go(r + 1, c),
        Home: () => go(event.ctrlKey ? 0 : r, 0),
        End: () => go(event.ctrlKey ? lines - 1 : r, wide - 1),
        Enter: choose,
        " ": choose,
    };
    const move = moves[event.key];
    if (!move)
        return;
    event.preventDefault();
    event.stopPropagation(); // in a notebook the arrows would change the cell
    move();
}
function cell(heat, r, c, most) {
    const value = heat.values[r]?.[c] ?? null;
    const strength = value !== null && most > 0 ? Math.round((60 * value) / most) : 0;
    const attributes = { tabindex: "-1", style: `--lora-strength:${strength}%`, title: told(heat, r, c) };
    return element("td", attributes, value === null ? "–" : brief(value));
}
/** Two figures: what a cell has room for. */
function brief(value) {
    if (value === 0)
        return "0";
    return value >= 0.01 && value < 1000 ? String(Number(value.toPrecision(2))) : value.toExponential(0);
}
function told({ rows, columns, values }, r, c) {
    const value = values[r]?.[c] ?? null;
    return `${(rows[r] ?? "").slice(0, 200)}, layer ${(columns[c] ?? "").slice(0, 200)}: ${value === null ? "not in the adapter" : number(value)}`;
}
function range({ values }) {
    const all = values.flat().filter((v) => v !== null);
    return all.length ? `from ${number(Math.min(...all))} to ${number(Math.max(...all))}` : "nothing to show";
}
function render({ model, el }) {
    return watch(model, ["rows", "columns", "values", "label"], () => {
        heatMap(el, {
            rows: model.get("rows"),
            columns: model.get("columns"),
            values: model.get("values"),
            label: model.get("label"),
        });
    });
}
export default { render };

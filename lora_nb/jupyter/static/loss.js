/** A run's loss, live: the curve, its held-out points, and a cursor that arrow keys and the mouse move. */
import { paint, stepAt } from "./curve.js";
import { element, table, values, watch } from "./dom.js";
import { number } from "./format.js";
const ROWS = 50; // of the table: what can be read
function render({ model, el }) {
    const canvas = element("canvas", { "aria-hidden": "true" });
    const cursor = element("div", { class: "lora-plot", role: "slider", tabindex: "0", "aria-label": "Loss by step: arrow keys read it" }, canvas);
    const said = element("div", { class: "lora-said" });
    const legend = element("div", { class: "lora-legend" }, key("lora-one", "training loss"), key("lora-two", "held-out loss"));
    const numbers = values(() => table(`Loss in nats${curve.losses.length > ROWS ? ", a choice of steps" : ""}`, ["step", "training", "held-out"], rows(curve)));
    el.replaceChildren(element("div", { class: "lora-chart" }, legend, cursor, said, numbers.node));
    const curve = { losses: new Float32Array(), held: [], cursor: 0 };
    const look = (step) => {
        curve.cursor = Math.min(curve.losses.length, Math.max(1, step));
        draw();
    };
    const draw = () => {
        paint(canvas, curve);
        const shown = curve.cursor || curve.losses.length;
        said.textContent = told(curve, shown);
        cursor.setAttribute("aria-valuemin", "1");
        cursor.setAttribute("aria-valuemax", String(Math.max(1, curve.losses.length)));
        cursor.setAttribute("aria-valuenow", String(Math.max(1, shown)));
        cursor.setAttribute("aria-valuetext", told(curve, shown));
    };
    cursor.addEventListener("keydown", (event) => {
        const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -100, PageUp: 100, Home: -Infinity, End: Infinity }[event.key];
        if (by === undefined)
            return;
        event.preventDefault();
        event.stopPropagation(); // in a notebook the arrows would change the cell
        look((curve.cursor || curve.losses.length) + by);
    });
    cursor.addEventListener("pointermove", (event) => {
        if (curve.losses.length)
            look(stepAt(event.offsetX, canvas.clientWidth, curve.losses.length));
    });
    cursor.addEventListener("pointerleave", () => {
        curve.cursor = 0;
        draw();
    });
    const stop = watch(model, ["losses", "held_out"], () => {
        curve.losses = floats(model.get("losses"));
        curve.held = model.get("held_out");
        numbers.refresh();
        draw();
    });
    const stopLooks = onLooks(canvas, draw);
    return () => {
        stop();
        stopLooks();
    };
}
function key(series, text) {
    return element("span", {}, element("span", { class: `lora-swatch ${series}` }), ` ${text}`);
}
/** Float32s, little-endian as they are sent. */
function floats(sent) {
    const view = sent;
    if (!view?.byteLength)
        return new Float32Array();
    return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + 4 * Math.floor(view.byteLength / 4)));
}
function told({ losses, held }, step) {
    if (!losses.length)
        return "No step yet";
    const there = held.find(([at]) => at === step);
    return `step ${number(step)}: loss ${number(losses[step - 1] ?? NaN)}${there ? `, held-out ${number(there[1] ?? NaN)}` : ""}`;
}
/** At most some 50 steps, the first and the last among them, and every held-out point. */
function rows({ losses, held }) {
    const every = Math.max(1, Math.ceil(losses.length / ROWS));
    const known = new Map(held);
    const steps = Array.from(losses.keys(), (i) => i + 1).filter((s) => s === 1 || s === losses.length || s % every === 0 || known.has(s));
    return steps.map((s) => [number(s), number(losses[s - 1] ?? NaN), known.has(s) ? number(known.get(s) ?? NaN) : ""]);
}
/** Draw again when the canvas gets another size or the page another theme. */
function onLooks(canvas, draw) {
    const size = new ResizeObserver(draw);
    const theme = new MutationObserver(draw);
    size.observe(canvas);
    theme.observe(document.body, { attributes: true });
    return () => {
        size.disconnect();
        theme.disconnect();
    };
}
export default { render };

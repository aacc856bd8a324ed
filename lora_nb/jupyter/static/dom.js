/** Making elements: what comes from outside becomes text, never markup. */
export function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes))
        made.setAttribute(name, value);
    made.append(...children);
    return made;
}
/** A name from outside: cut short by the style sheet, whole in its tooltip, and in its own direction of writing. */
export function named(text) {
    return element("bdi", { class: "lora-name", title: text.slice(0, 500) }, text);
}
/** Rows of a table; the first cell of each is its heading. */
export function table(caption, header, rows) {
    const head = element("tr", {}, ...header.map((h) => element("th", { scope: "col" }, named(h))));
    const body = rows.map((row) => element("tr", {}, ...row.map((cell, i) => (i ? element("td", {}, named(cell)) : element("th", { scope: "row" }, named(cell))))));
    return element("table", { class: "lora-table" }, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...body));
}
/** The values behind a picture, made when somebody opens them. `refresh` makes them again. */
export function values(make) {
    const node = element("details", {}, element("summary", {}, "Values as a table"));
    const place = element("div", { class: "lora-scroll", tabindex: "0", role: "group", "aria-label": "Values as a table" });
    const refresh = () => (node.open ? place.replaceChildren(make()) : undefined);
    node.append(place);
    node.addEventListener("toggle", refresh);
    return { node, refresh };
}
/** Draw now and, once a frame at most, whenever one of the names changes. Returns what ends that. */
export function watch(model, names, draw) {
    let asked = 0;
    const ask = () => {
        asked ||= requestAnimationFrame(() => {
            asked = 0;
            draw();
        });
    };
    for (const name of names)
        model.on(`change:${name}`, ask);
    draw();
    return () => {
        cancelAnimationFrame(asked);
        for (const name of names)
            model.off(`change:${name}`, ask);
    };
}

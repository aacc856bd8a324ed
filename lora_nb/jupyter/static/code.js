/** The code that does what the control panel's form says, and two ways to take it into a cell. */
import { element, watch } from "./dom.js";
/** Whoever can insert a cell hears this event, which carries the code, and answers with `preventDefault`: see `lab/panel.ts`. */
export const INSERT = "lora-nb-insert";
function render({ model, el }) {
    const text = element("textarea", { "aria-label": "Code", class: "lora-code", rows: "12", spellcheck: "false" });
    const said = element("span", { role: "status" });
    const insert = button("Insert as a cell", async () => {
        const offer = new CustomEvent(INSERT, { bubbles: true, cancelable: true, detail: text.value });
        said.textContent = el.dispatchEvent(offer) ? `No cell can be inserted here. ${await copied(text)}` : "It is in the cell below.";
    });
    const copy = button("Copy", async () => void (said.textContent = await copied(text)));
    el.replaceChildren(element("div", { class: "lora-chart" }, text, element("div", { class: "lora-legend" }, insert, copy, said)));
    return watch(model, ["value"], () => {
        text.value = model.get("value");
        said.textContent = "";
    });
}
function button(label, pressed) {
    const made = element("button", { type: "button", class: "jupyter-button" }, label);
    made.addEventListener("click", () => void pressed());
    return made;
}
/** To the clipboard, which a page that is not trusted has not. */
async function copied(text) {
    try {
        await navigator.clipboard.writeText(text.value);
        return "Copied: paste it into a cell.";
    }
    catch {
        text.select();
        return "Selected: copy it with Ctrl C or ⌘ C.";
    }
}
export default { render };

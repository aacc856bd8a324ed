/** What a control panel in a notebook needs of JupyterLab: that keys pressed in it are its own, and that its code becomes a cell. */

import type { JupyterFrontEnd } from "@jupyterlab/application";
import type { Widget } from "@lumino/widgets";

import { INSERT } from "../charts/code.js";

/** What is used here of a notebook; its own types would be one more package. */
interface Notebook extends Widget {
  content?: Widget & { widgets: Widget[]; activeCellIndex: number };
  model?: { sharedModel?: { insertCell?(index: number, cell: { cell_type: "code"; source: string; metadata: object }): unknown } } | null;
}

export function servePanels(app: JupyterFrontEnd): void {
  // Before JupyterLab looks, for which an arrow in a list goes to the next cell, and a "b" in it makes one.
  window.addEventListener("keydown", keepKeys, true);
  document.addEventListener(INSERT, (event) => {
    if (insert(app, event.target as Node, (event as CustomEvent<string>).detail)) event.preventDefault();
  });
}

/** Keys with Ctrl, ⌘ or Alt stay JupyterLab's: saving, the palette. It looks for the mark on what has the focus first of all. */
function keepKeys({ target, ctrlKey, metaKey, altKey }: KeyboardEvent): void {
  if (!(target instanceof Element) || !target.closest(".lora-panel, .jp-OutputArea .lora-chart")) return;
  target.toggleAttribute("data-lm-suppress-shortcuts", !(ctrlKey || metaKey || altKey));
}

/** A cell with the code below the one that shows `from`, and the focus on it; whether there is such a notebook. */
function insert(app: JupyterFrontEnd, from: Node, source: string): boolean {
  const notebook = [...app.shell.widgets("main")].find((widget): widget is Notebook => widget.node.contains(from));
  const { content, model } = notebook ?? {};
  if (!content || !model?.sharedModel?.insertCell) return false;
  const at = content.widgets.findIndex((cell) => cell.node.contains(from));
  if (at < 0) return false;
  model.sharedModel.insertCell(at + 1, { cell_type: "code", source, metadata: {} });
  content.activeCellIndex = at + 1;
  content.activate();
  return true;
}

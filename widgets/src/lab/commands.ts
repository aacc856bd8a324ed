/** What the launcher and the palette offer. */

import type { JupyterFrontEnd } from "@jupyterlab/application";
import { Dialog, showDialog } from "@jupyterlab/apputils";
import type { IDocumentWidget } from "@jupyterlab/docregistry";

import { listed } from "./find";

const START = "00_start.ipynb";
const COURSE = ["notebooks", "lora_nb_course"]; // where a checkout and `lora-nb lab` have it
const PANEL = ["import lora_nb as ln\n\nln.panel()"];

/** Command → [label, what it is for, what it does]. */
export function commands(app: JupyterFrontEnd): Record<string, [string, string, (cwd: string) => Promise<void>]> {
  return {
    "lora-nb:course": ["LoRA: open the course", "Its first notebook", () => openCourse(app)],
    "lora-nb:panel": ["LoRA: new notebook with panel", "A notebook with the control panel, which is run at once", (cwd) => newPanel(app, cwd)],
    "lora-nb:check": ["LoRA: run all checks", "Restart the kernel of this notebook and run all of it, its checks included", () => runChecks(app)],
  };
}

async function openCourse(app: JupyterFrontEnd): Promise<void> {
  const { contents } = app.serviceManager;
  const top = await listed(contents, "");
  const folders = top.filter((entry) => entry.type === "directory" && COURSE.includes(entry.name));
  const inside = await Promise.all(folders.map((folder) => listed(contents, folder.path)));
  const start = [...top, ...inside.flat()].find((entry) => entry.name === START);
  if (start) return void (await app.commands.execute("docmanager:open", { path: start.path }));
  await say("The course is not in this folder", "In a terminal, lora-nb lab opens it. Or copy it into this folder: lora-nb lab makes lora_nb_course where it is started.");
}

async function newPanel(app: JupyterFrontEnd, cwd: string): Promise<void> {
  const { contents } = app.serviceManager;
  const refusal = "No notebook could be made here";
  try {
    const { writable } = await contents.get(cwd, { content: false });
    if (!writable) return await say(refusal, `The folder ${cwd || "at the top"} cannot be written to. Go to another one in the file browser, and ask again.`);
    const { path } = await contents.newUntitled({ path: cwd, type: "notebook" });
    const cells = PANEL.map((source) => ({ cell_type: "code", id: "panel", source, metadata: {}, outputs: [], execution_count: null }));
    const kernel = app.serviceManager.kernelspecs.specs?.default ?? "python3";
    const metadata = { kernelspec: { name: kernel, display_name: app.serviceManager.kernelspecs.specs?.kernelspecs[kernel]?.display_name ?? kernel } };
    await contents.save(path, { type: "notebook", format: "json", content: { cells, metadata, nbformat: 4, nbformat_minor: 5 } });
    const widget = (await app.commands.execute("docmanager:open", { path, factory: "Notebook", kernel: { name: kernel } })) as IDocumentWidget;
    await widget.context.ready;
    await widget.context.sessionContext.ready;
    await app.commands.execute("notebook:run-all-cells");
  } catch (error) {
    await say(refusal, error instanceof Error ? error.message : String(error));
  }
}

async function runChecks(app: JupyterFrontEnd): Promise<void> {
  const front = app.shell.currentWidget as Partial<IDocumentWidget> | null;
  await front?.context?.sessionContext.ready; // a notebook that has just been opened has no kernel to restart yet
  await front?.context?.sessionContext.session?.kernel?.info; // and one that has not answered once may lose what it is sent as it restarts
  if (app.commands.isEnabled("notebook:restart-run-all")) return void (await app.commands.execute("notebook:restart-run-all"));
  await say("No notebook is in front", "Open a notebook of the course, then run its checks.");
}

async function say(title: string, body: string): Promise<void> {
  await showDialog({ title, body, buttons: [Dialog.okButton()] });
}

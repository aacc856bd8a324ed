/** The JupyterLab extension: a viewer for adapters, a side panel, commands, and a hand for the control panel. There is no server part. */

import type { JupyterFrontEnd, JupyterFrontEndPlugin } from "@jupyterlab/application";
import { ICommandPalette } from "@jupyterlab/apputils";
import { ILauncher } from "@jupyterlab/launcher";
import { LabIcon } from "@jupyterlab/ui-components";

import { commands } from "./commands";
import { CONFIG, WEIGHTS } from "./names";
import { servePanels } from "./panel";
import { SidePanel } from "./side";
import { addStyles } from "./styles";
import { UnreadModelFactory, ViewerFactory } from "./viewer";

const CATEGORY = "LoRA";

// W and, beside it, the two thin matrices.
const icon = new LabIcon({
  name: "lora-nb:adapter",
  svgstr:
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><g class="jp-icon3" fill="#616161">' +
    '<path d="M2 6h11v12H2zM15 6h2.5v12H15zM19 6h4v2.5h-4z"/></g></svg>',
});

const viewer: JupyterFrontEndPlugin<void> = {
  id: "lora-nb:viewer",
  description: "Shows the adapter in a folder with adapter_config.json and adapter_model.safetensors",
  autoStart: true,
  activate: (app) => {
    addStyles();
    const types = [
      { name: "lora-adapter-weights", displayName: "LoRA adapter (weights)", pattern: exactly(WEIGHTS), mimeTypes: ["application/octet-stream"], fileFormat: "base64" as const },
      { name: "lora-adapter-config", displayName: "LoRA adapter (config)", pattern: exactly(CONFIG), mimeTypes: ["application/json"], fileFormat: "text" as const },
    ];
    for (const type of types) app.docRegistry.addFileType({ ...type, contentType: "file", extensions: [], icon });
    const fileTypes = types.map((type) => type.name);
    app.docRegistry.addModelFactory(new UnreadModelFactory());
    app.docRegistry.addWidgetFactory(
      new ViewerFactory({ name: "LoRA adapter", modelName: "lora-nb-unread", fileTypes, defaultFor: fileTypes, readOnly: true }, app.serviceManager.contents),
    );
  },
};

function exactly(name: string): string {
  return `^${name.replaceAll(".", "\\.")}$`;
}

const side: JupyterFrontEndPlugin<void> = {
  id: "lora-nb:side",
  description: "Memory, runs and adapters in the side bar",
  autoStart: true,
  activate: (app) => {
    const panel = new SidePanel(app.serviceManager, app.commands);
    panel.title.icon = icon;
    panel.title.caption = "LoRA: this machine, runs, adapters";
    app.shell.add(panel, "left", { rank: 900 });
    app.commands.addCommand("lora-nb:side", { label: "LoRA: show machine, runs and adapters", execute: () => app.shell.activateById(panel.id) });
  },
};

const verbs: JupyterFrontEndPlugin<void> = {
  id: "lora-nb:commands",
  description: "LoRA in the launcher and in the palette",
  autoStart: true,
  optional: [ICommandPalette, ILauncher],
  activate: (app: JupyterFrontEnd, palette: ICommandPalette | null, launcher: ILauncher | null) => {
    Object.entries(commands(app)).forEach(([command, [label, caption, run]], rank) => {
      app.commands.addCommand(command, {
        label,
        caption,
        icon,
        describedBy: { args: { type: "object", properties: { cwd: { type: "string", description: "the folder to work in" } } } },
        execute: (args) => run(typeof args.cwd === "string" ? args.cwd : ""),
      });
      palette?.addItem({ command, category: CATEGORY });
      launcher?.add({ command, category: CATEGORY, rank });
    });
  },
};

const panels: JupyterFrontEndPlugin<void> = {
  id: "lora-nb:panels",
  description: "Keys and code of the control panel in a notebook",
  autoStart: true,
  activate: servePanels,
};

export default [viewer, side, verbs, panels];

/** The side panel: this machine, its runs, the adapters of the workspace. It looks when it is shown, and when it is asked. */

import type { ServiceManager } from "@jupyterlab/services";
import type { CommandRegistry } from "@lumino/commands";
import { Widget } from "@lumino/widgets";

import { element, named } from "../charts/dom.js";
import { bytes, number } from "../charts/format.js";
import { findAdapters } from "./find";
import { type Answer, type Memory, type RunState, ask } from "./kernels";
import { CONFIG } from "./names";

export class SidePanel extends Widget {
  private places = { machine: element("div"), runs: element("div"), adapters: element("div") };
  private button = element("button", { type: "button", class: "jp-mod-styled" }, "Look again");
  private looking = false;

  constructor(
    private services: ServiceManager.IManager,
    private commands: CommandRegistry,
  ) {
    super();
    this.id = "lora-nb-side";
    this.addClass("lora-side");
    this.addClass("lora-chart");
    this.node.setAttribute("role", "region");
    this.node.setAttribute("aria-label", "LoRA");
    this.button.addEventListener("click", () => void this.look());
    const section = (title: string, place: HTMLElement) => element("section", {}, element("h3", {}, title), place);
    this.node.append(
      element("h2", {}, "LoRA"),
      this.button,
      section("This machine", this.places.machine),
      section("Runs", this.places.runs),
      section("Adapters in the workspace", this.places.adapters),
    );
  }

  protected override onAfterShow(): void {
    void this.look();
  }

  async look(): Promise<void> {
    if (this.looking) return;
    this.looking = true;
    this.node.setAttribute("aria-busy", "true");
    await Promise.all([this.kernels(), this.adapters()]);
    this.node.setAttribute("aria-busy", "false");
    this.looking = false;
  }

  private async kernels(): Promise<void> {
    const answers = await ask(this.services).catch((): Answer[] => []);
    const machine = answers.find((a) => a.machine.length)?.machine ?? [];
    const hint = answers.length ? answers.map((a) => line(named(a.where), `: ${a.notice}`)) : [line("No kernel runs.")];
    const load = line("A notebook that has imported lora_nb tells of its machine.");
    this.places.machine.replaceChildren(...(machine.length ? machine.map(meter) : [...hint, load]));
    const runs = answers.flatMap((a) => a.runs.map((run) => told(run, a.where)));
    this.places.runs.replaceChildren(runs.length ? element("ul", {}, ...runs) : line("None in a notebook that runs."));
  }

  private async adapters(): Promise<void> {
    const { folders, complete } = await findAdapters(this.services.contents);
    const list = folders.map((folder) => element("li", {}, this.opener(folder)));
    const rest = complete ? [] : [line("Not all folders were looked into.")];
    this.places.adapters.replaceChildren(list.length ? element("ul", {}, ...list) : line("None yet: lora_nb.save(model, path) makes one."), ...rest);
  }

  private opener(folder: string): HTMLElement {
    const button = element("button", { type: "button", class: "lora-link" }, element("bdi", {}, folder || "this folder"));
    const path = folder ? `${folder}/${CONFIG}` : CONFIG;
    button.addEventListener("click", () => void this.commands.execute("docmanager:open", { path }));
    return button;
  }
}

function line(...children: (Node | string)[]): HTMLElement {
  return element("p", {}, ...children);
}

function meter({ name, total, free }: Memory): HTMLElement {
  const text = `${bytes(total - free)} of ${bytes(total)} in use`;
  const bar = element("meter", { min: "0", max: String(total), value: String(total - free), "aria-label": `${name.slice(0, 80)}: ${text}` });
  return element("p", {}, named(name), element("br"), bar, " ", text);
}

function told(run: RunState, where: string): HTMLElement {
  const loss = run.loss === null ? "" : `, loss ${number(run.loss)}`;
  return element("li", {}, named(run.adapter), `: ${run.state}, ${number(run.steps)} steps${loss} – `, named(where));
}

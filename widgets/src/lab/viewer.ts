/** The document that opens for an adapter's files, read from the server by the Lab's own means. Nothing is written. */

import { ABCWidgetFactory, type DocumentRegistry, DocumentWidget, TextModelFactory } from "@jupyterlab/docregistry";
import { type Contents, ServerConnection } from "@jupyterlab/services";
import { Widget } from "@lumino/widgets";

import { element } from "../charts/dom.js";
import { bytes } from "../charts/format.js";
import { type Adapter, fromConfig, measured } from "./adapter";
import { asJson, facts, updates, warnings } from "./facts";
import { listed } from "./find";
import { CONFIG, WEIGHTS } from "./names";
import { MOST_FILE_BYTES, Refused, parse } from "./safetensors";

const MOST_CONFIG_BYTES = 1024 * 1024;
const PAUSE = 30; // milliseconds of work before the page may react

/** A model whose content is not fetched: a file of gigabytes would come as one text. */
export class UnreadModelFactory extends TextModelFactory {
  override get name(): string {
    return "lora-nb-unread";
  }
  override get fileFormat(): Contents.FileFormat {
    return null;
  }
}

export class ViewerFactory extends ABCWidgetFactory<DocumentWidget<AdapterView>> {
  constructor(
    options: DocumentRegistry.IWidgetFactoryOptions<DocumentWidget<AdapterView>>,
    private contents: Contents.IManager,
  ) {
    super(options);
  }

  protected createNewWidget(context: DocumentRegistry.Context): DocumentWidget<AdapterView> {
    const view = new AdapterView(context.path.replace(/[^/:]*$/, ""), this.contents);
    context.fileChanged.connect(() => void view.read());
    return new DocumentWidget({ content: view, context, reveal: view.read() });
  }
}

export class AdapterView extends Widget {
  private turn = 0;

  /** `folder` ends in a slash, or is empty or a drive. */
  constructor(
    private folder: string,
    private contents: Contents.IManager,
  ) {
    super();
    this.addClass("lora-viewer");
    this.addClass("lora-chart");
    this.node.tabIndex = 0;
    this.node.setAttribute("role", "region");
    this.node.setAttribute("aria-label", "Adapter");
  }

  /** Read both files and show them; a later call takes the place of one that is under way. */
  async read(): Promise<void> {
    const turn = ++this.turn;
    const status = element("p", { role: "status" }, "Reading …");
    this.fill(status);
    try {
      const { config, adapter } = fromConfig(await this.config());
      this.fill(facts(adapter), warnings(adapter.warnings), status);
      if (config.peft_type === "LORA") await this.weights(config, adapter, (text) => ((status.textContent = text), turn !== this.turn));
      if (turn !== this.turn) return;
      const there = adapter.modules.length > 0;
      this.fill(facts(adapter), warnings(adapter.warnings), ...(there ? [updates(adapter.modules)] : []), asJson(adapter));
    } catch (error) {
      if (turn === this.turn) this.refuse(error);
    }
  }

  private fill(...parts: HTMLElement[]): void {
    const name = this.folder.split("/").at(-2) ?? "";
    this.node.replaceChildren(element("h2", {}, element("bdi", {}, name ? `Adapter ${name}` : "Adapter")), ...parts);
  }

  private refuse(error: unknown): void {
    const why = error instanceof Error ? error.message : String(error);
    this.fill(element("p", { role: "alert" }, element("bdi", {}, why)));
  }

  /** The size of a file beside the one that was opened, asked before it is fetched. */
  private async size(name: string): Promise<number> {
    const there = await listed(this.contents, this.folder.replace(/\/$/, ""));
    const entry = there.find((e) => e.name === name);
    if (!entry) throw new Refused(`An adapter is a folder with ${CONFIG} and ${WEIGHTS}: ${name} is not here.`);
    return entry.size ?? 0;
  }

  private async config(): Promise<string> {
    const size = await this.size(CONFIG);
    if (size > MOST_CONFIG_BYTES) throw new Refused(`${CONFIG} has ${bytes(size)}: no adapter config is that large.`);
    return new TextDecoder().decode(await this.fetched(CONFIG));
  }

  /** Fill in what the weights tell. `tell` shows how far it is, and says whether to give up. */
  private async weights(config: Record<string, unknown>, adapter: Adapter, tell: (text: string) => boolean): Promise<void> {
    const size = await this.size(WEIGHTS);
    adapter.bytes = size;
    if (size > MOST_FILE_BYTES) {
      const most = bytes(MOST_FILE_BYTES);
      adapter.warnings.push(`The weights have ${bytes(size)}; over ${most} they are not read in the browser. In a notebook, lora_nb.inspect(folder) reads them.`);
      return;
    }
    const file = parse(await this.fetched(WEIGHTS));
    adapter.parameters = [...file.tensors.values()].reduce((all, t) => all + t.shape.reduce((n, d) => n * d, 1), 0);
    let since = performance.now();
    for (const module of measured(config, file, adapter.warnings)) {
      adapter.modules.push(module);
      if (performance.now() - since < PAUSE) continue;
      if (tell(`Measured ${adapter.modules.length} modules …`)) return;
      await new Promise((resolve) => setTimeout(resolve));
      since = performance.now();
    }
  }

  /** A file's bytes as they are: through the contents API they would be base64 inside JSON. */
  private async fetched(name: string): Promise<ArrayBuffer> {
    const settings = this.contents.serverSettings ?? ServerConnection.makeSettings();
    const url = await this.contents.getDownloadUrl(this.folder + name);
    const response = await ServerConnection.makeRequest(url, { cache: "no-store" }, settings);
    if (!response.ok) throw new ServerConnection.ResponseError(response);
    return response.arrayBuffer();
  }
}

/** The style sheets, which lie beside the extension as they are: bundled, they would bring loaders of others into it. */

import { PageConfig, URLExt } from "@jupyterlab/coreutils";

import { element } from "../charts/dom.js";

export function addStyles(): void {
  const place = PageConfig.getOption("fullLabextensionsUrl");
  for (const name of ["charts.css", "lab.css"]) {
    document.head.append(element("link", { rel: "stylesheet", href: URLExt.join(place, "lora-nb", "static", name) }));
  }
}

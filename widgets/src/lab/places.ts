/** Where in a model a module lies: `model.layers.3.mlp.up_proj` is `mlp.up_proj` of layer 3. */

import type { Heat } from "../charts/heatmap.js";

/** Path → [kind of module, number of its layer]. What all kinds begin with alike is left out. */
export function places(paths: string[]): Map<string, [string, string]> {
  const split = paths.map((path) => {
    const parts = path.split(".");
    const at = parts.findIndex((part, i) => /^\d+$/.test(part) && i < parts.length - 1);
    return { path, layer: at < 0 ? "–" : (parts[at] ?? "–"), kind: parts.map((part, i) => (i === at ? "*" : part)) };
  });
  let alike = 0;
  const first = split[0]?.kind ?? [];
  while (alike < first.length - 1 && split.every(({ kind }) => kind.length > alike + 1 && kind[alike] === first[alike])) alike += 1;
  return new Map(split.map(({ path, layer, kind }) => [path, [kind.slice(alike).join("."), layer]]));
}

/** The heat map of values by path, and which path is in which cell. */
export function grid(values: Map<string, number | null>, label: string): { heat: Heat; path: (row: number, column: number) => string | undefined } {
  const at = places([...values.keys()]);
  const rows = [...new Set([...at.values()].map(([kind]) => kind))];
  const columns = [...new Set([...at.values()].map(([, layer]) => layer))].sort((a, b) => Number(a) - Number(b) || a.localeCompare(b));
  const cells = rows.map(() => columns.map((): string | undefined => undefined));
  for (const [path, [kind, layer]] of at) cells[rows.indexOf(kind)]![columns.indexOf(layer)] = path;
  const heat = { rows, columns, label, values: cells.map((row) => row.map((path) => (path === undefined ? null : (values.get(path) ?? null)))) };
  return { heat, path: (row, column) => cells[row]?.[column] };
}

/** Adapters in the workspace: folders that hold an adapter's config, nearest to the top first. */

import type { Contents } from "@jupyterlab/services";

import { CONFIG } from "./names";

const MOST_FOLDERS = 300;
const MOST_DEPTH = 5;
const PASSED_OVER = new Set(["node_modules", "__pycache__", "site-packages", "venv"]);

/** `complete` says whether all folders were looked into. */
export async function findAdapters(contents: Contents.IManager): Promise<{ folders: string[]; complete: boolean }> {
  const folders: string[] = [];
  const waiting: [string, number][] = [["", 0]];
  let seen = 0;
  let deeper = false;
  for (let next = waiting.shift(); next && seen < MOST_FOLDERS; next = waiting.shift()) {
    seen += 1;
    const [path, depth] = next;
    for (const entry of await listed(contents, path)) {
      if (entry.type === "directory" && !entry.name.startsWith(".") && !PASSED_OVER.has(entry.name)) {
        if (depth < MOST_DEPTH) waiting.push([entry.path, depth + 1]);
        else deeper = true;
      } else if (entry.name === CONFIG) folders.push(path);
    }
  }
  return { folders, complete: !deeper && !waiting.length };
}

/** What is in a folder; one that cannot be read is passed over. */
export async function listed(contents: Contents.IManager, path: string): Promise<Contents.IModel[]> {
  try {
    const { content } = await contents.get(path, { content: true, type: "directory" });
    return Array.isArray(content) ? (content as Contents.IModel[]) : [];
  } catch {
    return [];
  }
}

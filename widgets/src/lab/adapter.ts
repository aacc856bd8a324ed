/** What an adapter in PEFT's format is, from its two files. */

import { singularValues } from "./linalg";
import { type Contents, Refused, type Tensor, object } from "./safetensors";

/** One adapted module: ΔW = scale · B A. Numbers are null where the file holds NaN or infinity. */
export interface Module {
  path: string;
  rank: number;
  fanIn: number;
  fanOut: number;
  scale: number;
  norm: number | null;
  singularValues: number[] | null;
}

/** The result: what `Numbers as JSON` shows, described in widgets/README.md. */
export interface Adapter {
  method: string;
  base: string | null;
  rank: number | null;
  alpha: number | null;
  targets: string[];
  parameters: number | null;
  bytes: number | null;
  modules: Module[];
  warnings: string[];
}

type Config = Record<string, unknown>;
type Pair = Partial<Record<"A" | "B", Tensor>>;

const PREFIX = "base_model.model.";
const KEY = /^base_model\.model\.(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))$/s;
const MOST_WARNINGS = 20;
const MOST_MODULES = 4000; // each is a cell of the map; the largest models have some 600
const MOST_RANK = 512; // beyond it an SVD would hold the page up

/** The config alone, before the weights are read. */
export function fromConfig(text: string): { config: Config; adapter: Adapter } {
  let read: unknown;
  try {
    read = JSON.parse(text);
  } catch {
    throw new Refused("adapter_config.json is not valid JSON: copy or save the adapter again.");
  }
  const config = object(read);
  const known = config.peft_type === "LORA";
  const method = known ? `${config.use_dora ? "DoRA" : "LoRA"}${config.use_rslora ? ", rank-stabilised" : ""}` : word(config.peft_type ?? config.architecture ?? "unknown");
  const warnings = known ? [] : [`Not LoRA in PEFT's format (peft_type ${word(config.peft_type)}): only what its config says is shown.`];
  if (config.use_dora) warnings.push("DoRA: ‖ΔW‖ is that of its low-rank part, before the magnitudes.");
  return {
    config,
    adapter: {
      method,
      base: typeof config.base_model_name_or_path === "string" ? config.base_model_name_or_path : null,
      rank: count(config.r),
      alpha: count(config.lora_alpha),
      targets: Array.isArray(config.target_modules) ? config.target_modules.map(word).sort() : config.target_modules ? [word(config.target_modules)] : [],
      parameters: null,
      bytes: null,
      modules: [],
      warnings,
    },
  };
}

/** The modules, one by one: between two of them the page can breathe. */
export function* measured(config: Config, { tensors }: Contents, warnings: string[]): Generator<Module> {
  const pairs = new Map<string, Pair>();
  for (const [key, tensor] of tensors) {
    const [, path, plain, embedding] = KEY.exec(key) ?? [];
    const side = (plain ?? embedding) as "A" | "B" | undefined;
    if (path && side) pairs.set(path, { ...pairs.get(path), [side]: tensor });
    else if (!/\.lora_magnitude_vector|\.lora_B\.bias$/.test(key)) warn(warnings, `${key.replace(PREFIX, "")} is no part of a low-rank update: not measured.`);
  }
  if (pairs.size > MOST_MODULES) warn(warnings, `Of ${pairs.size} modules the first ${MOST_MODULES} are measured.`);
  for (const [path, { A, B }] of [...pairs].slice(0, MOST_MODULES)) {
    const shape = A && B ? fit(A.shape, B.shape) : null;
    if (!A || !B || !shape) {
      warn(warnings, `${path} has no pair of A and B that fit each other.`);
      continue;
    }
    if (shape.rank > MOST_RANK) {
      warn(warnings, `${path} has rank ${shape.rank}: over ${MOST_RANK} is not measured here, lora_nb.inspect reads it.`);
      continue;
    }
    const scale = scaling(config, path, shape.rank, warnings);
    const values = singularValues(A.values(), B.values(), shape.rank).map((s) => Math.abs(scale) * s);
    const sound = values.every(Number.isFinite);
    if (!sound) warn(warnings, `${path} holds NaN or infinity.`);
    yield { path, ...shape, scale, norm: sound ? Math.hypot(...values) : null, singularValues: sound ? values : null };
  }
}

function warn(warnings: string[], text: string): void {
  if (warnings.length < MOST_WARNINGS) warnings.push(text);
  else if (warnings.length === MOST_WARNINGS) warnings.push("There is more of the kind.");
}

/** A (r, …) and B (out, r, 1 …) of one module. */
function fit(a: number[], b: number[]): { rank: number; fanIn: number; fanOut: number } | null {
  const product = (shape: number[]) => shape.reduce((all, n) => all * n, 1);
  const rank = a[0] ?? 0;
  if (a.length < 2 || b.length < 2 || rank < 1 || b[1] !== rank || product(b.slice(2)) !== 1 || !product(a) || !product(b)) return null;
  return { rank, fanIn: product(a.slice(1)), fanOut: b[0] ?? 0 };
}

/** α / r, with r from the tensors; α may be another for some modules. */
function scaling(config: Config, path: string, rank: number, warnings: string[]): number {
  const patterns = config.alpha_pattern ? Object.entries(object(config.alpha_pattern)) : [];
  const special = patterns.find(([pattern]) => fits(pattern, path, warnings));
  const alpha = count(special?.[1]) ?? count(config.lora_alpha) ?? rank;
  return alpha / (config.use_rslora ? Math.sqrt(rank) : rank);
}

/** As PEFT matches: the end of the path, from a dot on. Patterns with repeats may take for ever, so they are not run. */
function fits(pattern: string, path: string, warnings: string[]): boolean {
  if (!/^[\w.\\^$|-]*$/.test(pattern)) {
    const text = `alpha_pattern has a pattern with brackets or repeats, ${pattern.slice(0, 80)}: it is not heeded here, lora_nb.inspect does.`;
    if (!warnings.includes(text)) warn(warnings, text);
    return false;
  }
  try {
    return new RegExp(`^(?:.*\\.)?(?:${pattern})$`).test(path);
  } catch {
    return false;
  }
}

function word(value: unknown): string {
  return typeof value === "string" ? value : (JSON.stringify(value) ?? "not said");
}

function count(value: unknown): number | null {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

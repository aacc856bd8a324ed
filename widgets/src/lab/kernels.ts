/** Asking kernels that run already; none is started for a look. */

import type { Kernel, KernelMessage, ServiceManager } from "@jupyterlab/services";

export interface Memory {
  name: string;
  total: number;
  free: number;
}

export interface RunState {
  adapter: string;
  state: string;
  steps: number;
  loss: number | null;
}

export interface Answer {
  where: string;
  machine: Memory[];
  runs: RunState[];
  /** Why there is nothing else. */
  notice: string;
}

const PATIENCE = 3000; // a kernel that runs a cell answers after it
// Only where lora_nb is imported already: importing torch for a look would cost seconds and memory.
const ASK = "__import__('lora_nb.jupyter.machine', fromlist=['state']).state() if 'lora_nb' in __import__('sys').modules else ''";

export async function ask(manager: ServiceManager.IManager): Promise<Answer[]> {
  await manager.sessions.refreshRunning();
  const sessions = [...manager.sessions.running()].filter((s) => s.kernel);
  return Promise.all(sessions.map(async ({ kernel, path, name }) => ({ where: path || name, ...(await one(manager, kernel!)) })));
}

async function one(manager: ServiceManager.IManager, model: Kernel.IModel): Promise<Omit<Answer, "where">> {
  const nothing = { machine: [], runs: [] };
  const kernel = manager.kernels.connectTo({ model, handleComms: false });
  try {
    const text = await within(evaluated(kernel), PATIENCE);
    if (text === null) return { ...nothing, notice: "busy" };
    if (!text) return { ...nothing, notice: "lora_nb is not loaded there" };
    return { ...nothing, ...(JSON.parse(text) as object), notice: "" };
  } catch {
    return { ...nothing, notice: "no answer" };
  } finally {
    kernel.dispose();
  }
}

/** The value of `ASK`: a Python string, shown as a literal of JSON letters only. */
async function evaluated(kernel: Kernel.IKernelConnection): Promise<string> {
  const future = kernel.requestExecute({ code: "", silent: true, store_history: false, user_expressions: { state: ASK } });
  const { content } = (await future.done) as KernelMessage.IExecuteReplyMsg;
  if (content.status !== "ok") return "";
  const state = (content as KernelMessage.IReplyOkContent & { user_expressions: Record<string, { data?: Record<string, string> }> }).user_expressions.state;
  const shown = state?.data?.["text/plain"] ?? "";
  return shown.length > 2 ? atob(shown.slice(1, -1)) : "";
}

function within<T>(promise: Promise<T>, milliseconds: number): Promise<T | null> {
  return Promise.race([promise, new Promise<null>((resolve) => setTimeout(() => resolve(null), milliseconds))]);
}

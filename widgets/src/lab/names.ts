/** The files of an adapter, as Hugging Face PEFT names them. */

export const CONFIG = "adapter_config.json";
export const WEIGHTS = "adapter_model.safetensors";

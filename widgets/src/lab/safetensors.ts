/** Reading a safetensors file: the header is held to the format, byte by byte, before a number is read. Nothing is executed. */

/** Why a file is not shown; written for the person who opened it. */
export class Refused extends Error {}

export interface Tensor {
  shape: number[];
  dtype: string;
  /** The numbers, decoded when they are asked for. */
  values(): Float64Array;
}

export interface Contents {
  tensors: Map<string, Tensor>;
  metadata: Map<string, string>;
}

export const MOST_FILE_BYTES = 128 * 1024 * 1024;
const MOST_HEADER_BYTES = 8 * 1024 * 1024;
const MOST_DIMENSIONS = 8;
const SIZES: Record<string, number> = { F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, I16: 2, I8: 1, U8: 1, BOOL: 1, F8_E4M3: 1, F8_E5M2: 1 };
const DAMAGED = "The file is damaged, cut short or no safetensors file: copy or save it again.";

export function parse(file: ArrayBuffer): Contents {
  if (file.byteLength < 8) throw new Refused(DAMAGED);
  const length = new DataView(file).getBigUint64(0, true);
  if (length > BigInt(Math.min(MOST_HEADER_BYTES, file.byteLength - 8))) throw new Refused(`It claims a header of ${length} bytes. ${DAMAGED}`);
  const start = 8 + Number(length);
  const entries = Object.entries(object(json(new Uint8Array(file, 8, Number(length)))));
  const metadata = new Map<string, string>();
  const tensors = new Map<string, Tensor>();
  const spans: [number, number][] = [];
  for (const [name, entry] of entries) {
    if (name === "__metadata__") {
      for (const [key, value] of Object.entries(object(entry))) metadata.set(key, String(value));
      continue;
    }
    const { dtype, shape, from, to } = place(name, object(entry), file.byteLength - start);
    spans.push([from, to]);
    tensors.set(name, { dtype, shape, values: () => decode(new DataView(file, start + from, to - from), dtype) });
  }
  refuseHoles(spans, file.byteLength - start);
  return { tensors, metadata };
}

function json(bytes: Uint8Array): unknown {
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw new Refused(`Its header is no JSON. ${DAMAGED}`);
  }
}

export function object(value: unknown): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Refused(DAMAGED);
  return value as Record<string, unknown>;
}

function place(name: string, { dtype, shape, data_offsets: offsets }: Record<string, unknown>, room: number) {
  const whole = (n: unknown): n is number => Number.isSafeInteger(n) && (n as number) >= 0;
  const known = typeof dtype === "string" && Object.hasOwn(SIZES, dtype);
  const shaped = Array.isArray(shape) && shape.length <= MOST_DIMENSIONS && shape.every(whole);
  if (!known || !shaped || !Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(whole)) {
    throw new Refused(`Its entry ${JSON.stringify(name.slice(0, 80))} is none of a tensor. ${DAMAGED}`);
  }
  const [from, to] = offsets as [number, number];
  const count = shape.reduce((all: number, n: number) => all * n, 1);
  if (from > to || to > room || count * (SIZES[dtype] ?? 0) !== to - from) {
    throw new Refused(`Its tensor ${JSON.stringify(name.slice(0, 80))} has ${to - from} bytes for ${count} numbers of ${dtype}. ${DAMAGED}`);
  }
  return { dtype, shape: shape as number[], from, to };
}

/** Tensors lie behind one another: what overlaps or leaves a hole was not written by an honest program. */
function refuseHoles(spans: [number, number][], room: number): void {
  let end = 0;
  for (const [from, to] of spans.sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
    if (from !== end) throw new Refused(`Its tensors overlap or leave holes. ${DAMAGED}`);
    end = to;
  }
  if (end !== room) throw new Refused(`It has ${room - end} bytes that belong to no tensor. ${DAMAGED}`);
}

function decode(view: DataView, dtype: string): Float64Array {
  const size = SIZES[dtype] ?? 1;
  const read: Record<string, (at: number) => number> = {
    F64: (at) => view.getFloat64(at, true),
    F32: (at) => view.getFloat32(at, true),
    F16: (at) => half(view.getUint16(at, true)),
    BF16: (at) => brain(view.getUint16(at, true)),
  };
  const one = read[dtype];
  if (!one) throw new Refused(`It holds ${dtype}, not floating-point numbers of 16 bits or more.`);
  const out = new Float64Array(view.byteLength / size);
  for (let i = 0; i < out.length; i++) out[i] = one(i * size);
  return out;
}

/** IEEE 754 binary16: 1 bit sign, 5 bits exponent, 10 bits fraction. */
function half(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -14 * (fraction / 1024);
}

const bits32 = new DataView(new ArrayBuffer(4));

/** bfloat16: the upper half of a float32. */
function brain(bits: number): number {
  bits32.setUint32(0, bits << 16);
  return bits32.getFloat32(0);
}

/** The picture of a loss curve on a canvas: however many points there are, each column of pixels is drawn once. */

import { number, ticks } from "./format.js";

/** Losses of steps 1, 2, …; held-out losses as [step, loss]; the step that the reader looks at, or 0. */
export interface Curve {
  losses: Float32Array;
  held: [number, number | null][];
  cursor: number;
}

const LEFT = 52;
const BOTTOM = 22;
const TOP = 8;
const RIGHT = 10;

/** The step under a point of the picture. */
export function stepAt(x: number, width: number, steps: number): number {
  const share = (x - LEFT) / (width - LEFT - RIGHT);
  return Math.min(steps, Math.max(1, Math.round(1 + share * (steps - 1))));
}

export function paint(canvas: HTMLCanvasElement, curve: Curve): void {
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  const ratio = window.devicePixelRatio || 1;
  // Setting a canvas's size clears it, and costs more than a fillRect: only where it changed.
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  if (!pen || !width) return;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const style = getComputedStyle(canvas);
  const [low, high] = range(curve);
  const steps = Math.max(2, curve.losses.length, ...curve.held.map(([step]) => step));
  const x = (step: number) => LEFT + ((step - 1) / (steps - 1)) * (width - LEFT - RIGHT);
  const y = (loss: number) => TOP + (1 - (loss - low) / (high - low)) * (height - TOP - BOTTOM);
  axes(pen, style, { x, y, low, high, steps, width, height });
  pen.strokeStyle = style.getPropertyValue("--lora-one");
  pen.lineWidth = 1.5;
  line(pen, curve.losses, x, y);
  heldOut(pen, style.getPropertyValue("--lora-two"), curve.held, x, y);
  if (curve.cursor) mark(pen, style.color, x(curve.cursor), height);
}

/** Lowest and highest of all losses that are numbers, with a little air. */
function range({ losses, held }: Curve): [number, number] {
  let low = Infinity;
  let high = -Infinity;
  const see = (loss: number) => {
    if (!Number.isFinite(loss)) return;
    low = Math.min(low, loss);
    high = Math.max(high, loss);
  };
  losses.forEach(see);
  for (const [, loss] of held) see(loss ?? NaN);
  if (low > high) return [0, 1];
  const air = (high - low || Math.abs(high) || 1) * 0.05;
  return [low - air, high + air];
}

interface Frame {
  x: (step: number) => number;
  y: (loss: number) => number;
  low: number;
  high: number;
  steps: number;
  width: number;
  height: number;
}

function axes(pen: CanvasRenderingContext2D, style: CSSStyleDeclaration, f: Frame): void {
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = style.color;
  pen.strokeStyle = style.getPropertyValue("--lora-grid");
  pen.lineWidth = 1;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (const tick of ticks(f.low, f.high, 4)) {
    pen.beginPath();
    pen.moveTo(LEFT, Math.round(f.y(tick)) + 0.5);
    pen.lineTo(f.width - RIGHT, Math.round(f.y(tick)) + 0.5);
    pen.stroke();
    pen.fillText(number(Number(tick.toPrecision(6))), LEFT - 6, f.y(tick));
  }
  pen.textAlign = "center";
  pen.textBaseline = "top";
  for (const tick of ticks(1, f.steps, 6).filter(Number.isInteger)) pen.fillText(number(tick), f.x(tick), f.height - BOTTOM + 6);
}

/** A polyline; where a column of pixels holds several points, a bar from its lowest to its highest, which costs far less. */
function line(pen: CanvasRenderingContext2D, losses: Float32Array, x: (step: number) => number, y: (loss: number) => number): void {
  const dense = losses.length > 2 * (x(losses.length) - x(1));
  if (dense) return bars(pen, losses, x, y);
  pen.beginPath();
  let gap = true;
  losses.forEach((loss, i) => {
    const known = Number.isFinite(loss);
    if (known && gap) pen.moveTo(x(i + 1), y(loss));
    else if (known) pen.lineTo(x(i + 1), y(loss));
    gap = !known;
  });
  pen.stroke();
}

function bars(pen: CanvasRenderingContext2D, losses: Float32Array, x: (step: number) => number, y: (loss: number) => number): void {
  const lows = new Map<number, number>();
  const highs = new Map<number, number>();
  losses.forEach((loss, i) => {
    if (!Number.isFinite(loss)) return;
    const column = Math.round(x(i + 1));
    lows.set(column, Math.min(lows.get(column) ?? loss, loss));
    highs.set(column, Math.max(highs.get(column) ?? loss, loss));
  });
  pen.fillStyle = pen.strokeStyle;
  for (const [column, high] of highs) {
    const low = lows.get(column) ?? high;
    // Bars of neighbours meet, so that a steep fall is no gap.
    const top = y(Math.max(high, lows.get(column - 1) ?? high));
    const bottom = y(Math.min(low, highs.get(column - 1) ?? low));
    pen.fillRect(column, top, 1, Math.max(1.5, bottom - top));
  }
}

function heldOut(pen: CanvasRenderingContext2D, colour: string, held: [number, number | null][], x: (s: number) => number, y: (l: number) => number): void {
  const there = held.filter((point): point is [number, number] => Number.isFinite(point[1]));
  pen.strokeStyle = pen.fillStyle = colour;
  pen.setLineDash([5, 3]); // told apart without colour, too
  pen.beginPath();
  for (const [step, loss] of there) pen.lineTo(x(step), y(loss));
  pen.stroke();
  pen.setLineDash([]);
  for (const [step, loss] of there) {
    pen.beginPath();
    pen.arc(x(step), y(loss), 4, 0, 2 * Math.PI);
    pen.fill();
  }
}

function mark(pen: CanvasRenderingContext2D, colour: string, x: number, height: number): void {
  pen.strokeStyle = colour;
  pen.lineWidth = 1;
  pen.beginPath();
  pen.moveTo(x, TOP);
  pen.lineTo(x, height - BOTTOM);
  pen.stroke();
}

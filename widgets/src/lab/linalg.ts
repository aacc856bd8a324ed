/** The singular values of B A without making it: QR of both factors, then an SVD of only r × r. */

/** Columns of a matrix. */
export type Columns = Float64Array[];

/** A (r, fan-in) and B (out, r) lie row by row. */
export function singularValues(A: Float64Array, B: Float64Array, r: number): number[] {
  const rows = Array.from({ length: r }, (_, i) => A.slice((i * A.length) / r, ((i + 1) * A.length) / r)); // the columns of Aᵀ
  const columns = Array.from({ length: r }, (_, j) => column(B, j, r));
  return jacobi(timesTransposed(triangle(columns), triangle(rows)));
}

function column(M: Float64Array, j: number, width: number): Float64Array {
  const out = new Float64Array(M.length / width);
  for (let i = 0; i < out.length; i++) out[i] = M[i * width + j] ?? 0;
  return out;
}

/** The columns of R in M = Q R (Householder). Where M has fewer rows than columns, R is as flat. */
export function triangle(M: Columns): Columns {
  const height = M[0]?.length ?? 0;
  M.forEach((column, k) => {
    if (k >= height) return;
    const length = Math.hypot(...chunks(column.subarray(k)));
    if (!length) return;
    const v = column.slice(k);
    v[0] = (v[0] ?? 0) + ((v[0] ?? 0) < 0 ? -length : length);
    const square = dot(v, v);
    for (const other of M.slice(k)) {
      const part = other.subarray(k);
      const share = (2 * dot(v, part)) / square;
      for (let i = 0; i < v.length; i++) part[i] = (part[i] ?? 0) - share * (v[i] ?? 0);
    }
  });
  return M.map((column, k) => column.slice(0, Math.min(height, M.length)).fill(0, k + 1));
}

/** Norms of parts that are short enough to be arguments. */
function chunks(column: Float64Array): number[] {
  return Array.from({ length: Math.ceil(column.length / 4096) }, (_, i) => Math.hypot(...column.subarray(4096 * i, 4096 * (i + 1))));
}

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += (a[i] ?? 0) * (b[i] ?? 0);
  return sum;
}

/** The columns of X Yᵀ. */
function timesTransposed(X: Columns, Y: Columns): Columns {
  const height = X[0]?.length ?? 0;
  return Array.from({ length: Y[0]?.length ?? 0 }, (_, j) => {
    const out = new Float64Array(height);
    X.forEach((x, k) => {
      const y = Y[k]?.[j] ?? 0;
      for (let i = 0; i < height; i++) out[i] = (out[i] ?? 0) + (x[i] ?? 0) * y;
    });
    return out;
  });
}

/** Singular values, largest first: turn pairs of columns until all are at right angles; their lengths are it (Hestenes, 1958). */
export function jacobi(M: Columns): number[] {
  for (let sweep = 0; sweep < 40; sweep++) {
    let turned = false;
    for (let p = 0; p < M.length; p++) for (let q = p + 1; q < M.length; q++) turned = turn(M[p]!, M[q]!) || turned;
    if (!turned) break;
  }
  return M.map((column) => Math.sqrt(dot(column, column))).sort((a, b) => b - a);
}

function turn(x: Float64Array, y: Float64Array): boolean {
  const [xx, yy, xy] = [dot(x, x), dot(y, y), dot(x, y)];
  if (Math.abs(xy) <= 1e-14 * Math.sqrt(xx * yy) || !Number.isFinite(xy)) return false;
  const zeta = (yy - xx) / (2 * xy);
  const t = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.hypot(1, zeta));
  const c = 1 / Math.hypot(1, t);
  for (let i = 0; i < x.length; i++) {
    const [a, b] = [x[i] ?? 0, y[i] ?? 0];
    x[i] = c * (a - t * b);
    y[i] = c * (t * a + b);
  }
  return true;
}

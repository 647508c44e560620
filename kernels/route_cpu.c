/* Fused depth routing for CPUs: one read of every source forward, one read backward (README.md).

route_cpu.py compiles and calls this; operators.py says what the functions are for. A thread takes whole samples, and
sums over tokens are kept per sample and added up afterwards in one order: the number of threads changes no bit. Within
a sample, a block of rows goes through one source after the other, and stays in the cache for the second look at it. Row
by row, sources that lie a power of two apart would evict each other. The processor does not foresee the jump from one
source to the next, so each row asks for the same row of the next source.

Numbers are float32, rows of sources, states and gradients contiguous.
Shapes: B batch, T tokens, D width, n sources; a row is the D numbers of one token. */
#include <math.h>
#include <stddef.h>
#include <string.h>

#define BLOCK 1024  /* numbers of a source in one block: 4 KiB */

typedef ptrdiff_t size;
typedef const float *restrict in;
typedef float *restrict out;

typedef struct {
    size B, T, D, n;
    int threads;
} Shape;

/* A row for every token, or one for all tokens of a sample, or of all samples: strides are then 0. */
typedef struct {
    float *first;
    size sample_stride, token_stride;
} Rows;

static float *row_of(Rows rows, size sample, size token) {
    return rows.first + sample * rows.sample_stride + token * rows.token_stride;
}

static size smaller(size a, size b) { return a < b ? a : b; }

static size rows_per_block(Shape s) {
    size rows = smaller(smaller(BLOCK / s.D, 64), 16384 / s.n); /* what is kept per row and source must fit a stack */
    return rows > 1 ? rows : 1;
}

static void fetch(const float *row, size D) {
    for (size d = 0; d < D; d += 16) __builtin_prefetch(row + d);
}

static float dot(in a, in b, size D) {
    float sum = 0;
    for (size d = 0; d < D; d++) sum += a[d] * b[d];
    return sum;
}

static void add(out sum, in a, size D) {
    for (size d = 0; d < D; d++) sum[d] += a[d];
}

static void clear(out values, size count) { memset(values, 0, count * sizeof *values); }

/* parts (B, D) added up to sum (D). */
static void sum_samples(in parts, size B, size D, out sum) {
    clear(sum, D);
    for (size b = 0; b < B; b++) add(sum, parts + b * D, D);
}

/* q' = g * q / sqrt(D), so that a logit is v . q' / rms(v) and no key is formed. */
static void fold(in q, in g, size D, out folded) {
    float scale = 1 / sqrtf((float)D);
    for (size d = 0; d < D; d++) folded[d] = q[d] * g[d] * scale;
}

/* From the gradient of q' those of q and g; the latter is added. */
static void fold_backward(in dfolded, in q, in g, size D, out dq, out dg) {
    float scale = 1 / sqrtf((float)D);
    for (size d = 0; d < D; d++) dq[d] = dfolded[d] * g[d] * scale, dg[d] += dfolded[d] * q[d] * scale;
}

/* Logits of some rows of one source, and 1 / rms of these. next: what is read after them. */
static void logits_of(in v, const float *next, in folded, size own, float eps, size rows, size D, out logit,
                      out inverse) {
    for (size r = 0; r < rows; r++) {
        fetch(next + r * D, D);
        in row = v + r * D, q = folded + r * own;
        float square = 0, along = 0;
        for (size d = 0; d < D; d++) square += row[d] * row[d], along += row[d] * q[d];
        inverse[r] = square * (1.0f / D), logit[r] = along;
    }
    for (size r = 0; r < rows; r++) inverse[r] = 1 / sqrtf(inverse[r] + eps), logit[r] *= inverse[r];
}

/* e^x for x <= 0 (Cephes), to a relative 1e-7 near 1 and 5e-6 near e^-87, below which it is 0; NaN stays. expf would be
   a call for each number. */
static inline float exponential(float x) {
    float kept = x > -87 ? x : -87;
    float whole = __builtin_rintf(kept * 1.44269504f), rest = kept - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1;
    union { int bits; float value; } power = {((int)whole + 127) << 23};
    return x > -87 ? p * power.value : x == x ? 0 : x;
}

/* Logits of some rows, n of each that lie `stride` apart, to weights. lse: their log-sum-exp, -inf for one source. */
static void softmax(float *values, size n, size stride, size rows, float *lse) {
    float largest[rows], total[rows];
    for (size r = 0; r < rows; r++) largest[r] = values[r], total[r] = 0;
    for (size i = 1; i < n; i++)
        for (size r = 0; r < rows; r++) {
            float x = values[i * stride + r];
            largest[r] = x > largest[r] ? x : largest[r];
        }
    for (size i = 0; i < n; i++)
        for (size r = 0; r < rows; r++)
            total[r] += values[i * stride + r] = exponential(values[i * stride + r] - largest[r]);
    for (size r = 0; r < rows; r++) {
        if (lse) lse[r] = n == 1 ? -INFINITY : largest[r] + logf(total[r]);
        total[r] = 1 / total[r];
    }
    for (size i = 0; i < n; i++)
        for (size r = 0; r < rows; r++) values[i * stride + r] *= total[r];
}

/* h = sum_i a_i v_i of one row, two sources at a time, or most of the work would be to load and store h. */
static void weighted_sum(float *const *sources, size at, const float *alpha, size stride, size n, size D, out h) {
    clear(h, D);
    for (size i = 0; i < n; i += 2) {
        size j = smaller(i + 1, n - 1);
        float a = alpha[i * stride], b = j > i ? alpha[j * stride] : 0;
        in v = sources[i] + at, w = sources[j] + at;
        for (size d = 0; d < D; d++) h[d] += a * v[d] + b * w[d];
    }
}

/* The row without its mean and divided by its deviation. Returns the reciprocal of that deviation. */
static float normalize(in h, float eps, size D, out normalized) {
    float mean = 0, square = 0;
    for (size d = 0; d < D; d++) mean += h[d];
    mean *= 1.0f / D;
    for (size d = 0; d < D; d++) square += (h[d] - mean) * (h[d] - mean);
    float inverse = 1 / sqrtf(square * (1.0f / D) + eps);
    for (size d = 0; d < D; d++) normalized[d] = (h[d] - mean) * inverse;
    return inverse;
}

/* h, the log-sum-exp of the logits, and unless x is NULL also x = LayerNorm(h) (1 + scale) + shift. */
void dar_forward(Shape s, float *const *sources, Rows query, in g, float eps, float *h, float *lse,
                 float *x, Rows shift, Rows scale, float norm_eps) {
    size block = rows_per_block(s), D = s.D, own = query.token_stride;
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
    for (size b = 0; b < s.B; b++) {
        float folded[own ? block * D : D], alpha[s.n * block], inverse[block];
        if (!own) fold(row_of(query, b, 0), g, D, folded);
        for (size t = 0; t < s.T; t += block) {
            size rows = smaller(block, s.T - t), at = b * s.T + t;
            for (size r = 0; r < rows && own; r++) fold(row_of(query, b, t + r), g, D, folded + r * D);
            for (size i = 0; i < s.n; i++)
                logits_of(sources[i] + at * D, sources[smaller(i + 1, s.n - 1)] + at * D, folded, own, eps, rows, D,
                          alpha + i * block, inverse);
            softmax(alpha, s.n, block, rows, lse + at);
            for (size r = 0; r < rows; r++) {
                float *row = h + (at + r) * D, *modulated = x + (at + r) * D;
                weighted_sum(sources, (at + r) * D, alpha + r, block, s.n, D, row);
                if (!x) continue;
                in sc = row_of(scale, b, t), sh = row_of(shift, b, t);
                normalize(row, norm_eps, D, modulated);
                for (size d = 0; d < D; d++) modulated[d] = modulated[d] * (1 + sc[d]) + sh[d];
            }
        }
    }
}

/* Gradients of a row of x = LayerNorm(h) (1 + scale) + shift; those of shift and scale are added. */
static void modulate_backward(in dx, in h, in scale, float eps, size D, out dh, out dshift, out dscale) {
    float normalized[D], inverse = normalize(h, eps, D, normalized), mean = 0, along = 0;
    for (size d = 0; d < D; d++) {
        dshift[d] += dx[d];
        dscale[d] += dx[d] * normalized[d];
        dh[d] = dx[d] * (1 + scale[d]);
        mean += dh[d];
        along += dh[d] * normalized[d];
    }
    mean *= 1.0f / D, along *= 1.0f / D;
    for (size d = 0; d < D; d++) dh[d] = inverse * (dh[d] - mean - along * normalized[d]);
}

/* The n sources' parts in the gradients of some rows. With r = 1 / rms(v), s = r (v . q') and the weight a:
       ds_i = a_i (dh . v_i - sum_j a_j dh . v_j)
       dv = known + a dh + y q' + z v,   dq' += y v,   y = ds r,   z = -ds s r^2 / D
   The sum over j is formed from the same numbers, not as dh . h, so that the ds of a row add up to zero. From logits,
   gains dh . v and r to a, y and z, in place. */
static void coefficients(float *alpha, float *gain, float *inverse, size n, size stride, size rows, size D) {
    float logits[n * stride], mean[rows];
    memcpy(logits, alpha, n * stride * sizeof *alpha);
    softmax(alpha, n, stride, rows, NULL);
    clear(mean, rows);
    for (size i = 0; i < n; i++)
        for (size r = 0; r < rows; r++) mean[r] += alpha[i * stride + r] * gain[i * stride + r];
    for (size i = 0; i < n; i++)
        for (size r = 0; r < rows; r++) {
            size k = i * stride + r;
            float y = alpha[k] * (gain[k] - mean[r]) * inverse[k];
            gain[k] = y, inverse[k] = -y * logits[k] * inverse[k] * (1.0f / D);
        }
}

static void source_backward(in v, int known, in dh, in folded, float a, float y, float z, size D, out dv, out dfolded) {
    if (known)
        for (size d = 0; d < D; d++) dv[d] += a * dh[d] + y * folded[d] + z * v[d];
    else
        for (size d = 0; d < D; d++) dv[d] = a * dh[d] + y * folded[d] + z * v[d];
    for (size d = 0; d < D; d++) dfolded[d] += y * v[d];
}

/* Gradients of all that dar_forward read, from dx and dh, of which one may be NULL; known[i] is added unless NULL. It
   may be the memory of gradients[i].
   dshift and dscale are (B, D), and unused without dx. parts (2, B, D): for the gradients by sample of what is shared. */
void dar_backward(Shape s, float *const *sources, float *const *known, float *const *gradients, const float *dx,
                  const float *dh, const float *h, Rows query, in g, float eps, Rows scale, float norm_eps, float *parts,
                  Rows dquery, float *dweight, float *dshift, float *dscale) {
    size block = rows_per_block(s), D = s.D, own = query.token_stride;
    float *dquery_shared = query.sample_stride ? NULL : dquery.first;
    if (dquery_shared) dquery = (Rows){parts + s.B * D, D, 0};
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
    for (size b = 0; b < s.B; b++) {
        float dstate[block * D], folded[own ? block * D : D], dfolded[own ? block * D : D];
        float alpha[s.n * block], gain[s.n * block], inverse[s.n * block];
        float *dg = parts + b * D;
        clear(dg, D);
        clear(dfolded, own ? block * D : D);
        if (dshift) clear(dshift + b * D, D), clear(dscale + b * D, D);
        if (!own) fold(row_of(query, b, 0), g, D, folded);
        for (size t = 0; t < s.T; t += block) {
            size rows = smaller(block, s.T - t), at = (b * s.T + t) * D;
            for (size r = 0; r < rows; r++) {
                size row = at + r * D;
                if (dx)
                    modulate_backward(dx + row, h + row, row_of(scale, b, t), norm_eps, D, dstate + r * D,
                                      dshift + b * D, dscale + b * D);
                if (dx && dh) add(dstate + r * D, dh + row, D);
                if (!dx) memcpy(dstate + r * D, dh + row, D * sizeof *dh);
                if (own) fold(row_of(query, b, t + r), g, D, folded + r * D);
            }
            for (size i = 0; i < s.n; i++) {
                in v = sources[i] + at, next = i + 1 < s.n ? sources[i + 1] + at : gradients[0] + at;
                logits_of(v, next, folded, own, eps, rows, D, alpha + i * block, inverse + i * block);
                for (size r = 0; r < rows; r++) gain[i * block + r] = dot(v + r * D, dstate + r * D, D);
            }
            coefficients(alpha, gain, inverse, s.n, block, rows, D);
            for (size i = 0; i < s.n; i++)
                for (size r = 0; r < rows; r++) {
                    size row = at + r * D, k = i * block + r;
                    fetch(gradients[smaller(i + 1, s.n - 1)] + row, D);
                    if (known[i] && known[i] != gradients[i]) memcpy(gradients[i] + row, known[i] + row, D * sizeof *dh);
                    source_backward(sources[i] + row, known[i] != NULL, dstate + r * D, folded + r * own, alpha[k],
                                    gain[k], inverse[k], D, gradients[i] + row, dfolded + r * own);
                }
            for (size r = 0; r < rows && own; r++)
                fold_backward(dfolded + r * D, row_of(query, b, t + r), g, D, row_of(dquery, b, t + r), dg);
            if (own) clear(dfolded, block * D);
        }
        if (!own) fold_backward(dfolded, row_of(query, b, 0), g, D, row_of(dquery, b, 0), dg);
    }
    sum_samples(parts, s.B, D, dweight);
    if (dquery_shared) sum_samples(parts + s.B * D, s.B, D, dquery_shared);
}

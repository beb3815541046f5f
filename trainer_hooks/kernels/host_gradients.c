/* Statistics of gradients in the host's memory, in one read of it (docs/overhead.md).
 *
 * Compiled on the machine that it runs on, for AVX-512 or for AVX2 (host_build.py); the results are those of numpy's
 * passes (reductions/gradient_blocks.py). A chunk is read once, into registers: sums and squares in float32, a few
 * hundred values each, and a byte that says in which bin of the histogram a value falls. The bytes, which lie in the
 * first cache, are then counted sixteen bins at a time. Whatever float32 would not do is done again in float64 while
 * the chunk is in the cache: values that are not finite, very large or very small ones, a mean far from zero.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define CHUNK 4096
#define BINS 64
#define WINDOW 16
#define ROW_ELEMENTS 1024

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { NOT_ZERO, FINITE_NOT_ZERO, SUM, WITHIN, BETWEEN, ABSMAX, COLUMNS };

#define MAGNITUDE_BITS 0x7fffffff
#define MANTISSA_BITS 0x007fffff
#define ONE_BITS 0x3f800000
#define NOT_FINITE_BITS 0x7f800000
#define LEAST_BITS 0x2b800000 /* 2^-40 and 2^50: between them squares neither vanish nor overflow */
#define MOST_BITS 0x58800000

/* Bins of a magnitude that is m in [1, 2) times 2^e: ZERO_BIN + SLOPE * e + P(m - 1.5), 4 per decade. P is 4 log10(m)
 * and 2e-6 more; SLOPE is the next float32 below 4 log10(2). So rounding never takes an edge for the bin below it. */
#define ZERO_BIN 48
#define P0 0.70436734f
#define P1 1.15811777f
#define P2 -0.386079788f
#define P3 0.171618849f
#define P4 -0.0849984363f
#define P5 0.0451098718f
#define P6 -0.0302513503f
#define P7 0.0177953523f
#define SLOPE 1.20411992f

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
typedef __m512 floats;
typedef __m512i ints;
typedef __m512i bytes;
#define OF(name) _mm512_##name
#define AND(a, b) _mm512_and_si512(a, b)
#define OR(a, b) _mm512_or_si512(a, b)
#define STORE(at, a) _mm512_storeu_si512(at, a)
#define LOAD(at) _mm512_loadu_si512(at)
#define LOAD_HALF(at) _mm256_loadu_si256((const __m256i *)(at))
#define AS_INTS(a) _mm512_castps_si512(a)
#define AS_FLOATS(a) _mm512_castsi512_ps(a)
#define REPEAT16(at) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(at)))
#define NO_BYTES _mm512_setzero_si512()
#define FLOOR(a) _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
typedef __m256 floats;
typedef __m256i ints;
typedef __m256i bytes;
#define OF(name) _mm256_##name
#define AND(a, b) _mm256_and_si256(a, b)
#define OR(a, b) _mm256_or_si256(a, b)
#define STORE(at, a) _mm256_storeu_si256((__m256i *)(at), a)
#define LOAD(at) _mm256_loadu_si256((const __m256i *)(at))
#define LOAD_HALF(at) _mm_loadu_si128((const __m128i *)(at))
#define AS_INTS(a) _mm256_castps_si256(a)
#define AS_FLOATS(a) _mm256_castsi256_ps(a)
#define REPEAT16(at) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(at)))
#define NO_BYTES _mm256_setzero_si256()
#define FLOOR(a) _mm256_cvtps_epi32(_mm256_floor_ps(a))
#else
#error "needs AVX-512BW, or AVX2 with FMA and F16C"
#endif

#define GROUP (4 * LANES) /* values that are read in one turn: as many bytes fill a register */

#define AHEAD_BYTES 8192 /* how far before its use memory is asked for */

typedef struct {
    double sum, squares;
    int32_t largest; /* as the bits of a float32 without its sign */
    uint8_t highest; /* bin */
} reading;

static inline floats load(const void *values, int64_t at, int kind) {
    if (kind == FLOAT32)
        return OF(loadu_ps)((const float *)values + at);
    if (kind == FLOAT16)
        return OF(cvtph_ps)(LOAD_HALF((const uint16_t *)values + at));
    return AS_FLOATS(OF(slli_epi32)(OF(cvtepu16_epi32)(LOAD_HALF((const uint16_t *)values + at)), 16));
}

/* Bins of magnitudes, less ZERO_BIN and not yet held to 0 .. 63. */
static inline ints bins_of(ints magnitudes) {
    const floats e = OF(cvtepi32_ps)(OF(srai_epi32)(OF(sub_epi32)(magnitudes, OF(set1_epi32)(ONE_BITS)), 23));
    const floats m = AS_FLOATS(OR(AND(magnitudes, OF(set1_epi32)(MANTISSA_BITS)), OF(set1_epi32)(ONE_BITS)));
    const floats t = OF(sub_ps)(m, OF(set1_ps)(1.5f));
    floats p = OF(set1_ps)(P7);
    p = OF(fmadd_ps)(p, t, OF(set1_ps)(P6));
    p = OF(fmadd_ps)(p, t, OF(set1_ps)(P5));
    p = OF(fmadd_ps)(p, t, OF(set1_ps)(P4));
    p = OF(fmadd_ps)(p, t, OF(set1_ps)(P3));
    p = OF(fmadd_ps)(p, t, OF(set1_ps)(P2));
    p = OF(fmadd_ps)(p, t, OF(set1_ps)(P1));
    p = OF(fmadd_ps)(p, t, OF(set1_ps)(P0));
    return FLOOR(OF(fmadd_ps)(e, OF(set1_ps)(SLOPE), p));
}

/* Read n values, n a multiple of GROUP; their bins go to codes, in an order of their own. */
static inline reading read_values(const void *values, int64_t n, int kind, uint8_t *codes) {
    const ints without_sign = OF(set1_epi32)(MAGNITUDE_BITS);
    floats sums[4], squares[4];
    ints largest[2] = {NO_BYTES, NO_BYTES};
    bytes highest = NO_BYTES;
    for (int k = 0; k < 4; k++)
        sums[k] = squares[k] = OF(setzero_ps)();
    for (int64_t i = 0; i < n; i += GROUP) {
        ints bins[4];
        for (int line = 0; line < GROUP * (kind == FLOAT32 ? 4 : 2); line += 64)
            __builtin_prefetch((const char *)values + i * (kind == FLOAT32 ? 4 : 2) + line + AHEAD_BYTES);
        for (int k = 0; k < 4; k++) {
            const floats x = load(values, i + k * LANES, kind);
            sums[k] = OF(add_ps)(sums[k], x);
            squares[k] = OF(fmadd_ps)(x, x, squares[k]);
            const ints magnitudes = AND(AS_INTS(x), without_sign);
            largest[k & 1] = OF(max_epi32)(largest[k & 1], magnitudes);
            bins[k] = bins_of(magnitudes);
        }
        /* Packing saturates: what lies below the first bin counts in it, zeros too. */
        const ints low = OF(add_epi16)(OF(packs_epi32)(bins[0], bins[1]), OF(set1_epi16)(ZERO_BIN));
        const ints high = OF(add_epi16)(OF(packs_epi32)(bins[2], bins[3]), OF(set1_epi16)(ZERO_BIN));
        const bytes packed = OF(packus_epi16)(low, high);
        const bytes held = OF(min_epu8)(packed, OF(set1_epi8)(BINS - 1));
        highest = OF(max_epu8)(highest, held);
        STORE(codes + i, held);
    }
    float lanes[2][4][LANES];
    double totals[2][LANES];
    int32_t most[LANES];
    uint8_t bin[GROUP];
    for (int k = 0; k < 4; k++) {
        OF(storeu_ps)(lanes[0][k], sums[k]);
        OF(storeu_ps)(lanes[1][k], squares[k]);
    }
    STORE(most, OF(max_epi32)(largest[0], largest[1]));
    STORE(bin, highest);
    for (int of = 0; of < 2; of++) {
        for (int lane = 0; lane < LANES; lane++)
            totals[of][lane] = ((double)lanes[of][0][lane] + lanes[of][1][lane]) +
                               ((double)lanes[of][2][lane] + lanes[of][3][lane]);
        for (int half = LANES / 2; half; half /= 2)
            for (int lane = 0; lane < half; lane++)
                totals[of][lane] += totals[of][lane + half];
    }
    reading made = {totals[0][0], totals[1][0], 0, 0};
    for (int lane = 0; lane < LANES; lane++)
        made.largest = most[lane] > made.largest ? most[lane] : made.largest;
    for (int k = 0; k < GROUP; k++)
        made.highest = bin[k] > made.highest ? bin[k] : made.highest;
    return made;
}

/* Two bins share a byte of a table, four bits each: fifteen values can be counted before one of them is full. */
static const uint8_t SHARES[WINDOW / 2][WINDOW] = {
    {1, 16}, {0, 0, 1, 16}, {0, 0, 0, 0, 1, 16}, {0, 0, 0, 0, 0, 0, 1, 16}, {0, 0, 0, 0, 0, 0, 0, 0, 1, 16},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 16}, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 16},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 16},
};

static inline int64_t added_up(bytes quarters) {
    int64_t parts[LANES / 2], made = 0;
    STORE(parts, quarters);
    for (int k = 0; k < LANES / 2; k++)
        made += parts[k];
    return made;
}

/* Count how many of n codes fall into each of the sixteen bins from base on. */
static void count_window(const uint8_t *codes, int64_t n, int base, int64_t counts[WINDOW]) {
    const bytes nothing = NO_BYTES, four = OF(set1_epi8)(0x0f);
    bytes low[WINDOW / 2], high[WINDOW / 2];
    for (int k = 0; k < WINDOW / 2; k++)
        low[k] = high[k] = nothing;
    for (int64_t begin = 0; begin < n; begin += 15 * GROUP) {
        const int64_t end = begin + 15 * GROUP < n ? begin + 15 * GROUP : n;
        bytes counted[WINDOW / 2];
        for (int k = 0; k < WINDOW / 2; k++)
            counted[k] = nothing;
        for (int64_t i = begin; i < end; i += GROUP) {
            /* Codes beyond the window get their highest bit set, of which the table makes 0. */
            const bytes place = OF(adds_epu8)(OF(sub_epi8)(LOAD(codes + i), OF(set1_epi8)((char)base)),
                                              OF(set1_epi8)(0x70));
            for (int k = 0; k < WINDOW / 2; k++)
                counted[k] = OF(add_epi8)(counted[k], OF(shuffle_epi8)(REPEAT16(SHARES[k]), place));
        }
        for (int k = 0; k < WINDOW / 2; k++) {
            low[k] = OF(add_epi64)(low[k], OF(sad_epu8)(AND(counted[k], four), nothing));
            high[k] = OF(add_epi64)(high[k], OF(sad_epu8)(AND(OF(srli_epi16)(counted[k], 4), four), nothing));
        }
    }
    for (int k = 0; k < WINDOW / 2; k++) {
        counts[2 * k] = added_up(low[k]);
        counts[2 * k + 1] = added_up(high[k]);
    }
}

/* Add n codes, none above highest, to a histogram; returns how many are 0. */
static int64_t count_codes(const uint8_t *codes, int64_t n, int highest, int64_t *histogram) {
    int64_t left = n, counts[WINDOW];
    for (int end = highest + 1; left > 0 && end > 0; end -= WINDOW) {
        const int base = end > WINDOW ? end - WINDOW : 0;
        count_window(codes, n, base, counts);
        for (int k = 0; k < end - base; k++) {
            histogram[base + k] += counts[k];
            left -= counts[k];
        }
        if (base == 0)
            return counts[0];
    }
    return 0;
}

static float value_at(const void *values, int64_t at, int kind) {
    if (kind == FLOAT16)
        return _cvtsh_ss(((const uint16_t *)values)[at]);
    uint32_t bits;
    if (kind == FLOAT32)
        memcpy(&bits, (const float *)values + at, sizeof bits);
    else
        bits = (uint32_t)((const uint16_t *)values)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t magnitude_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & MAGNITUDE_BITS;
}

/* Sum and squared distances from the mean of n finite values, in float64. */
static void sum_wide(const float *values, int64_t n, double *sum, double *within) {
    double total = 0.0, apart = 0.0;
    for (int64_t i = 0; i < n; i++)
        total += values[i];
    const double mean = total / (double)n;
    for (int64_t i = 0; i < n; i++)
        apart += (values[i] - mean) * (values[i] - mean);
    *sum = total;
    *within = apart;
}

/* Read at most CHUNK values and add them to a row of sums and to a histogram. */
static inline void read_chunk(const void *values, int64_t n, int kind, double *row, int64_t *histogram) {
    uint8_t codes[CHUNK];
    float copied[CHUNK];
    const int64_t filled = (n + GROUP - 1) / GROUP * GROUP;
    const int is_full = filled == n;
    int64_t kept = n;
    reading found;
    if (is_full) {
        found = read_values(values, n, kind, codes);
    } else { /* filled up with zeros, which are taken off again */
        for (int64_t i = 0; i < n; i++)
            copied[i] = value_at(values, i, kind);
        memset(copied + n, 0, (size_t)(filled - n) * sizeof(float));
        found = read_values(copied, filled, FLOAT32, codes);
    }
    int64_t num_codes = filled;
    const int is_broken = found.largest >= NOT_FINITE_BITS;
    int is_wide = is_broken || (found.largest && (found.largest < LEAST_BITS || found.largest > MOST_BITS));
    double within = 0.0;
    if (!is_wide) {
        const double between = found.sum * found.sum / (double)n;
        is_wide = between > 0.5 * found.squares; /* else their difference is less exact than they are */
        within = found.squares - between;
    }
    if (is_wide) {
        kept = 0;
        for (int64_t i = 0; i < n; i++) {
            const float value = value_at(values, i, kind);
            copied[kept] = value;
            kept += magnitude_bits(value) < NOT_FINITE_BITS;
        }
        if (is_broken) {
            num_codes = (kept + GROUP - 1) / GROUP * GROUP;
            memset(copied + kept, 0, (size_t)(num_codes - kept) * sizeof(float));
            found = read_values(copied, num_codes, FLOAT32, codes);
        }
        if (kept)
            sum_wide(copied, kept, &found.sum, &within);
    }
    int64_t zeros = 0;
    if (!found.largest)
        zeros = kept;
    else if (count_codes(codes, num_codes, found.highest, histogram)) {
        for (int64_t i = 0; i < n; i++)
            zeros += !magnitude_bits(value_at(values, i, kind));
        histogram[0] -= zeros + num_codes - kept;
    }
    row[NOT_ZERO] += (double)(n - zeros);
    row[FINITE_NOT_ZERO] += (double)(kept - zeros);
    if (!kept)
        return;
    row[SUM] += found.sum;
    row[WITHIN] += within;
    row[BETWEEN] += found.sum * found.sum / (double)kept;
    float largest;
    memcpy(&largest, &found.largest, sizeof largest);
    if (largest > row[ABSMAX])
        row[ABSMAX] = largest;
}

/* Reduce tensors that lie side by side in memory.
 *
 * values, counts, kinds, slots, modules: of each tensor its address, its elements (more than 0), its dtype, its row
 * among the sums and its row among the histograms. sums: float64 [.., COLUMNS], histograms: int64 [.., BINS]; both are
 * added to.
 */
void sidestep_reduce_gradients(int64_t num_tensors, const void *const *values, const int64_t *counts,
                               const int32_t *kinds, const int32_t *slots, const int32_t *modules, double *sums,
                               int64_t *histograms) {
    for (int64_t each = 0; each < num_tensors; each++) {
        double *row = sums + (int64_t)slots[each] * COLUMNS;
        int64_t *histogram = histograms + (int64_t)modules[each] * BINS;
        const int64_t size = counts[each];
        const char *at = values[each];
        for (int64_t start = 0; start < size; start += CHUNK) {
            const int64_t n = size - start < CHUNK ? size - start : CHUNK;
            if (kinds[each] == FLOAT32)
                read_chunk(at + start * 4, n, FLOAT32, row, histogram);
            else if (kinds[each] == BFLOAT16)
                read_chunk(at + start * 2, n, BFLOAT16, row, histogram);
            else
                read_chunk(at + start * 2, n, FLOAT16, row, histogram);
        }
        row[NOT_ZERO] += (double)((ROW_ELEMENTS - size % ROW_ELEMENTS) % ROW_ELEMENTS); /* as if filled up with NaN */
    }
}

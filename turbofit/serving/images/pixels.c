/* Resizes pictures of three channels to the bytes that Pillow's bicubic filter makes, with AVX2, and looks values of
   their bytes up.

   A pixel has four bytes, the last of which means nothing and becomes 0. A pass makes each pixel of a line from
   neighbours in that line: weights are whole numbers with 22 bits of fraction, and sums are rounded to bytes. One
   pass goes along the rows, one along the columns. */
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#define EXPORTED __attribute__((visibility("default")))
#define AVX2 __attribute__((target("avx2")))
enum { FRACTION = 22, PIXEL = 4, AT_ONCE = 4, BLOCK = 16 };

/* How a line of `to` pixels is made from one of `from`: each from `taps` neighbours, an even number. */
struct line {
    int from, to, taps;
    int *first;
    int32_t *weights;
};

static double bicubic(double x)
{
    x = fabs(x);
    if (x < 1.0)
        return (1.5 * x - 2.5) * x * x + 1.0;
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

/* The number of neighbours of a pixel whose center is here, and the first of them. */
static int neighbours(int length, double center, double reach, int *first)
{
    int begin = (int)(center - reach + 0.5), end = (int)(center + reach + 0.5);

    *first = begin < 0 ? 0 : begin;
    return (end > length ? length : end) - *first;
}

static void weigh(struct line *line, int at, double center, double stretch, double *exact)
{
    int first, count = neighbours(line->from, center, 2.0 * stretch, &first);
    int begin = first + line->taps > line->from ? line->from - line->taps : first;
    int32_t *weights = line->weights + (size_t)at * line->taps + (first - begin);
    double all = 0.0;

    for (int i = 0; i < count; i++)
        all += exact[i] = bicubic((i + first - center + 0.5) * (1.0 / stretch));
    for (int i = 0; i < count; i++) {
        double weight = all != 0.0 ? exact[i] / all : exact[i];
        weights[i] = (int32_t)((weight < 0 ? -0.5 : 0.5) + weight * (1 << FRACTION));
    }
    line->first[at] = begin;
}

/* Fills a line in; 0 where there is no memory, or the line is shorter than its taps. */
static int plan_line(struct line *line)
{
    double scale = (double)line->from / line->to, stretch = scale < 1.0 ? 1.0 : scale, *exact;
    int first, most = 0;

    for (int i = 0; i < line->to; i++) {
        int count = neighbours(line->from, (i + 0.5) * scale, 2.0 * stretch, &first);
        most = count > most ? count : most;
    }
    line->taps = most + most % 2;
    line->first = malloc(line->to * sizeof *line->first);
    line->weights = calloc((size_t)line->to * line->taps, sizeof *line->weights);
    exact = malloc(line->taps * sizeof *exact);
    int possible = line->taps <= line->from && line->first && line->weights && exact;
    for (int i = 0; possible && i < line->to; i++)
        weigh(line, i, (i + 0.5) * scale, stretch, exact);
    free(exact);
    return possible;
}

/* A line's weights once for each byte of a pixel, without the last. */
static int32_t *for_bytes(const struct line *line)
{
    size_t count = (size_t)line->to * line->taps * PIXEL;
    int32_t *weights = aligned_alloc(32, count * sizeof *weights);

    for (size_t i = 0; weights && i < count; i++)
        weights[i] = i % PIXEL == PIXEL - 1 ? 0 : line->weights[i / PIXEL];
    return weights;
}

AVX2 static inline __m256i eight_bytes(const uint8_t *bytes)
{
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
}

/* Bytes of two sums, in the low half of each lane: four of one, four of the other. */
AVX2 static inline __m256i rounded(__m256i one, __m256i other)
{
    const __m256i half = _mm256_set1_epi32(1 << (FRACTION - 1));

    one = _mm256_srai_epi32(_mm256_add_epi32(one, half), FRACTION);
    other = _mm256_srai_epi32(_mm256_add_epi32(other, half), FRACTION);
    one = _mm256_packs_epi32(one, other);
    return _mm256_packus_epi16(one, one);
}

AVX2 static inline __m256i both_pixels(__m256i one, __m256i other)
{
    return _mm256_add_epi32(
        _mm256_permute2x128_si256(one, other, 0x20), _mm256_permute2x128_si256(one, other, 0x31));
}

/* The pass along some rows at once, two pixels in a vector. */
AVX2 static void make_rows(const struct line *line, const int32_t *weights, uint8_t **from, uint8_t **to)
{
    const __m256i *weight = (const __m256i *)weights;

    for (int x = 0; x < line->to; x++) {
        size_t at = (size_t)line->first[x] * PIXEL;
        __m256i sums[AT_ONCE] = {0};

        for (int tap = 0; tap < line->taps; tap += 2, at += 2 * PIXEL, weight++)
            for (int i = 0; i < AT_ONCE; i++)
                sums[i] = _mm256_add_epi32(sums[i], _mm256_mullo_epi32(eight_bytes(from[i] + at), *weight));
        __m256i made = rounded(both_pixels(sums[0], sums[1]), both_pixels(sums[2], sums[3]));
        __m128i even = _mm256_castsi256_si128(made), odd = _mm256_extracti128_si256(made, 1);
        ((int32_t *)to[0])[x] = _mm_cvtsi128_si32(even);
        ((int32_t *)to[1])[x] = _mm_cvtsi128_si32(odd);
        ((int32_t *)to[2])[x] = _mm_extract_epi32(even, 1);
        ((int32_t *)to[3])[x] = _mm_extract_epi32(odd, 1);
    }
}

/* One row of the pass along the columns, from a row for each tap. */
AVX2 static void make_row(int taps, const int32_t *weights, uint8_t **from, uint8_t *to, size_t bytes)
{
    for (size_t next = 0; next < bytes; next += BLOCK) {
        size_t at = next + BLOCK > bytes ? bytes - BLOCK : next;
        __m256i low = {0}, high = {0};

        for (int tap = 0; tap < taps; tap++) {
            __m256i weight = _mm256_set1_epi32(weights[tap]);
            low = _mm256_add_epi32(low, _mm256_mullo_epi32(eight_bytes(from[tap] + at), weight));
            high = _mm256_add_epi32(high, _mm256_mullo_epi32(eight_bytes(from[tap] + at + 8), weight));
        }
        __m256i made = _mm256_permutevar8x32_epi32(rounded(low, high), _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0));
        _mm_storeu_si128((__m128i *)(to + at), _mm256_castsi256_si128(made));
    }
}

/* Rows are made as the columns ask for them, into a ring of as many as these need. */
static int rows_first(const struct line *across, const struct line *down, uint8_t *from, uint8_t *to)
{
    size_t stride = (size_t)across->from * PIXEL, new_stride = (size_t)across->to * PIXEL;
    int kept = down->taps + AT_ONCE, made = 0;
    int32_t *weights = for_bytes(across);
    uint8_t *ring = malloc(kept * new_stride), **window = malloc(down->taps * sizeof *window);
    uint8_t *rows[AT_ONCE], *slots[AT_ONCE];
    int possible = weights && ring && window;

    for (int y = 0; possible && y < down->to; y++) {
        for (; made < down->first[y] + down->taps; made += AT_ONCE) {
            for (int i = 0; i < AT_ONCE; i++) {
                int row = made + i < down->from ? made + i : down->from - 1;
                rows[i] = from + row * stride;
                slots[i] = ring + (made + i) % kept * new_stride;
            }
            make_rows(across, weights, rows, slots);
        }
        for (int tap = 0; tap < down->taps; tap++)
            window[tap] = ring + (down->first[y] + tap) % kept * new_stride;
        make_row(down->taps, down->weights + (size_t)y * down->taps, window, to + y * new_stride, new_stride);
    }
    free(weights);
    free(ring);
    free(window);
    return possible;
}

static int columns_first(const struct line *across, const struct line *down, uint8_t *from, uint8_t *to)
{
    size_t stride = (size_t)across->from * PIXEL, new_stride = (size_t)across->to * PIXEL;
    int32_t *weights = for_bytes(across);
    uint8_t *made = malloc(AT_ONCE * stride), **window = malloc(down->taps * sizeof *window);
    uint8_t *rows[AT_ONCE], *slots[AT_ONCE];
    int possible = weights && made && window;

    for (int first = 0; possible && first < down->to; first += AT_ONCE) {
        for (int i = 0; i < AT_ONCE; i++) {
            int y = first + i < down->to ? first + i : down->to - 1;
            for (int tap = 0; tap < down->taps; tap++)
                window[tap] = from + (down->first[y] + tap) * stride;
            rows[i] = made + i * stride;
            slots[i] = to + y * new_stride;
            make_row(down->taps, down->weights + (size_t)y * down->taps, window, rows[i], stride);
        }
        make_rows(across, weights, rows, slots);
    }
    free(weights);
    free(made);
    free(window);
    return possible;
}

/* Whether this processor has the instructions. */
EXPORTED int usable(void)
{
    return __builtin_cpu_supports("avx2") != 0;
}

/* Whether the picture was resized; it is not where memory is short, or it has fewer pixels than the filter. */
EXPORTED int resize(uint8_t *from, int width, int height, uint8_t *to, int new_width, int new_height, int columns)
{
    struct line across = {width, new_width, 0, NULL, NULL}, down = {height, new_height, 0, NULL, NULL};
    int wide = width >= BLOCK / PIXEL && new_width >= BLOCK / PIXEL;
    int done = wide && plan_line(&across) && plan_line(&down) &&
               (columns ? columns_first : rows_first)(&across, &down, from, to);

    free(across.first);
    free(across.weights);
    free(down.first);
    free(down.weights);
    return done;
}

/* For each channel a table of 256 values, and a plane of what it has for the pixels. */
#define LOOK_UP(name, value)                                                             \
    EXPORTED void name(const uint8_t *pixels, size_t count, const value *tables, value *to) \
    {                                                                                    \
        for (size_t i = 0; i < count; i++, pixels += PIXEL)                              \
            for (int channel = 0; channel < PIXEL - 1; channel++)                        \
                to[channel * count + i] = tables[channel * 256 + pixels[channel]];       \
    }
LOOK_UP(look_up_2, uint16_t)
LOOK_UP(look_up_4, uint32_t)

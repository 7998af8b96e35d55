/* w = (code - zero) * scale for 4-bit codes in groups of a multiple of 32, packed low nibble first: written out, or
   multiplied by a few tokens where they are made.

   Built at run time by native.py; x86 with AVX2 or AVX-512. The difference is exact for integer zeros and is rounded
   before the product otherwise, as in PackedWeight.dequantize_rows: the two agree bit for bit. */

#include <immintrin.h>
#include <stdint.h>

#define MOST_TOKENS 4 /* of one pass over the codes: their sums stay in registers */

typedef void (*group_kernel)(const uint8_t *codes, float scale, float zero, float *out, int64_t size);

/* All stored in rows: codes groups * size / 2 bytes; scales groups; zeros packed, (groups + 1) / 2 bytes, or float,
   groups, or neither: then every zero point is 8. */
typedef struct {
  const uint8_t *codes;
  const float *scales;
  const uint8_t *packed_zeros;
  const float *float_zeros;
  int64_t groups, size;
} weights;

/* The zero points of one row, and one of them. */
typedef struct {
  const uint8_t *packed;
  const float *floating;
} zero_row;

static inline zero_row zeros_of(const weights *w, int64_t row) {
  const zero_row found = {w->packed_zeros ? w->packed_zeros + row * ((w->groups + 1) / 2) : 0,
                          w->float_zeros ? w->float_zeros + row * w->groups : 0};
  return found;
}

static inline float zero_of(zero_row zeros, int64_t group) {
  if (zeros.packed) return (zeros.packed[group / 2] >> (group % 2 * 4)) & 15;
  return zeros.floating ? zeros.floating[group] : 8;
}

/* 16 bytes -> their 32 codes in order: low and high nibbles interleaved. */
#define UNPACK(bytes, first, second)                                                       \
  const __m128i packed = _mm_loadu_si128((const __m128i *)(bytes)), nibble = _mm_set1_epi8(15); \
  const __m128i low = _mm_and_si128(packed, nibble);                                       \
  const __m128i high = _mm_and_si128(_mm_srli_epi16(packed, 4), nibble);                   \
  const __m128i first = _mm_unpacklo_epi8(low, high), second = _mm_unpackhi_epi8(low, high)

/* A group has 16 different weights: they fill one register, and every code picks its own. */
__attribute__((target("avx512f"))) static void group_avx512(
    const uint8_t *codes, float scale, float zero, float *out, int64_t size) {
  const __m512 grid = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 table = _mm512_mul_ps(_mm512_sub_ps(grid, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
  for (int64_t k = 0; k < size; k += 32) {
    UNPACK(codes + k / 2, first, second);
    _mm512_storeu_ps(out + k, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(first), table));
    _mm512_storeu_ps(out + k + 16, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(second), table));
  }
}

__attribute__((target("avx2"))) static inline void eight_avx2(__m128i codes, __m256 scale, __m256 zero, float *out) {
  const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes));
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_sub_ps(code, zero), scale));
}

__attribute__((target("avx2"))) static void group_avx2(
    const uint8_t *codes, float scale, float zero, float *out, int64_t size) {
  const __m256 scales = _mm256_set1_ps(scale), zeros = _mm256_set1_ps(zero);
  for (int64_t k = 0; k < size; k += 32) {
    UNPACK(codes + k / 2, first, second);
    eight_avx2(first, scales, zeros, out + k);
    eight_avx2(_mm_srli_si128(first, 8), scales, zeros, out + k + 8);
    eight_avx2(second, scales, zeros, out + k + 16);
    eight_avx2(_mm_srli_si128(second, 8), scales, zeros, out + k + 24);
  }
}

/* One row of W against every token: x (tokens, groups * size), out[token * rows + row]. Sums in float32, fused. */
typedef void (*row_kernel)(const weights *w, int64_t row, const float *x, float *out, int64_t rows);

#define ROW_AVX512(tokens)                                                                                        \
  __attribute__((target("avx512f"))) static void row_avx512_##tokens(const weights *w, int64_t row, const float *x, \
                                                                     float *out, int64_t rows) {                  \
    const __m512 grid = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);                     \
    const int64_t width = w->groups * w->size;                                                                    \
    const uint8_t *codes = w->codes + row * width / 2;                                                            \
    const zero_row zeros = zeros_of(w, row);                                                                      \
    __m512 even[tokens], odd[tokens];                                                                             \
    for (int t = 0; t < tokens; ++t) even[t] = odd[t] = _mm512_setzero_ps();                                      \
    for (int64_t group = 0; group < w->groups; ++group) {                                                         \
      const __m512 zero = _mm512_set1_ps(zero_of(zeros, group));                                                  \
      const __m512 scale = _mm512_set1_ps(w->scales[row * w->groups + group]);                                    \
      const __m512 table = _mm512_mul_ps(_mm512_sub_ps(grid, zero), scale);                                       \
      for (int64_t k = group * w->size; k < (group + 1) * w->size; k += 32) {                                     \
        UNPACK(codes + k / 2, first, second);                                                                     \
        const __m512 left = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(first), table);                            \
        const __m512 right = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(second), table);                          \
        for (int t = 0; t < tokens; ++t) {                                                                        \
          even[t] = _mm512_fmadd_ps(left, _mm512_loadu_ps(x + t * width + k), even[t]);                           \
          odd[t] = _mm512_fmadd_ps(right, _mm512_loadu_ps(x + t * width + k + 16), odd[t]);                       \
        }                                                                                                         \
      }                                                                                                           \
    }                                                                                                             \
    for (int t = 0; t < tokens; ++t) out[t * rows + row] = _mm512_reduce_add_ps(_mm512_add_ps(even[t], odd[t]));  \
  }

ROW_AVX512(1)
ROW_AVX512(2)
ROW_AVX512(3)
ROW_AVX512(4)

__attribute__((target("avx2"))) static inline float sum_avx2(__m256 values) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

/* The weights of one group at a time go through a small buffer, and their products with every token follow. */
#define ROW_AVX2(tokens)                                                                                      \
  __attribute__((target("avx2,fma"))) static void row_avx2_##tokens(const weights *w, int64_t row, const float *x, \
                                                                    float *out, int64_t rows) {               \
    const int64_t width = w->groups * w->size;                                                                \
    const uint8_t *codes = w->codes + row * width / 2;                                                        \
    const zero_row zeros = zeros_of(w, row);                                                                  \
    __m256 sums[tokens];                                                                                      \
    float buffer[32];                                                                                         \
    for (int t = 0; t < tokens; ++t) sums[t] = _mm256_setzero_ps();                                           \
    for (int64_t group = 0; group < w->groups; ++group) {                                                     \
      const float zero = zero_of(zeros, group), scale = w->scales[row * w->groups + group];                   \
      for (int64_t k = group * w->size; k < (group + 1) * w->size; k += 32) {                                 \
        group_avx2(codes + k / 2, scale, zero, buffer, 32);                                                   \
        for (int i = 0; i < 32; i += 8)                                                                       \
          for (int t = 0; t < tokens; ++t)                                                                    \
            sums[t] = _mm256_fmadd_ps(_mm256_loadu_ps(buffer + i), _mm256_loadu_ps(x + t * width + k + i), sums[t]); \
      }                                                                                                       \
    }                                                                                                         \
    for (int t = 0; t < tokens; ++t) out[t * rows + row] = sum_avx2(sums[t]);                                 \
  }

ROW_AVX2(1)
ROW_AVX2(2)
ROW_AVX2(3)
ROW_AVX2(4)

int qbl_supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

/* out: (rows, groups * size). */
void qbl_dequantize(const uint8_t *codes, const float *scales, const uint8_t *packed_zeros, const float *float_zeros,
                    float *out, int64_t rows, int64_t groups, int64_t size, int threads) {
  const weights w = {codes, scales, packed_zeros, float_zeros, groups, size};
  const group_kernel kernel = __builtin_cpu_supports("avx512f") ? group_avx512 : group_avx2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    const zero_row zeros = zeros_of(&w, row);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t at = row * groups + group;
      kernel(codes + at * size / 2, scales[at], zero_of(zeros, group), out + at * size, size);
    }
  }
}

/* x: (tokens, groups * size); out: (tokens, rows) = x W^T. */
void qbl_multiply(const uint8_t *codes, const float *scales, const uint8_t *packed_zeros, const float *float_zeros,
                  const float *x, float *out, int64_t tokens, int64_t rows, int64_t groups, int64_t size,
                  int threads) {
  static const row_kernel wide[] = {row_avx512_1, row_avx512_2, row_avx512_3, row_avx512_4};
  static const row_kernel narrow[] = {row_avx2_1, row_avx2_2, row_avx2_3, row_avx2_4};
  const row_kernel *kernels = __builtin_cpu_supports("avx512f") ? wide : narrow;
  const weights w = {codes, scales, packed_zeros, float_zeros, groups, size};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t done = 0; done < tokens; done += MOST_TOKENS) {
      const int64_t left = tokens - done, taken = left < MOST_TOKENS ? left : MOST_TOKENS;
      kernels[taken - 1](&w, row, x + done * groups * size, out + done * rows, rows);
    }
  }
}

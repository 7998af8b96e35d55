/* w = (code - zero) * scale for 4-bit codes in groups of a multiple of 32, packed low nibble first.

   Built at run time by native.py; x86 with AVX2 or AVX-512. The difference is exact for integer zeros and is rounded
   before the product otherwise, as in PackedWeight.dequantize_rows: the two agree bit for bit. */

#include <immintrin.h>
#include <stdint.h>

typedef void (*group_kernel)(const uint8_t *codes, float scale, float zero, float *out, int64_t size);

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

int qbl_supported(void) { return __builtin_cpu_supports("avx2"); }

/* Codes (rows, groups * size / 2) bytes; scales (rows, groups); zeros packed (rows, ceil(groups / 2)) bytes, or float
   (rows, groups), or neither: then every zero point is 8. out: (rows, groups * size). */
void qbl_dequantize(const uint8_t *codes, const float *scales, const uint8_t *packed_zeros, const float *float_zeros,
                    float *out, int64_t rows, int64_t groups, int64_t size, int threads) {
  const group_kernel kernel = __builtin_cpu_supports("avx512f") ? group_avx512 : group_avx2;
  const int64_t zero_bytes = (groups + 1) / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t at = row * groups + group;
      float zero = 8;
      if (packed_zeros) zero = (packed_zeros[row * zero_bytes + group / 2] >> (group % 2 * 4)) & 15;
      if (float_zeros) zero = float_zeros[at];
      kernel(codes + at * size / 2, scales[at], zero, out + at * size, size);
    }
  }
}

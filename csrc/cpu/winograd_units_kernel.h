// winograd_conv: gradients of weights on matrix units. Included inside namespace rnndyn::<isa> after amx_tile_kernel.h.
//
// Maths: as amx_conv with three parts, x = x_1 + x_2 + x_3, of which the six largest products are summed in float32. Parts are cut off, not rounded:
//   three times eight bits are all that a float32 has, and cutting takes an AND and a subtraction. (Infinity becomes NaN, as in the transforms.)
// Layout: a line is 64 bytes, one part of a row; a row of a pair of tiles i and i + 16 of a group of 32 holds 16 channels, a row of a channel 16 pairs.
// Only where there are matrix units: elsewhere the products run on vector units, which emulated ones would not speed up.

constexpr int kUnitParts = 3;
constexpr int64_t kUnitLine = 64, kUnitTiles = 32;          // bytes of a line; tiles of a product
constexpr int64_t kUnitStep = kUnitParts * 2 * kTileBytes;  // what one side of a product takes: 32 channels by 32 tiles

#ifdef RNNDYN_AMX
constexpr bool kHasUnits = true;
#else
constexpr bool kHasUnits = false;
#endif

#ifdef RNNDYN_AMX

// Two vectors of 16 values as lines of words (low, high), `part` bytes apart.
static inline void unit_lines(const float* low, const float* high, char* out, int64_t part) {
  const __m512i top = _mm512_set1_epi32(int(0xffff0000));
  __m512 x0 = _mm512_loadu_ps(low), x1 = _mm512_loadu_ps(high);
#pragma GCC unroll 3
  for (int k = 0; k < kUnitParts; ++k) {
    const __m512i h0 = _mm512_and_si512(_mm512_castps_si512(x0), top),
                  h1 = _mm512_and_si512(_mm512_castps_si512(x1), top);
    _mm512_storeu_si512(out + k * part, _mm512_or_si512(_mm512_srli_epi32(h0, 16), h1));
    x0 = _mm512_sub_ps(x0, _mm512_castsi512_ps(h0)), x1 = _mm512_sub_ps(x1, _mm512_castsi512_ps(h1));
  }
}

// 32 tiles of 16 channels of one frequency, [tiles, 16], as rows of pairs of tiles (i, i + 16): one tile of matrix units per part, `part` bytes apart;
// transposed, as rows of channels.
static inline void unit_tiles(const float* values, bool transposed, char* out, int64_t part) {
  alignas(64) uint16_t pairs[kUnitParts * kTileBytes / 2];
  char* to = transposed ? reinterpret_cast<char*>(pairs) : out;
  for (int i = 0; i < 16; ++i)
    unit_lines(values + i * 16, values + (i + 16) * 16, to + i * kUnitLine, transposed ? kTileBytes : part);
  for (int k = 0; transposed && k < kUnitParts; ++k) amx_transpose(pairs + k * kTileBytes / 2, out + k * part, 64);
}

// The sums [32, 32] of a frequency: those before, and the products of `steps` times 32 tiles of both.
static inline void unit_sums(TileScope& scope, const char* v, const char* q, int64_t steps, bool accumulate,
                             float* sums) {
  if (accumulate)
    tile_sums_load(scope, sums, 128);
  else
    tile_sums_zero(scope);
  for (int64_t k = 0; k < steps; ++k) {
    tile_step<kUnitParts>(scope, v + k * kUnitStep, v + k * kUnitStep + kTileBytes, 2 * kTileBytes, q + k * kUnitStep);
    tile_stay_awake(scope);
  }
  // (The sums that come next, from where they rest.)
  for (int i = 0; accumulate && i < 64; ++i) __builtin_prefetch(sums + 1024 + i * 16, 1, 3);
  tile_sums_store(scope, sums, 128);
}

#endif  // RNNDYN_AMX

// Tiles of matrix units, and float32 values as sums of bfloat16 numbers. Included inside namespace rnndyn::<isa>.
//
// A tile is 16 rows of 64 bytes. With RNNDYN_AMX the functions are the processor's instructions; without, loops that do the same, so that every
// build computes the same values and can be tested: the emulation is far too slow to be chosen.

constexpr int kTileBytes = 1024;

#ifdef RNNDYN_AMX

#define RNNDYN_TILE_LOAD(tile, base, stride) _tile_loadd(tile, base, stride)
#define RNNDYN_TILE_STORE(tile, base, stride) _tile_stored(tile, base, stride)
#define RNNDYN_TILE_ZERO(tile) _tile_zero(tile)
#define RNNDYN_TILE_PRODUCT(sum, a, b) _tile_dpbf16ps(sum, a, b)

// All eight tiles of full size. Each thread that uses them needs it, and gives it back: other libraries configure tiles for themselves.
struct TileScope {
  alignas(64) char nowhere[kTileBytes];  // for tile_stay_awake
  bool used;

  explicit TileScope(bool use = true) : used(use) {
    if (!used) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" : : "r"(&config) : "memory");  // (the compiler thinks that only its first bytes are read)
    _tile_loadconfig(&config);
  }
  ~TileScope() {
    if (used) _tile_release();
  }
};

// The next part of 16 + 16 values, which lose it. Infinity has no remainder (it would be NaN).
static inline __m512i next_part(__m512& x0, __m512& x1) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
  const __m512 h0 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
  const __m512 h1 =
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
  x0 = _mm512_maskz_sub_ps((__mmask16)~_mm512_fpclass_ps_mask(h0, 0x18), x0, h0);
  x1 = _mm512_maskz_sub_ps((__mmask16)~_mm512_fpclass_ps_mask(h1, 0x18), x1, h1);
  return both;
}
static inline __mmask16 first_lanes(int64_t lanes) {
  return (__mmask16)(lanes >= 16 ? 0xffff : lanes <= 0 ? 0 : (1u << lanes) - 1);
}

// The parts of 32 values, `stride` bytes apart; the first `lanes` are read and the others count as zero.
static inline void split_bf16(const float* x, int64_t lanes, int parts, char* out, int64_t stride) {
  __m512 x0 = _mm512_maskz_loadu_ps(first_lanes(lanes), x), x1 = _mm512_maskz_loadu_ps(first_lanes(lanes - 16), x + 16);
  for (int part = 0; part < parts; ++part) _mm512_storeu_si512(out + part * stride, next_part(x0, x1));
}

#else

struct Tile {
  alignas(64) char bytes[kTileBytes];
};

static inline void emulate_load(Tile& tile, const void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    for (int b = 0; b < 64; ++b) tile.bytes[r * 64 + b] = static_cast<const char*>(base)[r * stride + b];
}
static inline void emulate_store(const Tile& tile, void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    for (int b = 0; b < 64; ++b) static_cast<char*>(base)[r * stride + b] = tile.bytes[r * 64 + b];
}
static inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
static inline uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
static void emulate_product(Tile& sum, const Tile& a, const Tile& b) {
  float* c = reinterpret_cast<float*>(sum.bytes);
  const uint16_t *left = reinterpret_cast<const uint16_t*>(a.bytes),
                 *right = reinterpret_cast<const uint16_t*>(b.bytes);
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int half = 0; half < 2; ++half) {
        const float value = as_float(uint32_t(left[m * 32 + 2 * k + half]) << 16);
        for (int n = 0; n < 16; ++n) c[m * 16 + n] += value * as_float(uint32_t(right[k * 32 + 2 * n + half]) << 16);
      }
}
#define RNNDYN_TILE_LOAD(tile, base, stride) emulate_load(scope.slot[tile], base, stride)
#define RNNDYN_TILE_STORE(tile, base, stride) emulate_store(scope.slot[tile], base, stride)
#define RNNDYN_TILE_ZERO(tile) (scope.slot[tile] = Tile{})
#define RNNDYN_TILE_PRODUCT(sum, a, b) emulate_product(scope.slot[sum], scope.slot[a], scope.slot[b])

struct TileScope {
  Tile slot[8];

  explicit TileScope(bool = true) {}
};

// To the nearest, ties to even; denormals become zero, as the instructions have it.
static inline uint16_t to_bf16(float value) {
  const uint32_t bits = as_bits(value), exponent = bits & 0x7f800000u;
  if (exponent == 0x7f800000u && (bits & 0x007fffffu)) return uint16_t((bits >> 16) | 0x40);
  if (exponent == 0) return uint16_t(bits >> 16 & 0x8000);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
// The parts of one value, `stride` elements apart. Infinity has no remainder (it would be NaN).
static inline void split_value(float value, int parts, uint16_t* out, int64_t stride) {
  for (int part = 0; part < parts; ++part) {
    const uint16_t head = out[part * stride] = to_bf16(value);
    value = (head & 0x7fff) == 0x7f80 ? 0.0f : value - as_float(uint32_t(head) << 16);
  }
}
static inline void split_bf16(const float* x, int64_t lanes, int parts, char* out, int64_t stride) {
  for (int64_t i = 0; i < 32; ++i)
    split_value(i < lanes ? x[i] : 0.0f, parts, reinterpret_cast<uint16_t*>(out) + i, stride / 2);
}

#endif

// A tile's 16 x 16 words of four bytes transposed: [pairs][channels] to [channels][pairs], rows `stride` bytes apart.
static inline void amx_transpose(const uint16_t* tile, char* out, int64_t stride) {
#ifdef RNNDYN_AMX
  __m512i r[16], s[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(tile + i * 32);
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd));
  }
#else
  for (int k = 0; k < 16; ++k)
    for (int c = 0; c < 16; ++c) __builtin_memcpy(out + c * stride + k * 4, tile + k * 32 + c * 2, 4);
#endif
}

// What stores tiles falls asleep after 0.6 us without a store, and the next one waits 0.25 us for it, two steps' worth. A store of no use in each step
// keeps it awake, and costs nothing (measured: 5 to 13% of amx_conv).
static inline void tile_stay_awake(TileScope& scope) {
  (void)scope;
#ifdef RNNDYN_AMX
  RNNDYN_TILE_STORE(7, scope.nowhere, 64);
#endif
}

// The tiles of a product of two by two: sums 0 to 3; 4 and 5 hold rows of A, 6 and 7 columns of B. One step is 32 products deep.
// a0, a1: 16 rows of 64 bytes each, one part after another `a_part` bytes apart; b: both columns of the first part, `b_half` bytes apart, then of the
//   next: adjacent, if nothing else is said.
// Loads stand between products, which hides them (measured: grouped, they double the time).
// kPair: without it the rows of a1, and sums 2 and 3, are left out.
template <bool kPair>
static inline void tile_load_a(TileScope& scope, const char* a0, const char* a1) {
  (void)scope, (void)a1;
  RNNDYN_TILE_LOAD(4, a0, 64);
  if constexpr (kPair) RNNDYN_TILE_LOAD(5, a1, 64);
}
template <bool kPair>
static inline void tile_products(TileScope& scope, const char* b, int64_t b_half) {
  (void)scope;
  RNNDYN_TILE_LOAD(6, b, 64);
  RNNDYN_TILE_PRODUCT(0, 4, 6);
  if constexpr (kPair) RNNDYN_TILE_PRODUCT(2, 5, 6);
  RNNDYN_TILE_LOAD(7, b + b_half, 64);
  RNNDYN_TILE_PRODUCT(1, 4, 7);
  if constexpr (kPair) RNNDYN_TILE_PRODUCT(3, 5, 7);
}
template <int Parts, bool kPair = true>
static inline void tile_step(TileScope& scope, const char* a0, const char* a1, int64_t a_part, const char* b,
                             int64_t b_half = kTileBytes) {
  // Small products first; those below float32's precision are left out.
  tile_load_a<kPair>(scope, a0, a1);
  for (int part = Parts - 1; part >= 0; --part) tile_products<kPair>(scope, b + part * 2 * b_half, b_half);
  if constexpr (Parts == 2) {
    tile_load_a<kPair>(scope, a0 + a_part, a1 + a_part);
    tile_products<kPair>(scope, b, b_half);
  }
  if constexpr (Parts == 3) {
    tile_load_a<kPair>(scope, a0 + a_part, a1 + a_part);
    tile_products<kPair>(scope, b + 2 * b_half, b_half);
    tile_products<kPair>(scope, b, b_half);
    tile_load_a<kPair>(scope, a0 + 2 * a_part, a1 + 2 * a_part);
    tile_products<kPair>(scope, b, b_half);
  }
}

static inline void tile_sums_zero(TileScope& scope) {
  (void)scope;
  RNNDYN_TILE_ZERO(0);
  RNNDYN_TILE_ZERO(1);
  RNNDYN_TILE_ZERO(2);
  RNNDYN_TILE_ZERO(3);
}
static inline void tile_sums_load(TileScope& scope, const float* c, int64_t stride) {
  (void)scope;
  __asm__ volatile("" ::: "memory");  // (the compiler does not see what tile loads read)
  RNNDYN_TILE_LOAD(0, c, stride);
  RNNDYN_TILE_LOAD(1, c + 16, stride);
  RNNDYN_TILE_LOAD(2, c + 4 * stride, stride);
  RNNDYN_TILE_LOAD(3, c + 4 * stride + 16, stride);
}
// [32, 32] floats, rows `stride` bytes apart.
static inline void tile_sums_store(TileScope& scope, float* c, int64_t stride) {
  (void)scope;
  RNNDYN_TILE_STORE(0, c, stride);
  RNNDYN_TILE_STORE(1, c + 16, stride);
  RNNDYN_TILE_STORE(2, c + 4 * stride, stride);
  RNNDYN_TILE_STORE(3, c + 4 * stride + 16, stride);
}

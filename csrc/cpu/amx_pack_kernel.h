// amx_conv: packing of weights. Included inside namespace rnndyn::<isa> after amx_tile_kernel.h; parameters are documented in amx_conv.h.

static int64_t amx_packed_size(const AmxPackParams& p) {
  return ceil_div(p.out_channels, 32) * ceil_div(p.in_channels, 32) * p.num_taps * p.parts * kTileBytes;
}

#ifdef RNNDYN_AMX

// 16 floats `stride` apart; those beyond the first `lanes` are not read and count as zero.
static inline __m512 amx_lanes(const float* from, int64_t stride, int64_t lanes) {
  const __mmask16 mask = first_lanes(lanes);
  if (stride == 1) return _mm512_maskz_loadu_ps(mask, from);
  const __m512i step = _mm512_mullo_epi32(_mm512_set1_epi32(int(stride)),
                                          _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, step, from, 4);
}

// A tile of weights: row i / 2 holds a pair of input channels for each of 16 output channels; parts kTileBytes elements apart. The channels
// that are nearer in memory fill the lanes.
static inline void amx_pack_tile(const AmxPackParams& p, const float* from, int64_t outs, int64_t ins, uint16_t* out) {
  if (p.out_stride < p.in_stride) {
    alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(kInterleave);
    for (int64_t i = 0; i < 32; i += 2) {
      __m512 x0 = amx_lanes(from + i * p.in_stride, p.out_stride, i < ins ? outs : 0);
      __m512 x1 = amx_lanes(from + (i + 1) * p.in_stride, p.out_stride, i + 1 < ins ? outs : 0);
      for (int part = 0; part < p.parts; ++part)
        _mm512_storeu_si512(out + part * kTileBytes + i * 16, _mm512_permutexvar_epi16(interleave, next_part(x0, x1)));
    }
    return;
  }
  alignas(64) uint16_t rows[3][512];
  for (int64_t o = 0; o < 16; ++o) {
    const float* row = from + o * p.out_stride;
    __m512 x0 = amx_lanes(row, p.in_stride, o < outs ? ins : 0);
    __m512 x1 = amx_lanes(row + 16 * p.in_stride, p.in_stride, o < outs ? ins - 16 : 0);
    for (int part = 0; part < p.parts; ++part) _mm512_store_si512(rows[part] + o * 32, next_part(x0, x1));
  }
  for (int part = 0; part < p.parts; ++part)
    amx_transpose(rows[part], reinterpret_cast<char*>(out + part * kTileBytes), 64);
}

#else

static inline void amx_pack_tile(const AmxPackParams& p, const float* from, int64_t outs, int64_t ins, uint16_t* out) {
  for (int64_t o = 0; o < 16; ++o)
    for (int64_t i = 0; i < 32; ++i)
      split_value(o < outs && i < ins ? from[o * p.out_stride + i * p.in_stride] : 0.0f, p.parts,
                  out + i / 2 * 32 + o * 2 + i % 2, kTileBytes);
}

#endif

// 32 input channels of a panel of 32 output channels: [taps, parts, 2 tiles].
static void amx_pack_block(const AmxPackParams& p, int64_t panel, int64_t block, uint16_t* to) {
  for (int half = 0; half < 2; ++half)
    for (int t = 0; t < p.num_taps; ++t) {
      const int64_t first_out = panel * 32 + half * 16, outs = smaller(16, larger(0, p.out_channels - first_out));
      const float* from = p.weight + first_out * p.out_stride + block * 32 * p.in_stride + p.tap[t].index;
      uint16_t* out = to + t * p.parts * kTileBytes + half * (kTileBytes / 2);
      amx_pack_tile(p, from, outs, smaller(32, p.in_channels - block * 32), out);
    }
}

static void amx_pack_weight(const AmxPackParams& p) {
  const int64_t blocks = ceil_div(p.in_channels, 32), panels = ceil_div(p.out_channels, 32);
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.num_threads)
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t block = 0; block < blocks; ++block)
      amx_pack_block(p, panel, block, p.packed + (panel * blocks + block) * p.num_taps * p.parts * kTileBytes);
}

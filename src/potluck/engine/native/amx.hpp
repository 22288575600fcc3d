// Products in bfloat16 on the tile unit (AMX) of processors that have one, for `lstm.cpp`.
//
// The unit multiplies 16 rows of 32 numbers with a tile of 16 columns in one instruction. Units are
// pairs of bfloat16 as of `BFloat16`, whose panels already lie as it reads a right factor; sums are
// filled up with zeros to whole tiles.

#pragma once

#include "gemm.hpp"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES

#include <sys/syscall.h>
#include <unistd.h>

constexpr int EDGE = 16;  // units and rows of a tile

// A process must ask the kernel for the tiles' memory, once.
static bool may_use_tiles() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// Nothing that was written before may still be in registers: compilers do not see what tiles read.
static inline void written() { __asm__ volatile("" ::: "memory"); }

// The shapes that the unit has in this thread while such an object lives. Tiles 0 to 3 are sums, 4
// and 5 of the left factor, 5, 6 and 7 of the right one; 0 to 4 may have fewer rows.
class TileShapes {
  public:
    TileShapes() {
        _tile_storeconfig(&before_);
        written();
    }
    ~TileShapes() {
        written();
        if (before_.palette)
            _tile_loadconfig(&before_);
        else
            _tile_release();
    }
    TileShapes(const TileShapes&) = delete;

    void rows(int num) {
        if (num == now_.rows[0]) return;
        now_.palette = 1;
        for (int i = 0; i < 8; i++) {
            now_.bytes[i] = 4 * EDGE;
            now_.rows[i] = uint8_t(i < 5 ? num : EDGE);
        }
        written();
        _tile_loadconfig(&now_);
    }

  private:
    struct alignas(64) Config {
        uint8_t palette = 0, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };
    Config before_, now_;
};

// EDGE numbers of bfloat16, each in 32 bits
static inline __m512i wide(const uint16_t* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Element j of row i becomes element i of row j.
static inline void transpose(__m512i (&rows)[EDGE]) {
    __m512i pairs[EDGE], fours[EDGE];  // fours[4 g + c] has columns c, 4 + c … of rows 4 g to 4 g + 3
    for (int i = 0; i < EDGE; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < EDGE; i += 4)
        for (int c = 0; c < 2; c++) {
            fours[i + 2 * c] = _mm512_unpacklo_epi64(pairs[i + c], pairs[i + 2 + c]);
            fours[i + 2 * c + 1] = _mm512_unpackhi_epi64(pairs[i + c], pairs[i + 2 + c]);
        }
    for (int c = 0; c < 4; c++) {
        const __m512i even = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88),
                      odd = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd),
                      more_even = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88),
                      more_odd = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
        rows[c] = _mm512_shuffle_i32x4(even, more_even, 0x88);
        rows[4 + c] = _mm512_shuffle_i32x4(odd, more_odd, 0x88);
        rows[8 + c] = _mm512_shuffle_i32x4(even, more_even, 0xdd);
        rows[12 + c] = _mm512_shuffle_i32x4(odd, more_odd, 0xdd);
    }
}

struct Tiles : BFloat16 {
    typedef TileShapes Shapes;

    static int depth(int inner) { return (inner + 2 * EDGE - 1) / (2 * EDGE) * EDGE; }

    // 16 units of a row from number `first` of it on; zeros beyond its end
    static inline __m512i units(const float* row, int first, int inner) {
        const int num = inner - first;
        const __mmask32 there = num >= 2 * EDGE ? ~0u : num <= 0 ? 0u : (1u << num) - 1;
        return __m512i(_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(there >> EDGE, row + first + EDGE),
                                           _mm512_maskz_loadu_ps(there & 0xffff, row + first)));
    }

    static const uint32_t* left(int64_t rows, int inner, const float* from,
                                std::vector<uint32_t>& room) {
        const int depth = Tiles::depth(inner);
        uint32_t* to = of(room, rows * depth);
        for (int64_t m = 0; m < rows; m++)
            for (int k = 0; k < depth; k += EDGE)
                _mm512_storeu_si512(to + m * depth + k, units(from + m * inner, 2 * k, inner));
        return to;
    }
};

// as the general ones of `gemm.hpp`

template <>
void pack_transposed<Tiles>(int rows, int columns, const float* from, uint32_t* packed) {
    const int depth = Tiles::depth(rows);
    for (int n = 0; n < columns; n += EDGE)
        for (int k = 0; k < depth; k += EDGE) {
            __m512i block[EDGE];
            for (int j = 0; j < EDGE; j++)
                block[j] = Tiles::units(from + int64_t(n + j) * rows, 2 * k, rows);
            transpose(block);
            uint32_t* to = packed + int64_t(n / COLUMNS * COLUMNS) * depth + n % COLUMNS;
            for (int j = 0; j < EDGE; j++) _mm512_storeu_si512(to + (k + j) * COLUMNS, block[j]);
        }
}

// The left factor of `rank_update`: tiles [columns / EDGE, depth / EDGE, EDGE, EDGE], whose rows are
// columns of the matrix. There are as many as `columns` says, a multiple of EDGE.
template <>
void pack<Tiles, LEFT>(int rows, int columns, const float* from, const int32_t*, uint32_t* packed) {
    const int depth = Tiles::depth(rows);
    for (int k = 0; k < depth; k += EDGE)
        for (int n = 0; n < columns; n += EDGE) {
            __m512i block[EDGE] = {};
            for (int j = 0; j < EDGE && 2 * (k + j) < rows; j++) {
                const float* row = from + int64_t(2 * (k + j)) * columns + n;
                const bool two = 2 * (k + j) + 1 < rows;
                const __m512i high = two ? Tiles::rounded(load(row + columns)) : __m512i{};
                block[j] = Tiles::rounded(load(row)) | _mm512_slli_epi32(high, 16);
            }
            transpose(block);
            uint32_t* to = packed + int64_t(n) * depth + k * EDGE;
            for (int j = 0; j < EDGE; j++) _mm512_storeu_si512(to + j * EDGE, block[j]);
        }
}

// Tiles 0, 1, … += left, rows of `row` units, of which as many count as the tiles have · the two tiles of
// a panel, and with MORE those of the next
template <bool MORE>
static inline void multiply_row(const uint32_t* left, int64_t row, const uint32_t* panel, int depth) {
    const uint32_t* next = panel + int64_t(depth) * COLUMNS;
    for (int k = 0; k < depth; k += EDGE) {
        const int64_t at = int64_t(k) * COLUMNS;
        _tile_loadd(4, left + k, 4 * row);
        _tile_loadd(5, panel + at, 4 * COLUMNS);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, panel + at + EDGE, 4 * COLUMNS);
        _tile_dpbf16ps(1, 4, 6);
        if constexpr (MORE) {
            _tile_loadd(7, next + at, 4 * COLUMNS);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, next + at + EDGE, 4 * COLUMNS);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
}

// Tiles 0, 1 and 2, 3 += two tiles of rows, `left` and `lower`, of `row` units, whose next EDGE units lie
// `step` further on · the two tiles of a panel
static inline void multiply_square(const uint32_t* left, const uint32_t* lower, int64_t row, int step,
                                   const uint32_t* panel, int depth) {
    for (int k = 0; k < depth / EDGE; k++) {
        const int64_t at = int64_t(k) * EDGE * COLUMNS;
        _tile_loadd(4, left + k * step, 4 * row);
        _tile_loadd(6, panel + at, 4 * COLUMNS);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + at + EDGE, 4 * COLUMNS);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower + k * step, 4 * row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// sums [2 EDGE, COLUMNS] = what `multiply_square` adds; all tiles have EDGE rows
static inline void product_of_square(const uint32_t* left, const uint32_t* lower, int64_t row, int step,
                                     const uint32_t* panel, int depth, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    multiply_square(left, lower, row, step, panel, depth);
    _tile_stored(0, sums, 4 * COLUMNS);
    _tile_stored(1, sums + EDGE, 4 * COLUMNS);
    _tile_stored(2, sums + EDGE * COLUMNS, 4 * COLUMNS);
    _tile_stored(3, sums + EDGE * COLUMNS + EDGE, 4 * COLUMNS);
    written();
}

template <>
void add_product<Tiles>(int64_t rows, const uint32_t* left, int depth, const uint32_t* packed,
                        int columns, float* result, TileShapes& shapes) {
    alignas(64) float edge[EDGE * COLUMNS];
    const int64_t squares = rows / (2 * EDGE) * 2 * EDGE;
    const int whole = columns / COLUMNS * COLUMNS;  // columns of whole panels
    written();
    if (squares) shapes.rows(EDGE);
    for (int n = 0; n < whole; n += COLUMNS)
        for (int64_t m = 0; m < squares; m += 2 * EDGE) {
            float *to = result + m * columns + n, *lower = to + EDGE * columns;
            const uint32_t* a = left + m * depth;
            _tile_loadd(0, to, 4 * columns);
            _tile_loadd(1, to + EDGE, 4 * columns);
            _tile_loadd(2, lower, 4 * columns);
            _tile_loadd(3, lower + EDGE, 4 * columns);
            multiply_square(a, a + EDGE * depth, depth, EDGE, packed + int64_t(n) * depth, depth);
            _tile_stored(0, to, 4 * columns);
            _tile_stored(1, to + EDGE, 4 * columns);
            _tile_stored(2, lower, 4 * columns);
            _tile_stored(3, lower + EDGE, 4 * columns);
        }
    for (int64_t m = 0; m < rows; m += EDGE) {  // what is left of the rows, and of the columns
        const int num = int(rows - m < EDGE ? rows - m : EDGE);
        int n = m < squares ? whole : 0;
        if (n == columns) continue;
        shapes.rows(num);
        const uint32_t* a = left + m * depth;
        for (; n + 2 * COLUMNS <= columns; n += 2 * COLUMNS) {
            float* to = result + m * columns + n;
            _tile_loadd(0, to, 4 * columns);
            _tile_loadd(1, to + EDGE, 4 * columns);
            _tile_loadd(2, to + 2 * EDGE, 4 * columns);
            _tile_loadd(3, to + 3 * EDGE, 4 * columns);
            multiply_row<true>(a, depth, packed + int64_t(n) * depth, depth);
            _tile_stored(0, to, 4 * columns);
            _tile_stored(1, to + EDGE, 4 * columns);
            _tile_stored(2, to + 2 * EDGE, 4 * columns);
            _tile_stored(3, to + 3 * EDGE, 4 * columns);
        }
        for (; n < columns; n += COLUMNS) {
            const int some = columns - n < COLUMNS ? columns - n : COLUMNS;
            _tile_zero(0);
            _tile_zero(1);
            multiply_row<false>(a, depth, packed + int64_t(n) * depth, depth);
            _tile_stored(0, edge, 4 * COLUMNS);
            _tile_stored(1, edge + EDGE, 4 * COLUMNS);
            for (int i = 0; i < num; i++)
                for (int j = 0; j < some; j++)
                    result[(m + i) * columns + n + j] += edge[i * COLUMNS + j];
        }
    }
}

template <>
void rank_update<Tiles>(int depth, int out, int in, const uint32_t* gradient, const uint32_t* inputs,
                        float factor, float* weight, TileShapes& shapes) {
    alignas(64) float sums[2 * EDGE * COLUMNS];
    written();
    shapes.rows(EDGE);
    for (int n = 0; n < in; n += COLUMNS) {
        const int some = in - n < COLUMNS ? in - n : COLUMNS;
        for (int m = 0; m < out; m += 2 * EDGE) {  // COLUMNS divides `out`
            const uint32_t* a = gradient + int64_t(m) * depth;
            product_of_square(a, a + EDGE * depth, EDGE, EDGE * EDGE, inputs + int64_t(n) * depth, depth,
                              sums);
            for (int i = 0; i < 2 * EDGE; i++) {
                float* to = weight + int64_t(m + i) * in + n;
                const float* from = sums + i * COLUMNS;
                if (some == COLUMNS)
                    for (int j = 0; j < COLUMNS; j += WIDTH)
                        store(to + j, load(to + j) + factor * load(from + j));
                else
                    for (int j = 0; j < some; j++) to[j] += factor * from[j];
            }
        }
    }
}

#endif

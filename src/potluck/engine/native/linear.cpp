// A linear layer on one core's tile unit (AMX): forward, and back with the SGD step of its weights.
// `potluck.engine.native.linear` compiles it.
//
//     y = x Wᵀ + b        ∂ℓ/∂x = g W        W += factor · gᵀ x        b += factor · Σ g        g = ∂ℓ/∂y
//
// x, y and g are bfloat16, W and b float32; sums are float32. With a thin batch the time goes into
// reading W, so that is done once each way: forward some rows of it at a time, which then lie in the cache
// as bfloat16; back some columns, which take their step when g has been multiplied with them.
//
// in is a multiple of COLUMNS; out is filled up to one with zeros.

#include "amx.hpp"

#if defined(HAS_TILES)

constexpr int SIDE = 2 * EDGE;  // of a square of four tiles, and COLUMNS
constexpr int OUTPUTS = 4 * SIDE;  // rows of W at a time

struct Rooms {
    std::vector<uint32_t> weights, rows, turned;
    std::vector<float> biases;
};

static Rooms& rooms_of() {
    static thread_local Rooms rooms;
    return rooms;
}

// [rows, 2 depth] as panels of the transpose, [rows / COLUMNS, depth, COLUMNS]; all but the last are whole
static void pack_rows(int64_t rows, int depth, const uint16_t* from, uint32_t* packed) {
    for (int64_t m = 0; m < rows; m += EDGE)
        for (int k = 0; k < depth; k += EDGE) {
            __m512i block[EDGE] = {};
            for (int j = 0; j < EDGE && m + j < rows; j++)
                block[j] = _mm512_loadu_si512(from + 2 * ((m + j) * depth + k));
            transpose(block);
            uint32_t* to = packed + m / COLUMNS * COLUMNS * depth + m % COLUMNS;
            for (int j = 0; j < EDGE; j++) _mm512_storeu_si512(to + int64_t(k + j) * COLUMNS, block[j]);
        }
}

// sums [out, rows], one square of them, plus the bias, to outputs [rows, out], of which there are num · some
static void put(const float* sums, const float* bias, int num, int some, int64_t out, uint16_t* outputs) {
    const __mmask32 there = some < SIDE ? (1u << some) - 1 : ~0u;
    const __m512 low_bias = _mm512_maskz_loadu_ps(bias ? there & 0xffff : 0, bias),
                 high_bias = _mm512_maskz_loadu_ps(bias ? there >> EDGE : 0, bias + EDGE);
    for (int from = 0; from < num; from += EDGE) {
        __m512i first[EDGE], second[EDGE];
        for (int j = 0; j < EDGE; j++) {
            first[j] = _mm512_loadu_si512(sums + j * COLUMNS + from);
            second[j] = _mm512_loadu_si512(sums + (EDGE + j) * COLUMNS + from);
        }
        transpose(first);
        transpose(second);
        for (int i = 0; i < EDGE && from + i < num; i++) {
            const __m512 low = _mm512_add_ps(__m512(first[i]), low_bias),
                         high = _mm512_add_ps(__m512(second[i]), high_bias);
            _mm512_mask_storeu_epi16(outputs + (from + i) * out, there,
                                     __m512i(_mm512_cvtne2ps_pbh(high, low)));
        }
    }
}

// inputs [rows, in], weight [out, in] and bias [out] or null to outputs [rows, out]
static void forward(int64_t rows, int in, int out, const uint16_t* inputs, const float* weight,
                    const float* bias, uint16_t* outputs) {
    Rooms& rooms = rooms_of();
    TileShapes shapes;
    const int depth = in / 2;
    uint32_t* packed = of(rooms.rows, (rows + COLUMNS - 1) / COLUMNS * COLUMNS * depth);
    uint32_t* rounded = of(rooms.weights, int64_t(OUTPUTS) * depth);
    alignas(64) float sums[SIDE * COLUMNS];
    pack_rows(rows, depth, inputs, packed);
    shapes.rows(EDGE);
    for (int from = 0; from < out; from += OUTPUTS) {
        const int some = out - from < OUTPUTS ? out - from : OUTPUTS;
        for (int64_t k = 0; k < int64_t(some) * depth; k += EDGE)
            _mm512_storeu_si512(rounded + k,
                                Tiles::units(weight + int64_t(from) * in + 2 * k, 0, 2 * EDGE));
        std::memset(rounded + int64_t(some) * depth, 0, 4 * int64_t(whole_panels(some) - some) * depth);
        written();
        for (int64_t m = 0; m < rows; m += COLUMNS)
            for (int n = 0; n < some; n += SIDE) {
                const uint32_t* left = rounded + int64_t(n) * depth;
                product_of_square(left, left + int64_t(EDGE) * depth, depth, EDGE, packed + m * depth,
                                  depth, sums);
                put(sums, bias ? bias + from + n : nullptr, int(rows - m < COLUMNS ? rows - m : COLUMNS),
                    some - n, out, outputs + m * out + from + n);
            }
    }
}

// two rows of COLUMNS numbers as a row of units
static void pair(const float* row, const float* next, uint32_t* to) { Tiles::put(COLUMNS, row, next, to); }

static void pair(const uint16_t* row, const uint16_t* next, uint32_t* to) {
    for (int j = 0; j < COLUMNS; j += WIDTH) {
        const __m512i high = next ? wide(next + j) : __m512i{};
        _mm512_storeu_si512(to + j, wide(row + j) | _mm512_slli_epi32(high, 16));
    }
}

// COLUMNS columns of rows that are `stride` long as a panel of that depth
template <class T>
static void pack_columns(int64_t rows, int64_t stride, const T* from, int depth, uint32_t* packed) {
    for (int64_t k = 0; k < depth; k++, packed += COLUMNS)
        if (2 * k < rows) {
            const T* row = from + 2 * k * stride;
            pair(row, 2 * k + 1 < rows ? row + stride : nullptr, packed);
        } else
            std::memset(packed, 0, 4 * COLUMNS);
}

// Rows [rows, columns] as the left factor of a sum over rows: tiles [columns / EDGE, rows / SIDE, EDGE,
// EDGE], whose rows are columns of the matrix; rows is a multiple of SIDE.
static void turn(int64_t rows, int columns, const uint16_t* from, uint32_t* packed) {
    for (int64_t k = 0; k < rows / 2; k += EDGE)
        for (int n = 0; n < columns; n += EDGE) {
            __m512i block[EDGE];
            for (int j = 0; j < EDGE; j++) {
                const uint16_t* row = from + 2 * (k + j) * columns + n;
                block[j] = wide(row) | _mm512_slli_epi32(wide(row + columns), 16);
            }
            transpose(block);
            uint32_t* to = packed + n * (rows / 2) + k * EDGE;
            for (int j = 0; j < EDGE; j++) _mm512_storeu_si512(to + j * EDGE, block[j]);
        }
}

// to [num, COLUMNS], whose rows are `stride` further, += factor · sums
static void step(int num, const float* sums, float factor, int64_t stride, float* to) {
    for (int i = 0; i < num; i++, to += stride, sums += COLUMNS) {
        for (int j = 0; j < COLUMNS; j += WIDTH) {
            _mm_prefetch(to + COLUMNS + j, _MM_HINT_T1);  // the next columns, which are wanted soon
            store(to + j, load(to + j) + factor * load(sums + j));
        }
    }
}

// From into [rows, out] = ∂ℓ/∂y: onward [rows, in] = ∂ℓ/∂x unless it is null, and weight and bias with
// `factor` times their gradients added.
static void backward(int64_t rows, int in, int out, const uint16_t* inputs, const uint16_t* into,
                     float factor, uint16_t* onward, float* weight, float* bias) {
    Rooms& rooms = rooms_of();
    TileShapes shapes;
    const int whole = whole_panels(out), outs = whole / 2, depth = Tiles::depth(int(rows));
    uint32_t* gradient = of(rooms.rows, int64_t(2 * depth) * outs + int64_t(depth) * COLUMNS);
    uint32_t* panel = gradient + int64_t(2 * depth) * outs;  // of the inputs
    uint32_t* turned = of(rooms.turned, int64_t(whole) * depth);
    uint32_t* weights = of(rooms.weights, int64_t(outs) * COLUMNS);
    alignas(64) float sums[SIDE * COLUMNS];
    float* biases = of(rooms.biases, whole);
    std::memset(gradient, 0, 4 * int64_t(2 * depth) * outs);
    std::memset(biases, 0, 4 * whole);
    for (int64_t m = 0; m < rows; m++) {
        const uint16_t* row = reinterpret_cast<const uint16_t*>(gradient + m * outs);
        std::memcpy(gradient + m * outs, into + m * out, 2 * out);
        for (int j = 0; j < whole; j += WIDTH)
            store(biases + j, load(biases + j) + Floats(_mm512_slli_epi32(wide(row + j), 16)));
    }
    turn(2 * depth, whole, reinterpret_cast<const uint16_t*>(gradient), turned);
    shapes.rows(EDGE);
    for (int n = 0; n < in; n += COLUMNS) {
        if (onward) pack_columns(out, in, weight + n, outs, weights);
        pack_columns(rows, in, inputs + n, depth, panel);
        written();
        for (int64_t m = 0; onward && m < rows; m += SIDE) {
            const uint32_t* left = gradient + m * outs;
            product_of_square(left, left + int64_t(EDGE) * outs, outs, EDGE, weights, outs, sums);
            for (int i = 0; i < SIDE && m + i < rows; i++)
                _mm512_storeu_si512(onward + (m + i) * in + n, Tiles::units(sums + i * COLUMNS, 0, COLUMNS));
        }
        for (int m = 0; m < out; m += SIDE) {
            const uint32_t* left = turned + int64_t(m) * depth;
            product_of_square(left, left + EDGE * depth, EDGE, EDGE * EDGE, panel, depth, sums);
            step(out - m < SIDE ? out - m : SIDE, sums, factor, in, weight + int64_t(m) * in + n);
        }
    }
    for (int j = 0; bias && j < out; j++) bias[j] += factor * biases[j];
}

extern "C" {

int prepare() { return may_use_tiles(); }  // whether the next two may be called

void forward_linear(int64_t rows, int in, int out, const uint16_t* inputs, const float* weight,
                    const float* bias, uint16_t* outputs) {
    forward(rows, in, out, inputs, weight, bias, outputs);
}

void backward_linear(int64_t rows, int in, int out, const uint16_t* inputs, const uint16_t* into,
                     float factor, uint16_t* onward, float* weight, float* bias) {
    backward(rows, in, out, inputs, into, factor, onward, weight, bias);
}

}  // extern "C"

#endif

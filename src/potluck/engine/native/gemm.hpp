// Products of small matrices on one core, for `lstm.cpp`.
//
// A tile of the result stays in registers while the right factor, packed in panels of COLUMNS
// columns, streams past it. The kinds of factors:
//
//     Float32    units are floats, one for each place of the sum
//     BFloat16   units are two bfloat16, of places 2 k and 2 k + 1, which processors with AVX512_BF16
//                multiply and add to a float32 in one instruction
//
// "depth" is the number of units that a sum is over. Results are float32, and added to what is there.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 10;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, ROWS = 6;
#else
constexpr int WIDTH = 4, ROWS = 8;
#endif
constexpr int COLUMNS = 2 * WIDTH;
constexpr int LEFT = 16, HALF = 8;  // rows that `rank_update` packs together, and those of its tiles

typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), aligned(4)));

static inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
static inline void store(float* p, Floats x) { *reinterpret_cast<Floats*>(p) = x; }
static inline Floats all(float x) { return x - Floats{}; }

// At least `size` elements that stay in use from call to call. They start on a line of the cache, since
// vectors that lie on two cost twice.
template <class T>
static T* of(std::vector<T>& room, int64_t size) {
    constexpr int64_t LINE = 64, more = LINE / sizeof(T);
    if (int64_t(room.size()) < size + more) room.resize(size + more);
    return room.data() + (-reinterpret_cast<intptr_t>(room.data()) & (LINE - 1)) / int64_t(sizeof(T));
}

static inline int whole_panels(int columns) { return (columns + COLUMNS - 1) / COLUMNS * COLUMNS; }

struct Float32 {
    typedef float Unit;
    static int depth(int inner) { return inner; }

    // units of `num` columns of one place of the sum; `next`, the row after it, is not needed
    static void put(int num, const float* row, const float*, float* to) {
        std::memcpy(to, row, 4 * num);
    }

    // rows [rows, inner] as left factors [rows, depth]
    static const float* left(int64_t, int, const float* from, std::vector<float>&) { return from; }

    static inline Floats add(Floats sum, float unit, Floats panel) { return sum + unit * panel; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
    typedef uint32_t Unit;
    static int depth(int inner) { return (inner + 1) / 2; }

    // the nearest bfloat16, the even one of two
    static inline uint32_t rounded(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        const uint32_t near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return x == x ? near : 0x7fc0;
    }

    static inline __m512i rounded(Floats x) {
        return _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(__m512(x))));
    }

    static void put(int num, const float* row, const float* next, uint32_t* to) {
        int j = 0;
        for (; j + WIDTH <= num; j += WIDTH) {
            const __m512i low = rounded(load(row + j));
            const __m512i high = next ? rounded(load(next + j)) : __m512i{};
            _mm512_storeu_si512(to + j, low | _mm512_slli_epi32(high, 16));
        }
        for (; j < num; j++) to[j] = rounded(row[j]) | (next ? rounded(next[j]) << 16 : 0);
    }

    static const uint32_t* left(int64_t rows, int inner, const float* from,
                                std::vector<uint32_t>& room) {
        const int whole = inner / 2, depth = (inner + 1) / 2;
        uint32_t* units = of(room, rows * depth);
        for (int64_t m = 0; m < rows; m++) {
            const float* row = from + m * inner;
            uint32_t* to = units + m * depth;
            for (int k = 0; k < whole; k++) to[k] = rounded(row[2 * k]) | rounded(row[2 * k + 1]) << 16;
            if (whole < depth) to[whole] = rounded(row[inner - 1]);
        }
        return units;
    }

    static inline Floats add(Floats sum, uint32_t unit, Floats panel) {
        return Floats(_mm512_dpbf16_ps(__m512(sum), __m512bh(_mm512_set1_epi32(int(unit))),
                                       __m512bh(__m512(panel))));
    }
};
#endif

// matrix [rows, columns], over whose rows a sum goes, in groups of GROUP columns: [columns / GROUP,
// depth, GROUP], the last group filled up with zeros. Row k is from[index[k]], or from[k] without an
// index.
template <class P, int GROUP>
static void pack(int rows, int columns, const float* from, const int32_t* index,
                 typename P::Unit* packed) {
    constexpr int SOME = 16;  // places that stay in the cache while all groups are written
    const int depth = P::depth(rows), rows_a_unit = P::depth(4) == 4 ? 1 : 2;
    for (int first = 0; first < depth; first += SOME)
        for (int n = 0; n < columns; n += GROUP) {
            const int some = columns - n < GROUP ? columns - n : GROUP;
            for (int k = first; k < depth && k < first + SOME; k++) {
                const int r = k * rows_a_unit;
                typename P::Unit* to = packed + int64_t(n) * depth + k * GROUP;
                if (r >= rows) {  // the sum is filled up
                    std::memset(to, 0, 4 * GROUP);
                    continue;
                }
                const float* row = from + int64_t(index ? index[r] : r) * columns + n;
                const float* next = nullptr;
                if (r + 1 < rows) next = from + int64_t(index ? index[r + 1] : r + 1) * columns + n;
                if (some == GROUP)
                    P::put(GROUP, row, next, to);
                else {
                    std::memset(to, 0, 4 * GROUP);
                    P::put(some, row, next, to);
                }
            }
        }
}

// the transpose of matrix [columns, rows] in panels; columns is a multiple of COLUMNS
template <class P>
static void pack_transposed(int rows, int columns, const float* from, typename P::Unit* packed) {
    static thread_local std::vector<typename P::Unit> room;
    const typename P::Unit* units = P::left(columns, rows, from, room);
    const int depth = P::depth(rows);
    for (int n = 0; n < columns; n += COLUMNS)
        for (int first = 0; first < depth; first += WIDTH) {
            const int last = first + WIDTH < depth ? first + WIDTH : depth;
            for (int j = 0; j < COLUMNS; j++)
                for (int k = first; k < last; k++)
                    packed[int64_t(n) * depth + k * COLUMNS + j] = units[int64_t(n + j) * depth + k];
        }
}

// sum[m] += over k, left[m · row + k · place] · panel[k, 0:V·WIDTH]
template <class P, int M, int V>
static inline __attribute__((always_inline)) void accumulate(
    const typename P::Unit* left, int row, int place, const typename P::Unit* panel, int depth,
    Floats (&sum)[M][V]) {
    for (int k = 0; k < depth; k++) {
        Floats right[V];
        for (int j = 0; j < V; j++)
            right[j] = load(reinterpret_cast<const float*>(panel + k * COLUMNS) + j * WIDTH);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++)
                sum[m][j] = P::add(sum[m][j], left[m * row + k * place], right[j]);
    }
}

// result[m, 0:V·WIDTH] += left[m, 0:depth] · panel[0:depth, 0:V·WIDTH] for m < M
template <class P, int M, int V>
static void tile(const typename P::Unit* left, const typename P::Unit* panel, int depth,
                 float* result, int stride) {
    Floats sum[M][V];
    for (int m = 0; m < M; m++)
        for (int j = 0; j < V; j++) sum[m][j] = load(result + m * stride + j * WIDTH);
    accumulate<P>(left, depth, 1, panel, depth, sum);
    for (int m = 0; m < M; m++)
        for (int j = 0; j < V; j++) store(result + m * stride + j * WIDTH, sum[m][j]);
}

template <class P, int V, int M = ROWS>
static void some_rows(int rows, const typename P::Unit* left, const typename P::Unit* panel, int depth,
                      float* result, int stride) {
    if (rows == M)
        tile<P, M, V>(left, panel, depth, result, stride);
    else if constexpr (M > 1)
        some_rows<P, V, M - 1>(rows, left, panel, depth, result, stride);
}

// result [rows, columns] += left [rows, depth] · what was packed [depth, columns]
template <class P>
static void add_product(int64_t rows, const typename P::Unit* left, int depth,
                        const typename P::Unit* packed, int columns, float* result) {
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    float edge[ROWS * COLUMNS] = {};
    for (int n = 0; n < columns; n += COLUMNS) {
        const int some = columns - n < COLUMNS ? columns - n : COLUMNS;
        for (int64_t part = 0; part < parts; part++) {  // of about as many rows each
            const int64_t from = rows * part / parts;
            const int num = int(rows * (part + 1) / parts - from);
            const typename P::Unit *a = left + from * depth, *panel = packed + int64_t(n) * depth;
            float* to = result + from * columns + n;
            if (some == COLUMNS) {
                some_rows<P, 2>(num, a, panel, depth, to, columns);
                continue;
            }
            for (int m = 0; m < num; m++) std::memcpy(edge + m * COLUMNS, to + m * columns, 4 * some);
            (some > WIDTH ? some_rows<P, 2> : some_rows<P, 1>)(num, a, panel, depth, edge, COLUMNS);
            for (int m = 0; m < num; m++) std::memcpy(to + m * columns, edge + m * COLUMNS, 4 * some);
        }
    }
}

// result[m, 0:some] += factor · left[0:depth, m]ᵀ · panel[0:depth, 0:V·WIDTH] for m < HALF
template <class P, int V>
static void outer(const typename P::Unit* left, const typename P::Unit* panel, int depth, float factor,
                  float* result, int stride, int some) {
    Floats sum[HALF][V] = {};
    accumulate<P>(left, 1, LEFT, panel, depth, sum);
    if (some < V * WIDTH) {
        for (int m = 0; m < HALF; m++)
            for (int j = 0; j < some; j++)
                result[m * stride + j] += factor * sum[m][j / WIDTH][j % WIDTH];
        return;
    }
    for (int m = 0; m < HALF; m++)
        for (int j = 0; j < V; j++) {
            float* at = result + m * stride + j * WIDTH;
            store(at, load(at) + factor * sum[m][j]);
        }
}

// weight [out, in] += factor · gradient [rows, out]ᵀ · inputs [rows, in], packed in groups of LEFT and
// in panels; out is a multiple of LEFT
template <class P>
static void rank_update(int depth, int out, int in, const typename P::Unit* gradient,
                        const typename P::Unit* inputs, float factor, float* weight) {
    for (int n = 0; n < in; n += COLUMNS) {
        const int some = in - n < COLUMNS ? in - n : COLUMNS;
        for (int m = 0; m < out; m += HALF)
            (some > WIDTH ? outer<P, 2> : outer<P, 1>)(
                gradient + int64_t(m / LEFT * LEFT) * depth + m % LEFT, inputs + int64_t(n) * depth,
                depth, factor, weight + int64_t(m) * in + n, in, some);
    }
}

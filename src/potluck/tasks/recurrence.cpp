// One LSTM layer on one core: its steps forward, and its steps back with the SGD step of its weights.
// `potluck.tasks.native` compiles it.
//
//     a_t = W x_t + U h_{t-1} + b            i, f, o = σ(a_i), σ(a_f), σ(a_o)      g = tanh(a_g)
//     c_t = f ∘ c_{t-1} + i ∘ g              h_t = o ∘ tanh(c_t)
//
// The products with U are of a few rows, one for each line of a batch, with a large matrix. Libraries
// reach half of what the core can do there. Here a tile of ROWS × COLUMNS of the result stays in
// registers while the matrix, laid out in panels of COLUMNS columns, streams past it. Gates are in the
// order i, f, g, o, as in PyTorch. All arrays are float32 and contiguous unless strides are given.
//
// Going back, a place is a step of a line. From some place on a line's ∂ℓ/∂h may be zero to its end,
// as it is where the line is padded: nothing flows from there, and these places are left out.

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 10;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, ROWS = 6;
#else
constexpr int WIDTH = 4, ROWS = 8;
#endif
constexpr int COLUMNS = 2 * WIDTH, BLOCK = 1024;

typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef std::vector<float> Room;

static inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
static inline void store(float* p, Floats x) { *reinterpret_cast<Floats*>(p) = x; }
static inline Floats all(float x) { return x - Floats{}; }

// At least `size` floats that stay in use from call to call.
static float* of(Room& room, int64_t size) {
    if (int64_t(room.size()) < size) room.resize(size);
    return room.data();
}

static int whole_panels(int columns) { return (columns + COLUMNS - 1) / COLUMNS * COLUMNS; }

// matrix [rows, columns] in panels [rows, COLUMNS], the last one filled up with zeros. Row k is
// from[index[k]], or from[k] without an index.
static void pack(int rows, int columns, const float* from, const int32_t* index, float* packed) {
    for (int n = 0; n < columns; n += COLUMNS) {
        const int some = columns - n < COLUMNS ? columns - n : COLUMNS;
        for (int k = 0; k < rows; k++) {
            float* at = packed + int64_t(n) * rows + k * COLUMNS;
            std::memcpy(at, from + int64_t(index ? index[k] : k) * columns + n, 4 * some);
            std::memset(at + some, 0, 4 * (COLUMNS - some));
        }
    }
}

// the transpose of matrix [columns, rows] in panels; columns is a multiple of COLUMNS
static void pack_transposed(int rows, int columns, const float* from, float* packed) {
    for (int n = 0; n < columns; n += COLUMNS)
        for (int first = 0; first < rows; first += WIDTH) {
            const int last = first + WIDTH < rows ? first + WIDTH : rows;
            for (int j = 0; j < COLUMNS; j++)
                for (int k = first; k < last; k++)
                    packed[int64_t(n) * rows + k * COLUMNS + j] = from[int64_t(n + j) * rows + k];
        }
}

// result[m, 0:V·WIDTH] += left[m, 0:inner] · panel[0:inner, 0:V·WIDTH] for m < M
template <int M, int V>
static void tile(const float* left, const float* panel, int inner, float* result, int stride) {
    Floats sum[M][V];
    for (int m = 0; m < M; m++)
        for (int j = 0; j < V; j++) sum[m][j] = load(result + m * stride + j * WIDTH);
    for (int k = 0; k < inner; k++) {
        Floats row[V];
        for (int j = 0; j < V; j++) row[j] = load(panel + k * COLUMNS + j * WIDTH);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++) sum[m][j] += left[m * inner + k] * row[j];
    }
    for (int m = 0; m < M; m++)
        for (int j = 0; j < V; j++) store(result + m * stride + j * WIDTH, sum[m][j]);
}

template <int V, int M = ROWS>
static void some_rows(int rows, const float* left, const float* panel, int inner, float* result,
                      int stride) {
    if (rows == M)
        tile<M, V>(left, panel, inner, result, stride);
    else if constexpr (M > 1)
        some_rows<V, M - 1>(rows, left, panel, inner, result, stride);
}

// result [rows, columns] += left [rows, inner] · what was packed [inner, columns]
static void add_product(int64_t rows, const float* left, int inner, const float* packed, int columns,
                        float* result) {
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    float edge[ROWS * COLUMNS] = {};
    for (int n = 0; n < columns; n += COLUMNS) {
        const int some = columns - n < COLUMNS ? columns - n : COLUMNS;
        for (int64_t part = 0; part < parts; part++) {  // of about as many rows each
            const int64_t from = rows * part / parts;
            const int num = int(rows * (part + 1) / parts - from);
            const float *a = left + from * inner, *panel = packed + int64_t(n) * inner;
            float* to = result + from * columns + n;
            if (some == COLUMNS) {
                some_rows<2>(num, a, panel, inner, to, columns);
                continue;
            }
            for (int m = 0; m < num; m++) std::memcpy(edge + m * COLUMNS, to + m * columns, 4 * some);
            (some > WIDTH ? some_rows<2> : some_rows<1>)(num, a, panel, inner, edge, COLUMNS);
            for (int m = 0; m < num; m++) std::memcpy(to + m * columns, edge + m * COLUMNS, 4 * some);
        }
    }
}

// e^x to some 1e-7 of it, for x that neither overflow nor vanish
static inline Floats exponential(Floats x) {
    x = x > 87.0f ? all(87.0f) : x;  // NaN stays
    x = x < -87.0f ? all(-87.0f) : x;
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // rounds to whole numbers
    const Floats n = shifted - 12582912.0f;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = all(1.9875691e-4f);
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    Ints power;
    std::memcpy(&power, &shifted, sizeof power);
    power <<= 23;  // of the low bits of `shifted`, which hold n
    Ints bits;
    std::memcpy(&bits, &p, sizeof bits);
    bits += power;
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

static inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

static inline Floats hyperbolic(Floats x) {
    const Floats square = x * x;
    const Floats near = x + x * square * (-0.33333333f + square * (0.13333333f - square * 0.05396825f));
    const Floats far = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
    return square < 0.04f ? near : far;
}

// sum[m, 0:V·WIDTH] of left[k, m] · panel[k, 0:V·WIDTH], times `factor`, onto the first `some` columns
// of the result, for m < M
template <int M, int V>
static void outer(const float* left, const float* panel, int inner, float factor, float* result,
                  int stride, int some) {
    Floats sum[M][V] = {};
    for (int k = 0; k < inner; k++) {
        Floats row[V];
        for (int j = 0; j < V; j++) row[j] = load(panel + k * COLUMNS + j * WIDTH);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
            for (int j = 0; j < V; j++) sum[m][j] += left[k * M + m] * row[j];
    }
    if (some < V * WIDTH) {
        for (int m = 0; m < M; m++)
            for (int j = 0; j < some; j++)
                result[m * stride + j] += factor * sum[m][j / WIDTH][j % WIDTH];
        return;
    }
    for (int m = 0; m < M; m++)
        for (int j = 0; j < V; j++) {
            float* at = result + m * stride + j * WIDTH;
            store(at, load(at) + factor * sum[m][j]);
        }
}

// Of gradient [rows, out], from row `from` on, groups of LEFT columns: [out / LEFT, rows, LEFT].
constexpr int LEFT = 8;
static void pack_left(int rows, int out, const float* from, float* packed) {
    constexpr int SOME = 16;  // rows that stay in the cache
    for (int first = 0; first < rows; first += SOME)
        for (int m = 0; m < out; m += LEFT)
            for (int k = first; k < rows && k < first + SOME; k++)
                std::memcpy(packed + int64_t(m) * rows + k * LEFT, from + int64_t(k) * out + m,
                            4 * LEFT);
}

// weight [out, in] += factor · gradient [rows, out]ᵀ · inputs [rows, in], both packed
static void rank_update(int rows, int out, int in, const float* gradient, const float* inputs,
                        float factor, float* weight) {
    for (int n = 0; n < in; n += COLUMNS) {
        const int some = in - n < COLUMNS ? in - n : COLUMNS;
        for (int m = 0; m < out; m += LEFT)
            (some > WIDTH ? outer<LEFT, 2> : outer<LEFT, 1>)(
                gradient + int64_t(m) * rows, inputs + int64_t(n) * rows, rows, factor,
                weight + int64_t(m) * in + n, in, some);
    }
}

static thread_local Room panels, flowing, gradients, left_panels;
static thread_local std::vector<int32_t> places;

extern "C" {

int columns() { return COLUMNS; }

// inputs [steps, batch, in]; weight W [4 size, in]; recurrent U [4 size, size]; biases [4 size], of
// which b is the sum. gates [steps, batch, 4 size]; squashed [steps, batch, size], which is tanh(c);
// hidden and cells [steps + 1, batch, size], the first states of which are set to zero. size is a
// multiple of COLUMNS.
void forward(int steps, int batch, int in, int size, const float* inputs, const float* weight,
             const float* recurrent, const float* bias, const float* other_bias, float* gates,
             float* hidden, float* cells, float* squashed) {
    const int width = 4 * size;
    const int64_t rows = int64_t(batch) * size;
    float* packed = of(panels, int64_t(width) * (in > size ? in : size));
    for (int j = 0; j < width; j++) gates[j] = bias[j] + other_bias[j];
    for (int64_t k = 1; k < int64_t(steps) * batch; k++)
        std::memcpy(gates + k * width, gates, 4 * width);
    pack_transposed(in, width, weight, packed);
    add_product(int64_t(steps) * batch, inputs, in, packed, width, gates);
    pack_transposed(size, width, recurrent, packed);
    std::memset(hidden, 0, 4 * rows);
    std::memset(cells, 0, 4 * rows);
    for (int t = 0; t < steps; t++) {
        float* gate = gates + t * 4 * rows;
        if (t > 0)  // before, the state is zero
            add_product(batch, hidden + t * rows, size, packed, width, gate);
        for (int b = 0; b < batch; b++)
            for (int j = 0; j < size; j += WIDTH) {
                float* at = gate + b * width + j;
                const int64_t before = t * rows + b * size + j, after = before + rows;
                const Floats i = sigmoid(load(at)), f = sigmoid(load(at + size));
                const Floats g = hyperbolic(load(at + 2 * size)), o = sigmoid(load(at + 3 * size));
                const Floats c = f * load(cells + before) + i * g, s = hyperbolic(c);
                store(at, i), store(at + size, f), store(at + 2 * size, g), store(at + 3 * size, o);
                store(cells + after, c), store(squashed + before, s), store(hidden + after, o * s);
            }
    }
}

// From ∂ℓ/∂h_t, into_hidden [steps, batch, size] with strides of its own, and ∂ℓ/∂c of the last
// step, into_cell [batch, size], which is lost: onward [steps, batch, in] = ∂ℓ/∂x unless it is null,
// and W, U and both biases with `factor` times their gradients added. The rest as `forward` left it.
void backward(int steps, int batch, int in, int size, const float* into_hidden, int64_t step_stride,
              int64_t line_stride, float* into_cell, const float* inputs, const float* gates,
              const float* hidden, const float* cells, const float* squashed, float factor,
              float* onward, float* weight, float* recurrent, float* bias, float* other_bias) {
    const int width = 4 * size;
    const int64_t rows = int64_t(batch) * size;
    std::vector<int> ends(batch);  // of each line: from there on nothing flows back
    for (int b = 0; b < batch; b++) {
        bool flows = false;
        for (int j = 0; j < size; j++) flows |= into_cell[b * size + j] != 0.0f;
        int end = steps;
        for (; end > 0 && !flows; end--) {
            const float* at = into_hidden + (end - 1) * step_stride + b * line_stride;
            for (int j = 0; j < size; j++) flows |= at[j] != 0.0f;
            if (flows) break;
        }
        ends[b] = end;
    }
    std::vector<int64_t> first(steps + 1, 0);  // of each step, among the places that are left
    places.clear();
    for (int t = 0; t < steps; t++) {
        for (int b = 0; b < batch; b++)
            if (t < ends[b]) places.push_back(t * batch + b);
        first[t + 1] = int64_t(places.size());
    }
    const int64_t left = first[steps];

    // ∂ℓ/∂a of every place that is left
    float* into_gates = of(gradients, left * width);
    float* packed = of(panels, int64_t(width) * whole_panels(in > size ? in : size));
    float* back = of(flowing, 2 * rows);  // through U, of each line; and of the lines that are left
    pack(width, size, recurrent, nullptr, packed);
    std::memset(back, 0, 4 * rows);
    for (int t = steps - 1; t >= 0; t--) {
        for (int64_t k = first[t]; k < first[t + 1]; k++) {
            const int b = places[k] - t * batch;
            const float* gate = gates + int64_t(places[k]) * width;
            const float* flows = into_hidden + t * step_stride + b * line_stride;
            float *to = into_gates + k * width, *cell = into_cell + b * size;
            for (int j = 0; j < size; j += WIDTH) {
                const int64_t here = int64_t(places[k]) * size + j;
                const Floats i = load(gate + j), f = load(gate + size + j),
                             g = load(gate + 2 * size + j), o = load(gate + 3 * size + j),
                             s = load(squashed + here),
                             into_h = load(flows + j) + load(back + b * size + j);
                const Floats into_c = load(cell + j) + into_h * o * (1.0f - s * s);
                store(to + j, into_c * g * i * (1.0f - i));
                store(to + size + j, into_c * load(cells + here) * f * (1.0f - f));
                store(to + 2 * size + j, into_c * i * (1.0f - g * g));
                store(to + 3 * size + j, into_h * s * o * (1.0f - o));
                store(cell + j, into_c * f);
            }
        }
        const int64_t num = first[t + 1] - first[t];
        float* some = num == batch ? back : back + rows;
        std::memset(some, 0, 4 * num * size);
        if (t > 0) add_product(num, into_gates + first[t] * width, width, packed, size, some);
        if (num < batch)
            for (int64_t k = 0; k < num; k++)
                std::memcpy(back + (places[first[t] + k] - t * batch) * size, some + k * size,
                            4 * size);
    }

    if (onward) {
        pack(width, in, weight, nullptr, packed);
        std::memset(onward, 0, 4 * int64_t(steps) * batch * in);
        if (left == int64_t(steps) * batch)
            add_product(left, into_gates, width, packed, in, onward);
        else {
            static thread_local Room results;
            float* result = of(results, left * in);
            std::memset(result, 0, 4 * left * in);
            add_product(left, into_gates, width, packed, in, result);
            for (int64_t k = 0; k < left; k++)
                std::memcpy(onward + int64_t(places[k]) * in, result + k * in, 4 * in);
        }
    }
    // Some rows after others, so that sums stay short.
    float* packed_left = of(left_panels, int64_t(BLOCK) * width);
    packed = of(panels, int64_t(BLOCK) * whole_panels(in > size ? in : size));
    for (int64_t from = 0; from < left; from += BLOCK) {
        const int num = left - from < BLOCK ? int(left - from) : BLOCK;
        pack_left(num, width, into_gates + from * width, packed_left);
        pack(num, in, inputs, places.data() + from, packed);
        rank_update(num, width, in, packed_left, packed, factor, weight);
        pack(num, size, hidden, places.data() + from, packed);
        rank_update(num, width, size, packed_left, packed, factor, recurrent);
    }
    float* sums = of(flowing, width);
    std::memset(sums, 0, 4 * width);
    for (int64_t k = 0; k < left; k++)
        for (int j = 0; j < width; j += WIDTH)
            store(sums + j, load(sums + j) + load(into_gates + k * width + j));
    for (int j = 0; j < width; j++) {
        bias[j] += factor * sums[j];
        other_bias[j] += factor * sums[j];
    }
}

}  // extern "C"

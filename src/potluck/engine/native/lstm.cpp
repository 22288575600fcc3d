// One LSTM layer on one core: its steps forward, and its steps back with the SGD step of its weights.
// `potluck.engine.native.lstm` compiles it.
//
//     a_t = W x_t + U h_{t-1} + b            i, f, o = σ(a_i), σ(a_f), σ(a_o)      g = tanh(a_g)
//     c_t = f ∘ c_{t-1} + i ∘ g              h_t = o ∘ tanh(c_t)
//
// The products with U are of a few rows, one for each line of a batch, with a large matrix, at which
// libraries reach half of what a core can do; `gemm.hpp` has them. Gates are in the order i, f, g,
// o, as in PyTorch. All arrays are float32 and contiguous unless strides are given.
//
// Going back, a place is a step of a line. From some place on a line's ∂ℓ/∂h may be zero to its end,
// as it is where the line is padded: nothing flows from there, and these places are left out.

#include "gemm.hpp"

constexpr int BLOCK = 1024;  // places that are summed at once

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

// Memory that is kept from call to call.
template <class P>
struct Rooms {
    std::vector<typename P::Unit> panels, lefts;
    std::vector<float> gradients, flowing, results;
};

template <class P>
static Rooms<P>& rooms_of() {
    static thread_local Rooms<P> rooms;
    return rooms;
}

// inputs [steps, batch, in]; weight W [4 size, in]; recurrent U [4 size, size]; biases [4 size], of
// which b is the sum. gates [steps, batch, 4 size]; squashed [steps, batch, size], which is tanh(c);
// hidden and cells [steps + 1, batch, size], the first states of which are set to zero. size is a
// multiple of COLUMNS.
template <class P>
static void forward(int steps, int batch, int in, int size, const float* inputs, const float* weight,
                    const float* recurrent, const float* bias, const float* other_bias, float* gates,
                    float* hidden, float* cells, float* squashed) {
    const int width = 4 * size;
    const int64_t rows = int64_t(batch) * size;
    Rooms<P>& rooms = rooms_of<P>();
    typename P::Unit* packed = of(rooms.panels, int64_t(width) * (in > size ? in : size));
    for (int j = 0; j < width; j++) gates[j] = bias[j] + other_bias[j];
    for (int64_t k = 1; k < int64_t(steps) * batch; k++)
        std::memcpy(gates + k * width, gates, 4 * width);
    pack_transposed<P>(in, width, weight, packed);
    add_product<P>(int64_t(steps) * batch, P::left(int64_t(steps) * batch, in, inputs, rooms.lefts),
                   P::depth(in), packed, width, gates);
    pack_transposed<P>(size, width, recurrent, packed);
    std::memset(hidden, 0, 4 * rows);
    std::memset(cells, 0, 4 * rows);
    for (int t = 0; t < steps; t++) {
        float* gate = gates + t * 4 * rows;
        if (t > 0)  // before, the state is zero
            add_product<P>(batch, P::left(batch, size, hidden + t * rows, rooms.lefts),
                           P::depth(size), packed, width, gate);
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

// whether any of a gradient is not zero
static bool flows(const float* gradient, int size) {
    bool found = false;
    for (int j = 0; j < size; j++) found |= gradient[j] != 0.0f;
    return found;
}

// From ∂ℓ/∂h_t, into_hidden [steps, batch, size] with strides of its own, and ∂ℓ/∂c of the last
// step, into_cell [batch, size], which is lost: onward [steps, batch, in] = ∂ℓ/∂x unless it is null,
// and W, U and both biases with `factor` times their gradients added. The rest as `forward` left it.
template <class P>
static void backward(int steps, int batch, int in, int size, const float* into_hidden,
                     int64_t step_stride, int64_t line_stride, float* into_cell,
                     const float* inputs, const float* gates, const float* hidden,
                     const float* cells, const float* squashed, float factor, float* onward,
                     float* weight, float* recurrent, float* bias, float* other_bias) {
    const int width = 4 * size;
    const int64_t rows = int64_t(batch) * size;
    std::vector<int> ends(batch);  // of each line: from there on nothing flows back
    for (int b = 0; b < batch; b++) {
        int end = steps;
        if (!flows(into_cell + b * size, size))
            while (end > 0 &&
                   !flows(into_hidden + (end - 1) * step_stride + b * line_stride, size))
                end--;
        ends[b] = end;
    }
    std::vector<int64_t> first(steps + 1, 0);  // of each step, among the places that are left
    static thread_local std::vector<int32_t> places;
    places.clear();
    for (int t = 0; t < steps; t++) {
        for (int b = 0; b < batch; b++)
            if (t < ends[b]) places.push_back(t * batch + b);
        first[t + 1] = int64_t(places.size());
    }
    const int64_t left = first[steps];

    Rooms<P>& rooms = rooms_of<P>();
    // ∂ℓ/∂a of every place that is left
    float* into_gates = of(rooms.gradients, left * width);
    typename P::Unit* packed =
        of(rooms.panels, int64_t(width > BLOCK ? width : BLOCK) * whole_panels(in > size ? in : size));
    float* back = of(rooms.flowing, 2 * rows);  // through U, of each line; and of those that are left
    pack<P, COLUMNS>(width, size, recurrent, nullptr, packed);
    std::memset(back, 0, 4 * rows);
    for (int t = steps - 1; t >= 0; t--) {
        for (int64_t k = first[t]; k < first[t + 1]; k++) {
            const int b = places[k] - t * batch;
            const float* gate = gates + int64_t(places[k]) * width;
            const float* into = into_hidden + t * step_stride + b * line_stride;
            float *to = into_gates + k * width, *cell = into_cell + b * size;
            for (int j = 0; j < size; j += WIDTH) {
                const int64_t here = int64_t(places[k]) * size + j;
                const Floats i = load(gate + j), f = load(gate + size + j),
                             g = load(gate + 2 * size + j), o = load(gate + 3 * size + j),
                             s = load(squashed + here),
                             into_h = load(into + j) + load(back + b * size + j);
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
        if (t > 0)
            add_product<P>(num, P::left(num, width, into_gates + first[t] * width, rooms.lefts),
                           P::depth(width), packed, size, some);
        if (num < batch)
            for (int64_t k = 0; k < num; k++)
                std::memcpy(back + (places[first[t] + k] - t * batch) * size, some + k * size,
                            4 * size);
    }

    if (onward) {
        pack<P, COLUMNS>(width, in, weight, nullptr, packed);
        std::memset(onward, 0, 4 * int64_t(steps) * batch * in);
        const bool whole = left == int64_t(steps) * batch;
        float* result = whole ? onward : of(rooms.results, left * in);
        if (!whole) std::memset(result, 0, 4 * left * in);
        add_product<P>(left, P::left(left, width, into_gates, rooms.lefts), P::depth(width), packed,
                       in, result);
        for (int64_t k = 0; k < left && !whole; k++)
            std::memcpy(onward + int64_t(places[k]) * in, result + k * in, 4 * in);
    }
    // Some rows after others, so that sums stay short.
    typename P::Unit* packed_left = of(rooms.lefts, int64_t(BLOCK) * width);
    for (int64_t from = 0; from < left; from += BLOCK) {
        const int num = left - from < BLOCK ? int(left - from) : BLOCK;
        pack<P, LEFT>(num, width, into_gates + from * width, nullptr, packed_left);
        pack<P, COLUMNS>(num, in, inputs, places.data() + from, packed);
        rank_update<P>(P::depth(num), width, in, packed_left, packed, factor, weight);
        pack<P, COLUMNS>(num, size, hidden, places.data() + from, packed);
        rank_update<P>(P::depth(num), width, size, packed_left, packed, factor, recurrent);
    }
    float* sums = of(rooms.flowing, width);
    std::memset(sums, 0, 4 * width);
    for (int64_t k = 0; k < left; k++)
        for (int j = 0; j < width; j += WIDTH)
            store(sums + j, load(sums + j) + load(into_gates + k * width + j));
    for (int j = 0; j < width; j++) {
        bias[j] += factor * sums[j];
        other_bias[j] += factor * sums[j];
    }
}

extern "C" {

int columns() { return COLUMNS; }

decltype(&forward<Float32>) forward_float32 = forward<Float32>;
decltype(&backward<Float32>) backward_float32 = backward<Float32>;
#if defined(__AVX512BF16__)
decltype(&forward<BFloat16>) forward_bf16 = forward<BFloat16>;
decltype(&backward<BFloat16>) backward_bf16 = backward<BFloat16>;
#endif

}  // extern "C"
